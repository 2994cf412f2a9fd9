"""A tiny classifier and its predictions, for the tests of scores, thresholds and rejection."""

from __future__ import annotations

from typing import Any

import torch

import openvclip
from openvclip.models import Prediction
from openvclip.models.prediction import prediction_of
from tests.helpers import random_video, tiny_clip, tiny_tokenizer

LABELS = ["star sliding", "key bouncing", "house resting"]
OTHERS = ["an empty room", "a hand"]


def make_classifier() -> openvclip.ZeroShotClassifier:
    return openvclip.ZeroShotClassifier(tiny_clip(), tiny_tokenizer, [*LABELS, *OTHERS], ["{}"])


def predictions(
    classifier: openvclip.ZeroShotClassifier, n: int = 60, **options: Any
) -> list[Prediction]:
    with torch.no_grad():
        logits = classifier(random_video(n, 2))
    return [prediction_of(f"{i}", classifier, row, **options) for i, row in enumerate(logits)]
