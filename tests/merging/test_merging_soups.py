"""Uniform and greedy soups equal the recipe of the paper, and obey their laws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openvclip.errors import MergeError, StateMismatchError, WeightTypeError
from openvclip.merging import average, greedy_soup
from openvclip.weights import Adapter, LowRank
from tests.helpers import assert_same_state


def model(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=dtype), "n": torch.tensor(int(values[0]))}


def recipe(models: list[list[float]], target: list[float]) -> tuple[list[int], list[float]]:
    def mean(chosen: list[int]) -> list[float]:
        return [sum(models[i][k] for i in chosen) / len(chosen) for k in range(len(target))]

    def accuracy(point: list[float]) -> float:
        return -sum((x - y) ** 2 for x, y in zip(point, target, strict=True))

    order = sorted(range(len(models)), key=lambda i: accuracy(models[i]), reverse=True)
    chosen: list[int] = []
    for i in order:
        if not chosen or accuracy(mean([*chosen, i])) >= accuracy(mean(chosen)):
            chosen.append(i)
    return chosen, mean(chosen)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-8, 8), min_size=2, max_size=2), min_size=1, max_size=6))
def test_greedy_soup_follows_the_recipe(points: list[list[int]]) -> None:
    values = [[float(x) for x in point] for point in points]
    target = torch.tensor([1.25, -0.5], dtype=torch.float64)
    calls: list[int] = []

    def evaluate(weights: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        return -(weights["w"].double() - target).square().sum()

    models = [model(*point, dtype=torch.float64) for point in values]
    soup = greedy_soup(models, evaluate)
    chosen, mean = recipe(values, target.tolist())
    assert list(soup.ingredients) == chosen
    torch.testing.assert_close(soup.weights["w"], torch.tensor(mean).double())
    assert soup.score == evaluate(soup.weights).item()
    assert soup.score >= max(soup.scores)
    assert len(calls) == 2 * len(models) - 1 + 1
    assert soup.weights["n"].item() == points[chosen[0]][0]


def test_a_model_that_does_not_help_is_left_out() -> None:
    models = [model(0.0), model(4.0), model(3.0)]
    soup = greedy_soup(models, lambda weights: -abs(weights["w"].item() - 3.5))
    assert soup.ingredients == (1, 2)
    assert soup.weights["w"].item() == 3.5
    assert soup.scores == (-3.5, -0.5, -0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 9))
def test_a_soup_of_equal_models_is_bitwise_the_model(dtype: torch.dtype, seed: int, n: int) -> None:
    one = {"w": torch.randn(7, generator=torch.Generator().manual_seed(seed)).to(dtype)}
    assert_same_state(average([dict(one) for _ in range(n)]), one)
    soup = greedy_soup([dict(one) for _ in range(n)], lambda _: 0.5)
    assert soup.ingredients == tuple(range(n))
    assert_same_state(soup.weights, one)


def test_the_mean_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(200, generator=generator).bfloat16()} for _ in range(5)]
    exact = sum(m["w"].double() for m in models) / 5
    got = average(models)["w"]
    assert torch.equal(got, exact.bfloat16())
    naive = models[0]["w"].clone()
    for other in models[1:]:
        naive += other["w"]
    assert not torch.equal(naive / 5, got)
    assert average(models, dtype=torch.float64)["w"].dtype == torch.float64


def test_models_are_checked_before_they_are_evaluated() -> None:
    def never(_: object) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(StateMismatchError, match=r"models\[1\]"):
        greedy_soup([model(1.0), {"w": torch.zeros(1)}], never)
    with pytest.raises(MergeError, match="list of one or more"):
        greedy_soup([], never)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number(score: float) -> None:
    with pytest.raises(MergeError, match=r"models\[0\]; expected a finite number"):
        greedy_soup([model(1.0)], lambda _: score)


def test_an_adapter_belongs_to_the_first_model_of_a_mean_and_is_no_model_of_a_greedy_soup() -> None:
    adapter = Adapter({"w": LowRank(torch.ones(2, 1), torch.ones(1, 2))}, {})
    models: list[Any] = [{"w": torch.zeros(2, 2)}, adapter]
    assert torch.equal(average(models)["w"], torch.full((2, 2), 0.5))
    with pytest.raises(WeightTypeError, match=r"models\[1\] is an Adapter.*adapter\.merged"):
        greedy_soup(models, lambda _: 1.0)
