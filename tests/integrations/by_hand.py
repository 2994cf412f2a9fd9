"""A tiny network, its batches, and Equation 9 with averages as one plain loop of two models.

The reference uses neither a library's loop nor the regulariser, except for the values of alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from openvclip import InterpolatedWeightRegularizer
from tests.helpers import snapshot

Weights = dict[str, Tensor]
LR, STEPS, CLIP_NORM, BATCHES = 1e-2, 6, 0.5, 8


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def original(dtype: torch.dtype = torch.float64) -> Weights:
    return {name: 1.5 * value for name, value in snapshot(network(dtype)).items()}


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * BATCHES, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (2 * BATCHES,), generator=generator)
    return TensorDataset(x.to(dtype), y)


def loader(dtype: torch.dtype = torch.float64) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(data(dtype), batch_size=2)


def regularizer(model: nn.Module, **settings: Any) -> InterpolatedWeightRegularizer:
    dtype = next(model.parameters()).dtype
    return InterpolatedWeightRegularizer(model, anchor=original(dtype), **settings)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR)


def by_hand(
    accumulate: int = 1,
    every: int = 1,
    share: float = 1.0,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Weights, Weights]:
    """Return the weights after the steps, and their mean."""
    model, second, clip = network(dtype), network(dtype), original(dtype)
    probe = InterpolatedWeightRegularizer(network(), share=share)
    optimizer = adamw(model)
    batches = [tuple(batch) for batch in loader(dtype)] * 10
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with autocast():
            return cross_entropy(net(x), y) / accumulate

    for step in range(steps):
        optimizer.zero_grad()
        second.zero_grad()
        regularized = step % every == 0
        if regularized:
            with probe.interpolated() as alpha:
                pass
            now = snapshot(model)
            second.load_state_dict({n: torch.lerp(now[n], clip[n], alpha) for n in clip})
        for x, y in batches[accumulate * step : accumulate * (step + 1)]:
            loss(model, x, y).backward()
            if regularized:
                (0.5 * loss(second, *probe.part_of(x, y))).backward()
        for parameter, other in zip(model.parameters(), second.parameters(), strict=True):
            assert parameter.grad is not None
            if other.grad is not None:
                parameter.grad += other.grad
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        for name, parameter in model.named_parameters():
            total[name] += parameter.detach()
    return snapshot(model), {name: value / steps for name, value in total.items()}


def assert_close(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-9)
