"""λ without labels equals the formulas in numpy, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import openvclip
from openvclip.errors import EvaluationError, LambdaError, UsageError, VideoShapeError
from openvclip.evaluation import (
    CHOICE_LAMBDAS,
    choose_lambda,
    dawin_weights,
    evaluate,
    evaluate_mixed,
    mix_logits,
)
from openvclip.video import PaddedSamples, VideoSample
from tests.helpers import (
    assert_same_state,
    random_video,
    randomise,
    snapshot,
    tiny_clip,
    tiny_tokenizer,
)

NAMES = ["red", "green", "blue", "black"]
Array = np.ndarray[Any, Any]


def classifier(names: list[str] = NAMES) -> openvclip.ZeroShotClassifier:
    model = openvclip.expand_temporal_attention(tiny_clip())
    return openvclip.ZeroShotClassifier(model, tiny_tokenizer, names, ["a {}."])


BASE = snapshot(tiny_clip())
TUNED = snapshot(randomise(tiny_clip(), 1))
CLIPS = [random_video(3, 2, seed) for seed in range(2)]


def chances(lam: float, clips: list[Tensor] = CLIPS) -> Array:
    """The probabilities of an interpolated model, each by a classifier of its own."""
    alone = classifier()
    alone.model.load_state_dict(openvclip.interpolate(BASE, TUNED, lam))
    alone.refresh_text()
    with torch.no_grad():
        logits = np.concatenate([alone(video).double().numpy() for video in clips])
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def entropies(p: Array) -> Array:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)


def dawin_by_hand() -> Array:
    first, second = np.exp(-entropies(chances(1.0))), np.exp(-entropies(chances(0.0)))
    return second / (first + second)


@settings(max_examples=50, deadline=None)
@given(
    arrays.arrays(np.float64, (2, 3, 4), elements=st.floats(-1e3, 1e3)),
    st.floats(-100, 100),
)
def test_weights_are_the_formula_and_do_not_depend_on_a_shift(logits: Array, shift: float) -> None:
    def exactly(rows: Array) -> Array:
        odds = np.exp(rows - rows.max(axis=1, keepdims=True))
        return np.exp(-entropies(odds / odds.sum(axis=1, keepdims=True)))

    first, second = exactly(logits[0]), exactly(logits[1])
    a, b = map(torch.tensor, logits)
    weights = dawin_weights(a, b)
    np.testing.assert_allclose(weights, second / (first + second), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dawin_weights(b, a), 1 - weights)
    torch.testing.assert_close(dawin_weights(a + shift, b), weights, rtol=1e-6, atol=1e-6)
    assert torch.equal(dawin_weights(a, a), torch.full((3,), 0.5, dtype=torch.float64))


def test_dawin_equals_numpy() -> None:
    own = classifier()
    before = snapshot(own.model)
    choice = choose_lambda(own, BASE, TUNED, CLIPS)
    np.testing.assert_allclose(choice.weights, dawin_by_hand(), rtol=1e-5)
    assert choice.lam == pytest.approx(1 - dawin_by_hand().mean(), rel=1e-5)
    assert (choice.method, choice.n_clips, dict(choice.scores)) == ("dawin", 6, {})
    assert list(choice.entropies) == [1.0, 0.0]
    for lam, mean in choice.mean_entropies.items():
        assert mean == pytest.approx(entropies(chances(lam)).mean(), rel=1e-5)
    assert_same_state(snapshot(own.model), before)
    turned = choose_lambda(own, TUNED, BASE, CLIPS)
    assert turned.lam == pytest.approx(1 - choice.lam)


@pytest.mark.parametrize("method", ["entropy", "information"])
def test_grids_equal_numpy(method: Any) -> None:
    own, lams = classifier(), (0.0, 0.3, 0.7, 1.0)
    before = snapshot(own.model)
    choice = choose_lambda(own, BASE, TUNED, CLIPS, method, lams=lams)
    for lam in lams:
        p = chances(lam)
        expected = entropies(p).mean()
        expected -= entropies(p.mean(axis=0, keepdims=True))[0] if method == "information" else 0
        assert choice.scores[lam] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert choice.lam == min(lams, key=lambda lam: choice.scores[lam])
    assert len(choice.weights) == 0
    assert choice.n_clips == 6
    assert_same_state(snapshot(own.model), before)


@pytest.mark.parametrize("method", ["dawin", "entropy", "information"])
def test_equal_models_have_no_preference(method: Any) -> None:
    twin = {name: value.clone() for name, value in BASE.items()}
    assert choose_lambda(classifier(), BASE, twin, CLIPS, method).lam == 0.5


@pytest.mark.parametrize("method", ["dawin", "information"])
def test_the_size_of_the_batches_and_the_labels_do_not_count(method: Any) -> None:
    joint = torch.cat(CLIPS)
    results = [
        choose_lambda(classifier(), BASE, TUNED, loader, method, lams=(0.0, 0.5, 1.0))
        for loader in (
            [(joint, torch.zeros(6))],
            [(video,) for video in joint.split(1)],
            [[video, "no label"] for video in joint.split(4)],
            iter(joint.split(2)),
        )
    ]
    for result in results[1:]:
        assert result.lam == pytest.approx(results[0].lam, rel=1e-5)
        for lam, values in result.entropies.items():
            torch.testing.assert_close(values, results[0].entropies[lam], rtol=1e-4, atol=1e-6)


def test_clips_that_cannot_be_read_are_left_out() -> None:
    video = torch.cat([CLIPS[0], torch.full_like(CLIPS[0][:1], float("nan"))])
    batch = sample(video, ["", "", "", "broken"])
    expected = choose_lambda(classifier(), BASE, TUNED, CLIPS[:1])
    choice = choose_lambda(classifier(), BASE, TUNED, [batch])
    assert choice.n_clips == 3
    assert choice.lam == pytest.approx(expected.lam)
    with pytest.raises(EvaluationError, match="no clips that can be read"):
        choose_lambda(classifier(), BASE, TUNED, [sample(video[3:], ["broken"])])


def sample(video: Tensor, errors: list[str]) -> VideoSample:
    values: dict[str, Any] = dict.fromkeys(VideoSample._fields)
    values |= {"video": video, "error": errors}
    return VideoSample(**values)


def test_the_logits_of_views_are_averaged() -> None:
    views = torch.stack([CLIPS[0], CLIPS[0]], dim=1)
    once = choose_lambda(classifier(), BASE, TUNED, CLIPS[:1])
    twice = choose_lambda(classifier(), BASE, TUNED, [views])
    torch.testing.assert_close(twice.weights, once.weights, rtol=1e-5, atol=1e-7)


def test_mixed_logits_equal_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=generator).unbind()
    weights = dawin_weights(a, b)
    expected = weights.numpy()[:, None] * b.numpy() + (1 - weights.numpy()[:, None]) * a.numpy()
    np.testing.assert_allclose(mix_logits(a, b), expected, rtol=1e-6)
    assert torch.equal(mix_logits(a, b, torch.ones(5)), b)
    assert torch.equal(mix_logits(a, b, torch.zeros(5)), a)


def test_the_accuracy_of_mixed_logits_is_that_of_both_models_by_hand() -> None:
    label = torch.tensor([0, 3, 2])
    loader = [(video, label) for video in CLIPS]
    own = classifier()
    before = snapshot(own.model)
    result = evaluate_mixed(own, BASE, TUNED, loader)
    assert_same_state(snapshot(own.model), before)
    with np.errstate(divide="ignore"):
        a, b = np.log(chances(1.0)), np.log(chances(0.0))
    weights = dawin_by_hand()[:, None]
    assert result.predictions.tolist() == (weights * b + (1 - weights) * a).argmax(axis=1).tolist()
    assert result.targets.tolist() == [0, 3, 2, 0, 3, 2]
    alone = evaluate_mixed(own, BASE, {n: v.clone() for n, v in BASE.items()}, loader)
    assert torch.equal(alone.ranks, evaluate(own, loader).ranks)


def test_bad_input_is_refused_and_the_model_stays() -> None:
    own = classifier()
    before = snapshot(own.model)
    with pytest.raises(UsageError, match="method='magic': expected 'dawin' or 'entropy'"):
        choose_lambda(own, BASE, TUNED, CLIPS, "magic")  # type: ignore[arg-type]
    for lams in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(LambdaError, match=r"within \[0, 1\]"):
            choose_lambda(own, BASE, TUNED, CLIPS, "entropy", lams=lams)
    for empty in ([], iter(())):
        with pytest.raises(EvaluationError, match="The loader gave no clips"):
            choose_lambda(own, BASE, TUNED, empty)
    broken = CLIPS[0].clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="The logits are NaN or infinite"):
        choose_lambda(own, BASE, TUNED, [broken])
    with pytest.raises(EvaluationError, match="at least two classes"):
        choose_lambda(classifier(["red"]), BASE, TUNED, CLIPS)
    for batch in ({"video": CLIPS[0]}, "clip.mp4", (1, 2)):
        with pytest.raises(UsageError, match=f"returned a {type(batch).__name__}; expected a tens"):
            choose_lambda(own, BASE, TUNED, [batch])
    for wrong in (own.model, torch.nn.DataParallel(own)):
        with pytest.raises(UsageError, match=f"{type(wrong).__name__} has no attribute 'model'"):
            choose_lambda(wrong, BASE, TUNED, CLIPS)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="share the memory"):
        choose_lambda(own, own.model.state_dict(), own.model.state_dict(), CLIPS)
    with pytest.raises(UsageError, match=r"expected \[N, K\] twice"):
        dawin_weights(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match=r"expected \[N\] and twice \[N, K\]"):
        mix_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    assert_same_state(snapshot(own.model), before)
    assert tuple(number / 10 for number in range(11)) == CHOICE_LAMBDAS


def test_padded_clips_are_refused() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    batch = PaddedSamples(CLIPS[0][:2], torch.zeros(2), torch.arange(2), ["", ""], mask)
    with pytest.raises(VideoShapeError, match="clips of different lengths, which are padded"):
        choose_lambda(classifier(), BASE, TUNED, [batch])
