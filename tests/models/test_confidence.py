"""Temperature, threshold and scores equal slow references; predictions reject what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import openvclip
from openvclip.checkpoints.contract import Confidence, Contract
from openvclip.errors import CalibrationWarning, UsageError
from openvclip.evaluation import (
    accuracy_coverage,
    auroc,
    confidence_report,
    expected_calibration_error,
)
from openvclip.models import (
    SCORES,
    Prediction,
    calibrate,
    fit_temperature,
    threshold_to_keep,
)
from openvclip.video import Sampling
from tests.helpers import tiny_clip, tiny_tokenizer
from tests.models.answers import LABELS, OTHERS, make_classifier, predictions


def noisy(n: int = 200, k: int = 5, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of a classifier that is right for some clips and too sure of itself."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator) + functional.one_hot(targets, k)
    return scale * logits, targets


def nll(logits: Tensor, targets: Tensor, temperature: float) -> float:
    return float(functional.cross_entropy(logits.double() / temperature, targets))


# --- the temperature ---------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 1000), st.floats(0.1, 30))
def test_no_other_temperature_has_a_lower_nll(n: int, k: int, seed: int, scale: float) -> None:
    logits, targets = noisy(n, k, seed, scale)
    true = logits.gather(1, targets[:, None])[:, 0]
    assume(bool((true < logits.max(dim=1).values).any()))
    assume(float((true - logits.mean(dim=1)).mean()) > 1e-3 * scale)
    fitted = fit_temperature(logits, targets)
    lowest = nll(logits, targets, fitted)
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2, 100):
        assert lowest <= nll(logits, targets, fitted * factor) + 1e-13
    # The derivative is zero: the mean logit of the probabilities is that of the true labels.
    weights = (logits.double() / fitted).softmax(dim=1)
    expected = float((weights * logits.double()).sum(dim=1).mean())
    assert expected == pytest.approx(float(true.double().mean()), rel=1e-9, abs=1e-9 * scale)


def test_the_temperature_follows_the_scale_of_the_logits() -> None:
    logits, targets = noisy()
    fitted = fit_temperature(logits, targets)
    assert fitted > 1
    for scale in (1e-3, 0.5, 1e4):
        assert fit_temperature(scale * logits.double(), targets) == pytest.approx(scale * fitted)
    assert fit_temperature(logits + torch.randn(len(logits), 1), targets) == pytest.approx(
        fitted, rel=1e-5
    )
    drawn = torch.distributions.Categorical(logits=logits[:1].expand(20_000, -1) / 2).sample()
    assert fit_temperature(logits[:1].expand(20_000, -1), drawn) == pytest.approx(2, rel=0.1)


def test_temperatures_that_can_not_be_fitted() -> None:
    logits, targets = noisy(20)
    with pytest.raises(UsageError, match="All 20 clips are classified correctly"):
        fit_temperature(logits, logits.argmax(dim=1))
    with pytest.raises(UsageError, match=r"no higher than those of the other texts\. Check"):
        fit_temperature(logits, logits.argmin(dim=1))
    with pytest.raises(UsageError, match="0 clips; expected at least 2"):
        fit_temperature(logits[:0], targets[:0])
    with pytest.raises(UsageError, match="1 clips; expected at least 2"):
        fit_temperature(logits[:1], targets[:1])
    with pytest.raises(UsageError, match=r"between . and 5; expected class indices from 0 to 4"):
        fit_temperature(logits, targets.index_fill(0, torch.tensor([3]), 5))
    with pytest.raises(UsageError, match="NaN or infinite"):
        fit_temperature(logits.masked_fill(logits > 5, float("nan")), targets)
    with pytest.raises(UsageError, match="at least 2 classes"):
        fit_temperature(logits[:, :1], targets * 0)
    with pytest.raises(UsageError, match=r"shape \[20, 5\] and targets \[19\]"):
        fit_temperature(logits, targets[1:])


# --- the threshold -----------------------------------------------------------------------------


@given(st.integers(2, 60), st.floats(0.05, 0.99), st.integers(0, 1000))
def test_a_threshold_keeps_the_share_of_new_clips(n: int, keep: float, seed: int) -> None:
    """Each of N + 1 exchangeable clips is equally likely to be the new one."""
    scores = torch.randperm(n + 1, generator=torch.Generator().manual_seed(seed)) / 7
    least = math.ceil(keep / (1 - keep) - 1e-9)
    if n < least:
        with pytest.raises(UsageError, match=f"{n} clips .* needs at least {least}"):
            threshold_to_keep(scores[1:], keep)
        return
    kept = [
        scores[i] >= threshold_to_keep(torch.cat([scores[:i], scores[i + 1 :]]), keep)
        for i in range(n + 1)
    ]
    share = sum(map(float, kept)) / (n + 1)
    assert keep - 1e-9 <= share <= keep + 1 / (n + 1) + 1e-9


def test_wrong_thresholds() -> None:
    assert threshold_to_keep(torch.arange(19.0), 0.95) == 0
    for keep in (0.0, 1.0, 95, float("nan")):
        with pytest.raises(UsageError, match=r"keep=.*: expected a share between 0 and 1"):
            threshold_to_keep(torch.rand(50), keep)
    with pytest.raises(UsageError, match="0 clips belong to the labels"):
        threshold_to_keep(torch.zeros(0), 0.5)
    with pytest.raises(UsageError, match="NaN or infinite"):
        threshold_to_keep(torch.tensor([0.0, float("nan")]), 0.5)
    with pytest.raises(UsageError, match=r"shape \[3, 1\]; expected \[N\]"):
        threshold_to_keep(torch.zeros(3, 1), 0.5)


@pytest.fixture(scope="module")
def classifier() -> openvclip.ZeroShotClassifier:
    return make_classifier()


# --- calibrate and confidence_report -----------------------------------------------------------


def with_targets(
    classifier: openvclip.ZeroShotClassifier, **options: Any
) -> tuple[list[Prediction], list[str | None]]:
    """Predictions, and targets that are mostly the best label, sometimes none of the labels."""
    answers = predictions(classifier, background=OTHERS, **options)
    targets: list[str | None] = [prediction.label for prediction in answers]
    for i in range(0, 60, 3):
        targets[i] = LABELS[i // 3 % 3]
    for i in range(1, 60, 6):
        targets[i] = None
    return answers, targets


@pytest.mark.parametrize("score", SCORES)
def test_calibration_equals_its_parts(classifier: openvclip.ZeroShotClassifier, score: Any) -> None:
    answers, targets = with_targets(classifier)
    settings = calibrate(answers, targets, keep=0.9, score=score)
    inside = [i for i, target in enumerate(targets) if target is not None]
    logits = torch.stack([answers[i].logits for i in inside])  # type: ignore[misc]
    indices = torch.tensor([LABELS.index(targets[i] or "") for i in inside])
    assert settings.temperature == fit_temperature(logits, indices)
    assert (settings.score, settings.keep, settings.clips) == (score, 0.9, len(inside))
    again, _ = with_targets(classifier, confidence=settings, reject=None)
    below = [i for i in inside if (again[i].score or 0.0) < (settings.threshold or 0.0)]
    assert len(below) == math.floor((len(inside) + 1) * 0.1) - 1  # the k-th lowest is kept
    # Targets as indices, in a tensor, with -1; and all clips without targets.
    numbers = torch.tensor([-1 if t is None else LABELS.index(t) for t in targets])
    assert calibrate(answers, numbers, keep=0.9, score=score) == settings
    unlabelled = calibrate(answers, keep=0.9, score=score)
    assert (unlabelled.temperature, unlabelled.clips) == (1.0, 60)
    assert not any(
        prediction.rejected for prediction in predictions(classifier, confidence=Confidence())
    )


def test_the_report_equals_counts(classifier: openvclip.ZeroShotClassifier) -> None:
    answers, targets = with_targets(classifier)
    answers = [replace(p, rejected=i % 5 == 0) for i, p in enumerate(answers)]
    report = confidence_report(answers, targets)
    rows = list(zip(answers, targets, strict=True))
    inside = [(p, t) for p, t in rows if t is not None]
    outside = [p for p, t in rows if t is None]
    answered = [(p, t) for p, t in rows if not p.rejected]
    assert (report.n_clips, report.n_none) == (len(inside), len(outside)) == (50, 10)
    assert report.top1 == pytest.approx(sum(p.label == t for p, t in inside) / 50)
    assert report.kept == pytest.approx(sum(not p.rejected for p, _ in inside) / 50)
    assert report.rejected == pytest.approx(sum(p.rejected for p in outside) / 10)
    right = sum(p.answer == t for p, t in answered) / len(answered)
    assert report.right_answers == pytest.approx(right)
    correct = torch.tensor([p.label == t for p, t in rows])
    scores = torch.tensor([p.score for p in answers])
    is_inside = torch.tensor([t is not None for t in targets])
    best = torch.tensor([float(p.probabilities.max()) for p in answers])
    assert report.auroc == auroc(scores, is_inside)
    assert report.curve.aurc == accuracy_coverage(scores, correct).aurc
    ece = expected_calibration_error(best[is_inside], correct[is_inside])
    assert report.ece == pytest.approx(ece)
    assert "rejected of 10 clips of none of the labels" in str(report)
    alone = confidence_report(answers[:1], [answers[0].label])
    assert (alone.top1, alone.kept) == (1, 0)
    assert math.isnan(alone.auroc)
    assert math.isnan(alone.rejected)
    assert math.isnan(alone.right_answers)
    assert math.isnan(confidence_report(answers[:2], [None, -1]).ece)


def test_calibration_of_a_perfect_classifier_warns(
    classifier: openvclip.ZeroShotClassifier,
) -> None:
    answers = predictions(classifier)
    alone = openvclip.ZeroShotClassifier(classifier.model, tiny_tokenizer, LABELS[:1], ["{}"])
    assert calibrate(predictions(alone), [0] * 60).temperature == 1
    with pytest.warns(CalibrationWarning, match="All 60 clips are classified correctly"):
        settings = calibrate(answers, [prediction.label for prediction in answers])
    assert settings.temperature == 1


def test_wrong_calibrations(classifier: openvclip.ZeroShotClassifier) -> None:
    answers, targets = with_targets(classifier)
    other = predictions(classifier, 2)
    for call in (calibrate, confidence_report):
        with pytest.raises(UsageError, match="There are no predictions"):
            call([], [])
        with pytest.raises(UsageError, match="59 targets are given for 60 clips"):
            call(answers, targets[1:])
        with pytest.raises(UsageError, match=r"'star slidin' .* \(did you mean 'star sliding'\?\)"):
            call(answers, ["star slidin", *targets[1:]])
        for wrong in (3, -2, 1.5, True):
            with pytest.raises(UsageError, match=rf"target {wrong} is no label; .* from 0 to 2"):
                call(answers, [wrong, *targets[1:]])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="different labels or background texts"):
            call([answers[0], other[0]], ["star sliding"] * 2)
        with pytest.raises(UsageError, match="has no cosines and logits"):
            call([Prediction("v", ["a"], torch.ones(1))], ["a"])
    with pytest.raises(UsageError, match=r"1 clips belong to the labels; keep=0.95 needs at least"):
        calibrate(answers[:1])
    with pytest.raises(UsageError, match=r"given for 0 clips; expected at least 2"):
        calibrate(answers[:2], [None, None])
    with pytest.raises(UsageError, match=r"score='cosines' .*did you mean cosine\?"):
        calibrate(answers, score="cosines")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no score"):
        confidence_report([replace(answers[0], score=None)], ["star sliding"])


# --- VideoCLIP ---------------------------------------------------------------------------------


def clips_of_frames(n: int) -> list[Any]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8) for _ in range(n)]


def test_a_calibrated_model_keeps_its_calibration(tmp_path: Any) -> None:
    few = Sampling(num_frames=2, views=1, sampler="uniform")
    clip = openvclip.VideoCLIP(tiny_clip(), tiny_tokenizer, sampling=few, templates=["{}"])
    videos, options = clips_of_frames(25), {"background": ["an empty room"], "fps": 10.0}
    before = clip.classify(videos, LABELS, **options)
    direct = openvclip.predict(
        clip.classifier([*LABELS, "an empty room"]), videos[0], sampling=few, **options
    )
    torch.testing.assert_close(direct.probabilities, before[0].probabilities)
    assert direct.rejected == before[0].rejected
    assert direct.score == pytest.approx(before[0].score, abs=1e-6)
    with pytest.raises(UsageError, match="reject=True needs a calibrated threshold"):
        clip.classify(videos[0], LABELS, reject=True)
    best = [prediction.label for prediction in before]
    targets = [*(best[i] if i % 2 else LABELS[i % 3] for i in range(24)), None]
    settings = clip.calibrate(videos, LABELS, targets, keep=0.8, **options)
    assert settings == calibrate(before, targets, keep=0.8)
    assert clip.confidence == clip.contract.confidence == settings
    assert (settings.clips, settings.score) == (24, "cosine")
    after = clip.classify(videos, LABELS, **options)
    for old, new in zip(before, after, strict=True):
        assert old.logits is not None
        expected = (old.logits / settings.temperature).softmax(dim=0)[:3]
        torch.testing.assert_close(new.probabilities, expected)
        assert new.score == old.score
        below = (new.score or 0.0) < (settings.threshold or 0.0)
        assert new.rejected == (below or old.rejected)
    low = [(prediction.score or 0.0) < (settings.threshold or 0.0) for prediction in after[:24]]
    assert sum(low) == 4  # floor(25 * 0.2) - 1
    # The contract brings the calibration.
    contract = Contract.from_json(clip.contract.to_json(), "here")
    copied = openvclip.VideoCLIP(tiny_clip(), tiny_tokenizer, contract=contract)
    again = copied.classify(videos[0], LABELS, reject=True, **options)
    torch.testing.assert_close(again.probabilities, after[0].probabilities)
    assert again.rejected == after[0].rejected
    # A second calibration starts from the same logits.
    assert copied.calibrate(videos, LABELS, targets, keep=0.8, **options) == settings
    timeline = copied.timeline(videos[0], LABELS, seconds=0.2, fps=10.0)
    window = openvclip.models.predict_timeline(
        copied.classifier(LABELS),
        videos[0],
        transform=copied.transform,
        num_frames=2,
        seconds=0.2,
        fps=10.0,
    )
    flat = (window.probabilities.log() / settings.temperature).softmax(dim=1)
    torch.testing.assert_close(timeline.probabilities, flat)
    for wrong, reason in (
        ({"keep": 95}, "keep=95: expected a share"),
        ({"score": "odd"}, "score='odd' is not known"),
        ({"labels": ["a", "a"]}, "more than once: 'a'"),
        ({"background": ["a", "star sliding"]}, "which labels holds too"),
        ({"videos": "absent.mp4", "fps": None}, "absent.mp4: no such file"),
        ({"videos": videos[:1]}, "1 clips belong to the labels; keep=0.95 needs at least 19"),
        ({"videos": []}, "expected at least one|is empty|no videos"),
    ):
        arguments = {"videos": videos, "labels": LABELS, "fps": 10.0, **wrong}  # type: ignore[dict-item]
        with pytest.raises(openvclip.OpenVCLIPError, match=reason):
            clip.calibrate(**arguments)  # type: ignore[arg-type]
    assert clip.confidence == settings  # a call that fails changes nothing
