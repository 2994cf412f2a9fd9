"""Paired t-tests, Holm's correction and power, against simulation and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.shapes.trials.statistics import (
    cells_needed,
    holm,
    p_value,
    power,
    smallest_difference,
    upper_tail,
)


@given(t=st.floats(0, 60))
def test_the_tail_of_student_is_that_of_the_closed_forms(t: float) -> None:
    """For 1, 2 and 4 degrees of freedom the distribution has a closed form."""
    root = math.sqrt(2 + t * t)
    assert upper_tail(t, 2) == pytest.approx(0.5 * (1 - t / root), rel=1e-5, abs=1e-12)
    assert upper_tail(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-5)
    y = t / math.sqrt(4 + t * t)
    assert upper_tail(t, 4) == pytest.approx(0.5 - 0.75 * y * (1 - y * y / 3), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("df", [1, 3, 19, 200])
def test_the_tail_is_symmetric_and_grows_with_the_shift(df: int) -> None:
    assert upper_tail(-1.3, df) == pytest.approx(1 - upper_tail(1.3, df), abs=1e-4)
    tails = [upper_tail(2.0, df, shift) for shift in (0.0, 1.0, 3.0, 9.0)]
    assert tails == sorted(tails)


@pytest.mark.parametrize(
    ("cells", "deviation", "level"), [(3, 1.0, 0.05), (16, 1.2, 0.05 / 80), (20, 2.0, 0.01)]
)
def test_the_power_is_that_of_a_simulation(cells: int, deviation: float, level: float) -> None:
    rng = np.random.default_rng(cells)
    draws = rng.normal(1.5, deviation, (4000, cells))
    ps = [p_value(row) for row in draws[:1500]]
    clear = np.mean([p < level and row.mean() > 0 for p, row in zip(ps, draws, strict=False)])
    assert clear == pytest.approx(power(cells, deviation, 1.5, level), abs=0.04)


def test_the_p_value_is_uniform_if_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    ps = np.array([p_value(row) for row in rng.normal(0, 3, (1500, 5))])
    for level in (0.05, 0.3, 0.7):
        assert (ps < level).mean() == pytest.approx(level, abs=0.035)


def test_the_p_value_of_special_differences() -> None:
    assert p_value([]) == p_value([0.2]) == 1
    assert p_value([0.0, 0.0]) == p_value([0.1, 0.1]) == p_value([0.1, 0.1 + 1e-17]) == 1
    assert p_value([0.0, 0.0, 0.0]) == 1
    assert p_value([0.1, 0.1, 0.1]) == 0
    assert p_value([1.0, 2.0, 4.0]) == p_value([-4.0, -2.0, -1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_closed_test_rejects(ps: list[float], level: float) -> None:
    """The closure of Bonferroni's test: all sets of hypotheses with this one must be rejected."""
    corrected = holm(ps)
    for index, p in enumerate(corrected):
        sets = (
            chosen
            for size in range(1, len(ps) + 1)
            for chosen in itertools.combinations(range(len(ps)), size)
            if index in chosen
        )
        limit = max(min(1.0, len(chosen) * min(ps[i] for i in chosen)) for chosen in sets)
        assert p == pytest.approx(limit)
        assert (p < level) == (limit < level) or p == pytest.approx(level)


def test_the_number_of_cells_is_the_first_with_the_wanted_power() -> None:
    for deviation, level in ((1.0, 0.05), (1.2, 0.05 / 96)):
        cells = cells_needed(deviation, 1.5, level)
        assert cells is not None
        assert power(cells, deviation, 1.5, level) >= 0.9 > power(cells - 1, deviation, 1.5, level)
        assert smallest_difference(cells, deviation, level) <= 1.5
        assert smallest_difference(cells - 1, deviation, level) > 1.5
    assert cells_needed(100.0, 0.1, 0.05) is None
    assert cells_needed(1e-9, 1.0, 0.05) == 2
