"""Accuracy of a classifier on a loader equals counts by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip.errors import EvaluationError, NonFiniteWeightsError, UsageError, VideoShapeError
from openvclip.evaluation import NO_RANK, evaluate, score
from openvclip.video import PaddedSamples, VideoSample


class Lookup(nn.Module):
    """A classifier whose logits are the first K values of a clip."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)
        self.k = k

    def forward(self, video: Tensor) -> Tensor:
        return self.scale * self.dropout(video.flatten(1)[:, : self.k])


def _clips(logits: Tensor) -> Tensor:
    """Videos [N, T, 3, 2, 2] (any leading axes) whose first values are the logits."""
    video = torch.zeros(*logits.shape[:-1], 2, 3, 2, 2)
    video.flatten(-4)[..., : logits.shape[-1]] = logits
    return video


@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10_000), st.integers(1, 5))
def test_top_k_equals_counting_by_hand(n: int, k: int, seed: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator)
    labels = torch.randint(k, (n,), generator=generator)
    batches = [(_clips(logits[i : i + batch]), labels[i : i + batch]) for i in range(0, n, batch)]
    result = evaluate(Lookup(k), batches, progress=False)
    for top in range(1, k + 1):
        right = 0
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            best = sorted(range(k), key=lambda c: row[c], reverse=True)[:top]
            right += label in best
        assert result.top(top) == pytest.approx(right / n)
    assert result.n_clips == n
    assert result.top1 == result.top(1)
    assert result.predictions.tolist() == logits.argmax(1).tolist()


def test_views_are_summed_as_logits() -> None:
    logits = torch.tensor([[[5.0, 0.0, 1.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0]]])  # [1, V=3, K=3]
    result = evaluate(Lookup(3), [(_clips(logits), torch.tensor([1]))], progress=False)
    assert result.predictions.tolist() == [1]  # sums 5, 8, 1; the first view alone says 0


def test_ties_and_nan_count_against_the_classifier() -> None:
    nan = float("nan")
    logits = torch.tensor([[0.0, 0.0], [nan, nan], [nan, 1.0], [2.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])
    result = score(logits, labels)
    assert result.ranks.tolist() == [1, NO_RANK, NO_RANK, 0]
    assert result.top1 == 0.25
    assert result.predictions.tolist()[1:] == [-1, -1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    # Report 12 (openai/CLIP#222): the accuracy was 0.0, without a word.
    batch = (_clips(torch.tensor([[1.0, 2.0], [value, 0.0]])), torch.tensor([1, 0]))
    with pytest.raises(EvaluationError, match="although all weights are finite"):
        evaluate(Lookup(2), [batch], progress=False)
    broken = Lookup(2)
    broken.scale.data.fill_(value)
    batch = (_clips(torch.tensor([[1.0, 2.0]])), torch.tensor([1]))
    with pytest.raises(NonFiniteWeightsError, match=r"entries of the weights \(1\): scale"):
        evaluate(broken, [batch], progress=False)
    # A clip that could not be read gives no error, and neither does a class that is ruled out.
    sample = VideoSample(_clips(torch.tensor([[value, 0.0]])), *(torch.tensor([0]),) * 2, ["gone"])
    assert evaluate(Lookup(2), [sample], progress=False).predictions.tolist() == [-1]
    ruled_out = (_clips(torch.tensor([[float("-inf"), 0.0]])), torch.tensor([1]))
    assert evaluate(Lookup(2), [ruled_out], progress=False).top1 == 1


def test_clips_that_could_not_be_read_count_as_wrong() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    videos, labels = _clips(logits), torch.tensor([0, 0])
    sample = VideoSample(videos, labels, torch.tensor([0, 1]), ["", "truncated"])
    result = evaluate(Lookup(2), [sample], progress=False)
    assert (result.top1, result.predictions.tolist()) == (0.5, [0, -1])
    for more in ([["a", "b"]], [["a", "b"], ["c", "d"]]):  # a loader may yield more values
        assert evaluate(Lookup(2), [(videos, labels, *more)], progress=False).top1 == 1


def test_evaluates_in_eval_mode_without_graph_and_restores_modes() -> None:
    classifier = Lookup(3).train()
    logits = torch.eye(3)
    with torch.enable_grad():
        result = evaluate(classifier, [(_clips(logits), torch.arange(3))], progress=False)
    assert result.top1 == 1.0  # dropout of 0.9 would have destroyed it
    assert classifier.training
    assert classifier.dropout.training


def test_modes_are_restored_after_an_exception() -> None:
    classifier = Lookup(3).train()
    with pytest.raises(VideoShapeError, match=r"\[2, 3, 4\]; expected"):
        evaluate(classifier, [(torch.zeros(2, 3, 4), torch.zeros(2))], progress=False)
    assert classifier.training


def test_empty_loader() -> None:
    result = evaluate(Lookup(2), [], progress=False)
    assert result.n_clips == 0
    assert result.top1 != result.top1  # NaN


def test_no_answer_is_wrong_at_every_k_and_in_no_cell() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, float("nan")], [3.0, 1.0]])
    result = score(logits, torch.tensor([0, 0, 1]))
    assert [result.top(k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert result.confusion(2).tolist() == [[1, 0], [1, 0]]
    assert result.per_class(3).tolist()[:2] == [0.5, 0.0]
    assert result.per_class(3)[2].isnan()


def test_views_in_half_precision_are_summed_in_float32() -> None:
    """Three logits near 25 are exact in bfloat16, but their sum is not: the classes would tie."""
    logits = torch.tensor([[[25.0, 25.125], [25.0, 25.125], [25.125, 25.0]]])
    result = evaluate(Lookup(2).bfloat16(), [(_clips(logits).bfloat16(), torch.tensor([1]))])
    assert result.top1 == 1.0


def test_the_tensor_that_a_classifier_returns_is_not_changed() -> None:
    class Stored(Lookup):
        @torch.inference_mode()
        def forward(self, video: Tensor) -> Tensor:
            self.given = video.flatten(1)[:, : self.k].clone()
            return self.given

    stored = Stored(2)
    batch = VideoSample(
        _clips(torch.tensor([[1.0, 2.0], [3.0, 0.0]])),
        torch.tensor([1, 0]),
        torch.arange(2),
        ["", "truncated"],
    )
    assert evaluate(stored, [batch], progress=False).ranks.tolist() == [0, NO_RANK]
    assert stored.given.tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_padded_clips_are_refused_and_padded_batches_without_padding_are_not() -> None:
    clips, label = _clips(torch.tensor([[1.0, 2.0], [3.0, 0.0]])), torch.tensor([1, 0])
    mask = torch.ones(2, 2, dtype=torch.bool)
    errors = ["", "truncated"]
    batch = PaddedSamples(clips, label, torch.arange(2), errors, mask)
    assert evaluate(Lookup(2), [batch], progress=False).ranks.tolist() == [0, NO_RANK]
    mask[1, 1] = False
    with pytest.raises(VideoShapeError, match="clips of different lengths, which are padded"):
        evaluate(Lookup(2), [batch], progress=False)


@pytest.mark.parametrize(
    "batch", [{"video": torch.zeros(1)}, torch.zeros(2, 3), [torch.zeros(2)], (torch.zeros(2), [1])]
)
def test_batches_of_another_kind_are_refused(batch: object) -> None:
    with pytest.raises(UsageError, match=r"expected a tuple or list \(video, label\)"):
        evaluate(Lookup(2), [batch], progress=False)  # type: ignore[list-item]
