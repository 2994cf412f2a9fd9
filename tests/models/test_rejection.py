"""Predictions have the cosines, scores and rejections of a slow computation."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import openvclip
from examples.shapes.model import create_model
from examples.shapes.world import TEMPLATES
from openvclip import cli
from openvclip.checkpoints import load_checkpoint, save_checkpoint
from openvclip.checkpoints.contract import Confidence
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.errors import ClassNamesError, LabelWarning, UsageError
from openvclip.models import (
    SCORES,
    Prediction,
    confidence_score,
)
from openvclip.models.features import cosines_of_logits, similarity_logits
from openvclip.models.prediction import prediction_of
from openvclip.models.preprocess import transform_for
from openvclip.models.usage import contract_of
from tests.helpers import random_video, tiny_clip, tiny_tokenizer
from tests.models.answers import LABELS, OTHERS, make_classifier, predictions
from tests.world import World


@pytest.fixture(scope="module")
def classifier() -> openvclip.ZeroShotClassifier:
    return make_classifier()


def test_cosines_and_probabilities_equal_a_slow_computation(
    classifier: openvclip.ZeroShotClassifier,
) -> None:
    model, video = tiny_clip(), random_video(1, 2)
    settings = Confidence(temperature=2.5, threshold=-1.0, score="energy")
    with torch.no_grad():
        frames = functional.normalize(model.encode_image(video[0]).double(), dim=-1)
        texts = model.encode_text(tiny_tokenizer([*LABELS, *OTHERS])).double()
        cosines = (frames @ functional.normalize(texts, dim=-1).T).mean(dim=0)
        logits = classifier(video)[0]
    scaled = float(model.logit_scale.detach().exp()) * cosines / 2.5
    answers = prediction_of("v", classifier, logits, OTHERS, confidence=settings)
    assert answers.labels == LABELS
    assert answers.cosines is not None
    assert answers.logits is not None
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(answers.cosines.double(), cosines[:3], **close)
    torch.testing.assert_close(answers.logits.double(), 2.5 * scaled, **close)
    shares = scaled.exp() / scaled.exp().sum()
    torch.testing.assert_close(answers.probabilities.double(), shares[:3], **close)
    assert answers.background == pytest.approx(dict(zip(OTHERS, shares[3:].tolist(), strict=True)))
    assert float(answers.probabilities.sum()) + sum(answers.background.values()) == pytest.approx(1)
    assert answers.score == pytest.approx(math.log(sum(map(math.exp, scaled[:3].tolist()))), 1e-4)
    assert (answers.cosines.dtype, answers.probabilities.dtype) == (torch.float32, torch.float32)


def test_cosines_are_those_in_the_logits_also_with_a_bias() -> None:
    model: Any = tiny_clip()
    features = functional.normalize(torch.randn(4, 8), dim=-1)
    text = functional.normalize(torch.randn(3, 8), dim=-1)
    for bias in (None, torch.nn.Parameter(torch.tensor(-10.0))):
        model.logit_bias = bias
        cosines = cosines_of_logits(model, similarity_logits(model, features, text))
        torch.testing.assert_close(cosines, features @ text.T)
        assert not cosines.requires_grad


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_scores_equal_loops(k: int, b: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(2, k, generator=generator, dtype=torch.float64) * 2 - 1
    logits = torch.cat([7 * cosines, torch.randn(2, b, generator=generator).double()], dim=1)
    for row, (of_labels, of_all) in enumerate(zip(cosines.tolist(), logits.tolist(), strict=True)):
        terms = [math.exp(value) for value in of_all]
        expected = {
            "cosine": max(of_labels),
            "probability": max(terms[:k]) / sum(terms),
            "energy": math.log(sum(terms[:k])),
        }
        for score in SCORES:
            value = confidence_score(score, cosines, logits)[row]
            assert float(value) == pytest.approx(expected[score])


def test_without_options_nothing_is_rejected(classifier: openvclip.ZeroShotClassifier) -> None:
    with torch.no_grad():
        logits = classifier(random_video(1, 2))[0]
    plain = prediction_of("v", classifier, logits)
    assert torch.equal(plain.probabilities, logits.softmax(dim=0))
    assert (plain.rejected, plain.answer, plain.background) == (False, plain.label, {})
    assert plain.score == float(plain.cosines.max())  # type: ignore[union-attr]
    assert "none of these" not in str(plain)
    # The old constructor.
    old = Prediction("v", ["a"], torch.ones(1))
    assert (old.answer, old.cosines, old.rejected) == ("a", None, False)


def test_a_video_is_rejected_by_its_score_or_by_a_background_text(
    classifier: openvclip.ZeroShotClassifier,
) -> None:
    for answers in predictions(classifier, background=OTHERS):
        beaten = max(answers.background.values()) > float(answers.probabilities.max())
        assert answers.rejected == beaten
        assert answers.answer == (None if beaten else answers.label)
        assert ("\nnone of these\n" in str(answers)) == beaten
    assert len({answers.rejected for answers in predictions(classifier, background=OTHERS)}) == 2
    free = predictions(classifier, background=OTHERS, reject=False)
    assert not any(answers.rejected for answers in free)
    scores = [answers.score or 0.0 for answers in predictions(classifier)]
    middle = sorted(scores)[30]
    settings = Confidence(threshold=middle)
    for options in (
        {"reject": middle},
        {"confidence": settings},
        {"confidence": settings, "reject": True},
        {"confidence": Confidence(threshold=1.0), "reject": middle},
    ):
        rejected = [answers.rejected for answers in predictions(classifier, **options)]
        assert rejected == [score < middle for score in scores]  # its own score is enough
    off = predictions(classifier, confidence=settings, reject=False)
    assert not any(answers.rejected for answers in off)


def test_background_texts_of_a_classifier_stand_anywhere(
    classifier: openvclip.ZeroShotClassifier,
) -> None:
    names = [OTHERS[1], *LABELS[:2], OTHERS[0], LABELS[2]]
    mixed = openvclip.ZeroShotClassifier(classifier.model, tiny_tokenizer, names, ["{}"])
    for first, second in zip(
        predictions(classifier, 3, background=OTHERS),
        predictions(mixed, 3, background=OTHERS),
        strict=True,
    ):
        assert first.labels == second.labels
        torch.testing.assert_close(first.probabilities, second.probabilities)
        assert first.background == pytest.approx(second.background)


def test_wrong_background_and_reject(
    classifier: openvclip.ZeroShotClassifier, tmp_path: Any
) -> None:
    """Each is an error before the video is read: the file does not exist."""
    model, missing = classifier.model, tmp_path / "absent.mp4"

    def predict(thing: Any, labels: Any = None, **options: Any) -> None:
        openvclip.predict(thing, missing, labels, tokenizer=tiny_tokenizer, **options)

    with pytest.raises(ClassNamesError, match="background holds 'a', which labels holds too"):
        predict(model, ["a", "b"], background=["c", "a"])
    with pytest.raises(ClassNamesError, match="background is one string, 'a hand'"):
        predict(model, ["a", "b"], background="a hand")
    with pytest.raises(ClassNamesError, match=r"background\[1\] is ' '; expected a non-empty"):
        predict(model, ["a", "b"], background=["c", " "])
    with pytest.raises(ClassNamesError, match="more than once: 'c'"):
        predict(model, ["a", "b"], background=["c", "c"])
    with pytest.raises(UsageError, match=r"'a han' is not a class .*did you mean 'a hand'\?"):
        predict(classifier, background=["a han"])
    with pytest.raises(UsageError, match=r"All 5 class names .* at least one label"):
        predict(classifier, background=[*LABELS, *OTHERS])
    with pytest.raises(UsageError, match="reject=True needs a calibrated threshold"):
        predict(classifier, reject=True)
    for wrong in (20, -1.5, float("nan"), "0.2"):
        with pytest.raises(UsageError, match=r"reject=.* a number from -1 to 1"):
            predict(classifier, reject=wrong)
    with pytest.raises(UsageError, match="a number, which is compared with the score 'energy'"):
        predict(classifier, reject=math.inf, confidence=Confidence(score="energy"))
    with pytest.raises(UsageError, match="score='odd' is not known"):
        predict(classifier, confidence=Confidence(score="odd"))


def test_a_label_beside_a_background_text_is_not_alone(tmp_path: Any) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, "templates": ["{}"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = openvclip.predict(
            tiny_clip(), tmp_path / "black.png", ["a"], background=["b"], **options
        )
    assert (answers.labels, list(answers.background)) == (["a"], ["b"])
    assert float(answers.probabilities[0]) + answers.background["b"] == pytest.approx(1)
    with pytest.warns(LabelWarning, match="'a' is the only label"):
        openvclip.predict(tiny_clip(), tmp_path / "black.png", ["a"], background=[], **options)


# --- the command -------------------------------------------------------------------------------


def test_the_command_prints_none_of_these(
    world: World, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(world.folder / world.samples[0][0])
    labels, background = ["star sliding", "key bouncing"], ["house resting", "square resting"]
    base = ["predict", video, "--labels", *labels, *world.model_flags]
    clip, tokenizer = create_model()
    named = openvclip.ZeroShotClassifier(clip, tokenizer, [*labels, *background], TEMPLATES)
    answer = openvclip.predict(named, video, background=background, reject=1.0)
    assert cli.main([*base, "--background", *background, "--reject", "1", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["rejected"] is True
    assert entry["score"] == pytest.approx(answer.score, abs=1e-5)
    cosines = dict(zip(answer.labels, answer.cosines.tolist(), strict=True))  # type: ignore[union-attr]
    assert {row["label"]: row["cosine"] for row in entry["labels"]} == pytest.approx(
        cosines, abs=1e-5
    )
    shares = {row["label"]: row["probability"] for row in entry["background"]}
    assert shares == pytest.approx(answer.background, abs=1e-5)
    assert cli.main([*base, "--reject", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [video, "none of these"]
    # A calibrated model: the contract stands in the header of the file.
    model = openvclip.expand_temporal_attention(create_model()[0])
    contract = contract_of(model, "shapes-clip", transform_for(model), templates=TEMPLATES)
    contract = contract.with_(confidence=Confidence(temperature=4.0, threshold=1.0))
    calibrated = tmp_path / "calibrated.safetensors"
    state = load_checkpoint(world.tuned)
    save_checkpoint(state, calibrated, metadata={CONTRACT_KEY: contract.to_json()})
    assert cli.main([*base, "--json", "--reject", "--checkpoint", str(calibrated)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    model.load_state_dict(state)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, labels, TEMPLATES)
    plain = openvclip.predict(classifier, video)
    assert plain.logits is not None
    shares = (plain.logits / 4).softmax(dim=0).sort(descending=True).values
    assert [row["probability"] for row in entry["labels"]] == pytest.approx(
        shares.tolist(), abs=1e-5
    )
    assert entry["rejected"] is True
    for flags, reason in (
        (["--reject"], "--reject without a number uses the threshold of a calibrated model"),
        (["--reject", "20"], "reject=20.0: expected True, False, or a number from -1 to 1"),
        (["--reject", "x"], "argument --reject: invalid float value: 'x'"),
        (["--background", "key bouncing"], "background holds 'key bouncing', which labels holds"),
        (["--background", "a", "a"], "more than once: 'a'"),
        (["--timeline", "--reject", "0.2"], "--reject has no effect with --timeline"),
    ):
        with contextlib.suppress(SystemExit):
            assert cli.main([*base, *flags]) == 2
        assert reason in capsys.readouterr().err
