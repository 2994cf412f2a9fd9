"""Recall, median and mean rank of retrieval equal slow loops, and the released numbers."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor

from openvclip.errors import EvaluationError
from openvclip.evaluation import dual_softmax, retrieval_metrics
from tests.helpers import GOLDEN

RELEASED: dict[str, Any] = json.loads((GOLDEN / "retrieval_metrics.json").read_text())
NAMES = ("R1", "R5", "R10", "MedianR", "MeanR")


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_numbers(name: str) -> None:
    similarities = load_file(str(GOLDEN / "retrieval_similarities.safetensors"))[name]
    if name.startswith("dual"):
        similarities = dual_softmax(similarities)
    metrics = retrieval_metrics(similarities, RELEASED[name].get("counts"))
    for direction in ("text_to_video", "video_to_text"):
        assert tuple(metrics[direction]) == NAMES
        for metric, value in metrics[direction].items():
            assert value == pytest.approx(RELEASED[name][direction][metric], abs=1e-9)


def rank(own: float, others: list[float]) -> int:
    """The rank of the right candidate: behind all others that are as similar."""
    return 1 + sum(other >= own for other in others)


def slow(similarities: Any, counts: list[int] | None) -> dict[str, dict[str, float]]:
    """Query by query, in float64."""
    matrix = [[float(value) for value in row] for row in similarities]
    videos = range(len(matrix[0]))
    owner = [video for video in videos for _ in range(counts[video] if counts else 1)]
    to_video = [
        rank(row[own], [row[v] for v in videos if v != own])
        for row, own in zip(matrix, owner, strict=True)
    ]

    def best(of: int, query: int) -> float:
        return max(row[query] for row, own in zip(matrix, owner, strict=True) if own == of)

    to_text = [rank(best(v, v), [best(w, v) for w in videos if w != v]) for v in videos]
    low = statistics.median_low if counts else statistics.median
    return {
        "text_to_video": summary(to_video, float(low(to_video))),
        "video_to_text": summary(to_text, float(statistics.median(to_text))),
    }


def summary(ranks: list[int], median: float) -> dict[str, float]:
    recalls = {f"R{k}": 100 * sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)}
    return {**recalls, "MedianR": median, "MeanR": sum(ranks) / len(ranks)}


def assert_equal(metrics: dict[str, dict[str, float]], expected: Any) -> None:
    for direction, values in expected.items():
        assert metrics[direction] == pytest.approx(values, rel=1e-6)


# Few different values, so that there are ties; minus infinity stands for a video without features.
VALUES = st.sampled_from([-math.inf, -1.5, 0.0, 0.25, 0.5, 7.0])
COUNTS = st.lists(st.integers(1, 4), min_size=1, max_size=7)


@given(st.integers(1, 14).flatmap(lambda n: arrays(np.float64, (n, n), elements=VALUES)))
def test_one_caption_for_each_video(similarities: np.ndarray[Any, Any]) -> None:
    assert_equal(retrieval_metrics(similarities), slow(similarities, None))
    swapped = retrieval_metrics(similarities.T)
    assert swapped["video_to_text"] == retrieval_metrics(similarities)["text_to_video"]


@given(st.data(), COUNTS)
def test_several_captions_of_a_video(data: Any, counts: list[int]) -> None:
    shape = (sum(counts), len(counts))
    similarities = data.draw(arrays(np.float64, shape, elements=VALUES))
    expected = slow(similarities, counts)
    assert_equal(retrieval_metrics(similarities, counts), expected)
    for other in (torch.tensor(counts), np.array(counts)):
        assert_equal(retrieval_metrics(torch.from_numpy(similarities), other), expected)


@pytest.mark.parametrize("counts", [None, [3, 2, 4]])
def test_a_model_that_finds_all_equal_finds_nothing(counts: list[int] | None) -> None:
    texts = 9 if counts is None else sum(counts)
    videos = 9 if counts is None else len(counts)
    metrics = retrieval_metrics(torch.ones(texts, videos), counts)
    for values in metrics.values():
        assert values["R1"] == 0
        assert values["MedianR"] == values["MeanR"] == videos


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_dual_softmax(texts: int, videos: int, seed: int) -> None:
    similarities = 20 * torch.randn(texts, videos, generator=torch.Generator().manual_seed(seed))
    exact = similarities.double()
    expected = torch.empty_like(exact)
    for video in range(videos):
        column = exact[:, video]
        weights = [math.exp(value - max(column)) for value in column]
        for text in range(texts):
            expected[text, video] = column[text] * weights[text] / sum(weights)
    torch.testing.assert_close(dual_softmax(similarities).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dual_softmax(exact), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64])
def test_dtypes_and_the_input_stays(dtype: torch.dtype) -> None:
    similarities = torch.randint(0, 50, (6, 6)).to(dtype)
    before = similarities.clone()
    assert retrieval_metrics(similarities) == retrieval_metrics(before.double())
    dual_softmax(similarities)
    assert torch.equal(similarities, before)


SQUARE = torch.eye(3)


@pytest.mark.parametrize(
    ("similarities", "counts", "message"),
    [
        (torch.tensor([[0.0, math.nan], [1.0, 2.0]]), None, "1 NaN, the first for text 0 and vid"),
        (torch.ones(3, 2), None, "expected as many texts as videos"),
        (torch.ones(3), None, r"float32 \[3\]; expected numbers \[texts, videos\]"),
        (torch.ones(0, 0), None, "at least one text and one video"),
        (torch.ones(2, 2, dtype=torch.complex64), None, "complex64"),
        (SQUARE, [1, 1], "has 2 videos and 2 captions; similarities has 3 videos and 3 texts"),
        (SQUARE, [1, 1, 2], "has 3 videos and 4 captions"),
        (SQUARE, [0, 1, 2], r"\[0, 1, 2\]; expected a whole number of at least 1"),
        (SQUARE, [1.0, 1.0, 1.0], "whole number"),
        (SQUARE, [[1, 1, 1]], "whole number"),
    ],
)
def test_what_is_refused(similarities: Tensor, counts: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        retrieval_metrics(similarities, counts)


def test_there_is_no_softmax_of_infinity_or_nan() -> None:
    with pytest.raises(EvaluationError, match="holds infinity, for which there is no softmax"):
        dual_softmax(torch.tensor([[0.0, -math.inf]]))
    with pytest.raises(EvaluationError, match="NaN"):
        dual_softmax(torch.tensor([[math.nan]]))
