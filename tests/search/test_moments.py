"""Moments against a slow loop over all windows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvclip.search import moments as moments_module
from openvclip.search import scoring
from openvclip.search.moments import find_moments
from openvclip.search.scoring import unit_vectors
from tests.search.reference import Library, Rows, slow_moments

WIDTH = 4


def library_of(
    vectors: np.ndarray,
    counts: list[int],
    *,
    cuts: list[int],
    removed: set[int],
    step: float,
    last: float,
) -> Library:
    """Videos with windows of 2 seconds; the rows are divided into blocks and lie in any order."""
    video = np.repeat(np.arange(len(counts)), counts)
    start = np.concatenate([np.arange(count) * step for count in counts])
    # The last window of a video is shorter.
    is_last = np.concatenate([np.arange(count) == count - 1 for count in counts])
    end = start + np.where(is_last, last, 2.0)
    order = np.random.default_rng(len(vectors)).permutation(len(vectors))
    video, start, end = video[order].astype(np.int32), start[order], end[order]
    video[np.isin(video, list(removed))] = -1
    rows = unit_vectors(vectors).astype(np.float16) if len(vectors) else vectors
    edges = [0, *sorted({min(cut, len(rows)) for cut in cuts}), len(rows)]
    blocks = []
    for first, end_row in pairwise(edges):
        live = video[first:end_row] >= 0
        blocks.append(Rows(first, rows[first:end_row], None if live.all() else live))
    # Paths that are not in the order of their numbers.
    paths = [f"{(7 * i) % 11:02d}-{i}.mp4" for i in range(len(counts))]
    return Library(blocks, paths, video, start, end)


@st.composite
def libraries(draw: st.DrawFn) -> tuple[Library, np.ndarray]:
    """A library with many equal scores, and a query with negative vectors."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    # Few different vectors, so that ties are the rule.
    choices = np.random.default_rng(draw(st.integers(0, 50))).normal(size=(5, WIDTH))
    chosen = draw(st.lists(st.integers(0, 4), min_size=sum(counts), max_size=sum(counts)))
    noise = draw(st.sampled_from([0.0, 0.0, 0.1]))
    vectors = choices[chosen] + noise * np.random.default_rng(1).normal(size=(len(chosen), WIDTH))
    library = library_of(
        vectors,
        counts,
        cuts=draw(st.lists(st.integers(0, 40), max_size=2)),
        removed=draw(st.sets(st.integers(0, 5), max_size=2)),
        step=draw(st.sampled_from([0.5, 1.0, 2.0])),
        last=draw(st.sampled_from([1.25, 0.0005])),
    )
    query = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
    return library, unit_vectors(choices[query] + 0.01)


@pytest.mark.parametrize("half", [True, False])
@settings(max_examples=15, deadline=None)
@given(case=libraries(), k=st.integers(1, 20))
def test_moments_are_those_of_a_loop_over_all_windows(
    half: bool, case: tuple[Library, np.ndarray], k: int
) -> None:
    library, query = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_is_half_fast", lambda several: half)
        patch.setattr(moments_module, "_FIRST", 1)
        patch.setattr(moments_module, "_BUCKETS", 2)
        expected = slow_moments(library, query)
        (found,) = find_moments(library, [query], k)
        assert found == expected[:k]
        if expected:
            limit = expected[len(expected) // 2].score
            (found,) = find_moments(library, [query], k, min_score=limit)
            assert found == slow_moments(library, query, limit)[:k]


@pytest.mark.parametrize("half", [True, False])
def test_a_negative_query_that_is_nearly_the_query(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact scores decide, also if the scores in half precision are in the other order."""
    monkeypatch.setattr(scoring, "_is_half_fast", lambda several: half)
    numbers = np.random.default_rng(3)
    library = library_of(
        numbers.normal(size=(200, WIDTH)), [5] * 40, cuts=[], removed=set(), step=2.0, last=2.0
    )
    query = numbers.normal(size=WIDTH)
    vectors = unit_vectors([query, query + 1e-4 * numbers.normal(size=WIDTH)])
    (found,) = find_moments(library, [vectors], 200)
    assert found == slow_moments(library, vectors)
    assert 0 < len(found) < 200
