"""AUROC, accuracy over coverage and calibration error equal slow loops, and hold their laws."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openvclip.errors import EvaluationError
from openvclip.evaluation import accuracy_coverage, auroc, expected_calibration_error

# Few different scores, so that most examples have ties.
clips = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12)
both = clips.filter(lambda rows: len({flag for _, flag in rows}) == 2)


def tensors(rows: list[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
    scores, flags = zip(*rows, strict=True)
    return torch.tensor(scores) / 7, torch.tensor(flags)


def slow_auroc(scores: list[float], positive: list[bool]) -> float:
    pairs = list(zip(scores, positive, strict=True))
    wins = [
        1.0 if first > second else 0.5 if first == second else 0.0
        for first, is_positive in pairs
        for second, is_negative in pairs
        if is_positive and not is_negative
    ]
    return sum(wins) / len(wins)


@given(both)
def test_auroc_equals_counting_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, positive = tensors(rows)
    value = auroc(scores, positive)
    assert value == pytest.approx(slow_auroc(scores.tolist(), positive.tolist()), abs=1e-12)
    # Laws: only the order counts; the opposite score and the opposite groups mirror the value.
    assert auroc(scores.exp() * 100, positive) == value
    assert auroc(-scores, positive) == pytest.approx(1 - value, abs=1e-12)
    assert auroc(scores, ~positive) == pytest.approx(1 - value, abs=1e-12)


def test_auroc_of_known_scores() -> None:
    positive = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([3.0, 2.0, 1.0, 0.0]), positive) == 1
    assert auroc(torch.tensor([1.0, 1.0, 1.0, 1.0]), positive) == 0.5
    # float32 would round these scores of a million clips to one value in sums.
    scores = torch.arange(1_000_000)
    assert auroc(scores, scores % 2 == 0) == pytest.approx(0.5 - 0.5 / 500_000, abs=1e-12)


@given(clips)
def test_coverage_equals_a_slow_loop(rows: list[tuple[int, bool]]) -> None:
    scores, correct = tensors(rows)
    curve = accuracy_coverage(scores, correct)
    assert curve.thresholds.tolist() == sorted(set(scores.double().tolist()), reverse=True)
    for threshold, coverage, accuracy in zip(
        curve.thresholds, curve.coverage, curve.accuracy, strict=True
    ):
        answered = [
            right for score, right in zip(scores, correct, strict=True) if score >= threshold
        ]
        assert float(coverage) == pytest.approx(len(answered) / len(rows))
        assert float(accuracy) == pytest.approx(sum(map(bool, answered)) / len(answered))
        assert curve.accuracy_at(float(coverage)) == float(accuracy)
    assert float(curve.accuracy[-1]) == curve.accuracy_at(1) == float(correct.double().mean())
    assert curve.accuracy_at(0) == float(curve.accuracy[0])


@given(clips.filter(lambda rows: len(rows) <= 5))
def test_area_is_the_mean_over_all_orders_of_equal_scores(rows: list[tuple[int, bool]]) -> None:
    areas = []
    for order in itertools.permutations(rows):
        ranked = sorted(order, key=lambda row: -row[0])  # stable: ties stay in their order
        wrong = list(itertools.accumulate(not flag for _, flag in ranked))
        areas.append(sum(w / n for n, w in enumerate(wrong, start=1)) / len(rows))
    assert accuracy_coverage(*tensors(rows)).aurc == pytest.approx(sum(areas) / len(areas))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 20),
)
def test_calibration_error_equals_a_slow_loop(rows: list[tuple[float, bool]], bins: int) -> None:
    probabilities = torch.tensor([p for p, _ in rows], dtype=torch.float64)
    correct = torch.tensor([flag for _, flag in rows])
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).tolist()
    total = 0.0
    for i in range(bins):
        inside = [
            (p, flag) for p, flag in rows if edges[i] < p <= edges[i + 1] or (i == 0 and p == 0)
        ]
        if inside:
            accuracy = sum(flag for _, flag in inside) / len(inside)
            mean = sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - mean)
    value = expected_calibration_error(probabilities, correct, bins=bins)
    assert value == pytest.approx(total, abs=1e-12)
    # A bin can only add errors of opposite signs, so one bin is a lower bound.
    assert value >= expected_calibration_error(probabilities, correct, bins=1) - 1e-12


def test_calibration_error_of_known_probabilities() -> None:
    correct = torch.tensor([True] * 8 + [False] * 2)
    assert expected_calibration_error(torch.full((10,), 0.8), correct) == pytest.approx(0, abs=1e-7)
    assert expected_calibration_error(torch.ones(10), correct) == pytest.approx(0.2)
    assert expected_calibration_error(torch.tensor([1 + 1e-7]), torch.tensor([True])) < 1e-6


@pytest.mark.parametrize("metric", [auroc, accuracy_coverage, expected_calibration_error])
def test_wrong_input(metric: object) -> None:
    assert callable(metric)
    flags = torch.tensor([True, False])
    with pytest.raises(EvaluationError, match=r"shape \[2\] for values of shape \[3\]"):
        metric(torch.zeros(3), flags)
    with pytest.raises(EvaluationError, match=r"shape \[1, 2\] .* expected \[N\]"):
        metric(torch.zeros(1, 2), flags[None])
    with pytest.raises(EvaluationError, match="There are no clips"):
        metric(torch.zeros(0), flags[:0])
    with pytest.raises(EvaluationError, match="1 of 2 values are NaN"):
        metric(torch.tensor([0.5, float("nan")]), flags)
    with pytest.raises(EvaluationError, match="other values than 0 and 1"):
        metric(torch.zeros(2), torch.tensor([1, 2]))


def test_more_wrong_input() -> None:
    with pytest.raises(EvaluationError, match="2 clips are positive and 0 are negative"):
        auroc(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(EvaluationError, match="between 0 and 3; expected values from 0 to 1"):
        expected_calibration_error(torch.tensor([0.0, 3.0]), torch.tensor([True, False]))
    with pytest.raises(EvaluationError, match="bins=0"):
        expected_calibration_error(torch.zeros(1), torch.tensor([True]), bins=0)
    with pytest.raises(EvaluationError, match="coverage=2: expected a share"):
        accuracy_coverage(torch.zeros(1), torch.tensor([True])).accuracy_at(2)
