"""Eval mode for the time of a prediction, with several threads on one model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from openvclip import ZeroShotClassifier, expand_temporal_attention
from openvclip.models.modes import evaluation_mode
from openvclip.models.prediction import logits_of
from tests.helpers import random_video, tiny_clip, tiny_tokenizer


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> nn.Sequential:
    """A model in train mode with a frozen part in eval mode."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))).train()
    model[1][1].eval()
    return model


# Report 43: predict() on a model in train mode from 4 threads gave 5 wrong results of 96. The first
# thread that was done set the model to train mode, while the other threads still used it.
@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_last_user_restores_the_modes(first: int) -> None:
    model = mixed()
    before = modes(model)
    users: list[Any] = [evaluation_mode(part) for part in (model, model[1], nn.ModuleList([model]))]
    for user in users:
        user.__enter__()
    assert not any(modes(model))
    for user in users[first:] + users[:first]:
        assert not any(modes(model[1]))
        user.__exit__(None, None, None)
    assert modes(model) == before


def test_modes_are_restored_after_an_error_and_in_nested_calls() -> None:
    model = mixed()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluation_mode(model), evaluation_mode(model):
        raise ZeroDivisionError
    assert modes(model) == before


def test_a_model_in_eval_mode_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed().eval()
    monkeypatch.setattr(nn.Module, "train", lambda *args: pytest.fail("train() was called"))
    with evaluation_mode(model):
        assert not any(modes(model))
    assert not any(modes(model))


def test_threads_give_bitwise_the_logits_of_one_thread() -> None:
    model = expand_temporal_attention(tiny_clip(patch_dropout=0.5)).train()
    classifier = ZeroShotClassifier(model, tiny_tokenizer, ["one", "two"], ["{}"])
    videos = [random_video(1, 2 + i % 3, seed=i) for i in range(40)]
    expected = [logits_of(classifier, video) for video in videos]
    barrier = threading.Barrier(4)

    def work(part: int) -> list[bool]:
        barrier.wait()
        return [
            torch.equal(logits_of(classifier, videos[i]), expected[i]) for i in range(part, 40, 4)
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(equal for part in pool.map(work, range(4)) for equal in part)
    assert all(modes(classifier))
