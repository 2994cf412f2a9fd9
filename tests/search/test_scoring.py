"""Scores against float64, in half precision and in float32."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from openvclip.errors import SearchError
from openvclip.search import scoring
from openvclip.search.scoring import approximate_scores, exact_scores, unit_vectors
from tests.search.reference import Rows


def random_units(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return unit_vectors(np.random.default_rng(seed).normal(size=(rows, width)))


def blocks_of(vectors: np.ndarray, *cuts: int) -> list[Rows]:
    edges = [0, *cuts, len(vectors)]
    return [Rows(a, vectors[a:b], None) for a, b in pairwise(edges)]


def in_float64(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("width", [3, 64, 768])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_approximate_scores_are_as_near_as_they_say(
    monkeypatch: pytest.MonkeyPatch, half: bool, width: int, group_bytes: int
) -> None:
    monkeypatch.setattr(scoring, "_is_half_fast", lambda several: half)
    monkeypatch.setattr(scoring, "_GROUP_BYTES", group_bytes)
    monkeypatch.setattr(scoring, "_CACHED_NUMBERS", 100 * width)
    vectors = random_units(1234, width).astype(np.float16)
    blocks = blocks_of(vectors, 400, 400, 900)
    # A query near a row has a score of nearly 1, where half precision is the coarsest.
    near = unit_vectors(vectors[:2].astype(np.float64))
    queries = [near, *(random_units(n, width, n) for n in (1, 3, 20))]
    found = list(approximate_scores(blocks, queries))
    assert len(found) == len(queries)
    for query, scores in zip(queries, found, strict=True):
        off = np.abs(scores.values - in_float64(vectors, query)).max(axis=1)
        assert (off <= scores.error).all()
        assert (scores.error < (2e-3 if half else 2e-4)).all()


def test_exact_scores_are_those_of_float64_and_equal_for_equal_vectors() -> None:
    vectors = random_units(300, 96).astype(np.float16)
    vectors[[7, 100, 250]] = vectors[7]
    query = unit_vectors(np.stack([vectors[7], vectors[8]]).astype(np.float64))
    rows = np.array([250, 7, 3, 100, 299])
    scores = exact_scores(blocks_of(vectors, 99), rows, query)
    np.testing.assert_allclose(scores, in_float64(vectors, query)[:, rows].clip(-1, 1), atol=1e-12)
    assert scores[0, 0] == scores[0, 1] == scores[0, 3]
    assert scores.max() <= 1.0


def test_rows_that_are_not_live_have_no_score() -> None:
    vectors = random_units(10, 8).astype(np.float16)
    live = np.arange(10) % 3 > 0
    (scores,) = approximate_scores([Rows(0, vectors, live)], [random_units(2, 8, 1)])
    assert (np.isneginf(scores.values) == ~live).all()


@pytest.mark.parametrize("kind", ["tensor", "mapped", "strided"])
def test_vectors_can_be_tensors_files_and_views(tmp_path: Path, kind: str) -> None:
    vectors = random_units(50, 16).astype(np.float16)
    stored: object = torch.from_numpy(vectors)
    if kind == "mapped":
        vectors.tofile(tmp_path / "v")
        stored = np.memmap(tmp_path / "v", np.float16, "r", shape=vectors.shape).view(np.ndarray)
    elif kind == "strided":
        stored = np.repeat(vectors, 2, axis=1)[:, ::2]
        stored.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of read-only memory
        (scores,) = approximate_scores([Rows(0, stored, None)], [random_units(1, 16, 1)])
    np.testing.assert_allclose(
        scores.values, in_float64(vectors, random_units(1, 16, 1)), atol=scores.error[0]
    )


@pytest.mark.parametrize("several", [True, False])
def test_the_choice_of_the_precision_depends_on_the_processor_alone(several: bool) -> None:
    assert isinstance(scoring._is_half_fast(several), bool)
    assert scoring._is_half_fast(several) == scoring._is_half_fast.__wrapped__(several)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([0.0, 0.0], "zero"),
        ([np.nan, 1.0], "NaN"),
        ([np.inf, 1.0], "infinite"),
        (["a"], "numbers"),
        ([[[1.0]]], r"shape \[1, 1, 1\]"),
        ([], "shape"),
    ],
)
def test_vectors_without_a_direction_are_errors(vector: object, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        unit_vectors(vector)


def test_a_query_of_another_length_is_an_error() -> None:
    blocks = blocks_of(random_units(3, 8).astype(np.float16))
    with pytest.raises(SearchError, match="have 8 numbers and the query has 4"):
        list(approximate_scores(blocks, [random_units(1, 4)]))


def test_few_vectors_are_multiplied_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds the scores of all rows for the vectors of one product."""
    sizes, multiply = list[int](), scoring._float_products

    def noted(rows: torch.Tensor, vectors: torch.Tensor, products: torch.Tensor) -> None:
        sizes.append(len(vectors))
        multiply(rows, vectors, products)

    monkeypatch.setattr(scoring, "_is_half_fast", lambda several: False)
    monkeypatch.setattr(scoring, "_float_products", noted)
    queries = [random_units(count, 8, seed=count) for count in (5, 5, 5, 5, 20, 1)]
    blocks = blocks_of(random_units(30, 8).astype(np.float16))
    found = list(approximate_scores(blocks, queries))
    assert sizes == [15, 5, 20, 1]
    assert [len(scores.values) for scores in found] == [5, 5, 5, 5, 20, 1]
