"""The recipe as numbers: the learning rate over a run."""

from __future__ import annotations

import dataclasses

import pytest

from openvclip.training.recipe import Recipe, learning_rate
from tests.examples.finetune_reference import TINY


def test_the_rate_begins_and_ends_where_it_is_told_to() -> None:
    recipe = dataclasses.replace(TINY, warmup_start_lr=0.5, lr=1.0, end_lr=0.25)
    rates = [learning_rate(step, 2, 6, recipe) for step in range(6)]
    assert rates == pytest.approx([0.5, 0.75, 1.0, 0.8125, 0.4375, 0.25])


def test_learning_rate_has_the_recipes_landmarks() -> None:
    recipe = Recipe()
    rates = [learning_rate(step, 20, 220, recipe) for step in range(220)]
    assert rates[0] == pytest.approx(3.33e-8)
    assert max(rates) == rates[20] == pytest.approx(3.33e-6)
    assert rates[-1] == pytest.approx(3.33e-8)
    assert rates[10] == pytest.approx((3.33e-6 + 3.33e-8) / 2)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
