"""Model, batches and an explicit Equation 9, which the checks in two processes share.

The reference is always the same training in one process, on the joined batches of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer
from openvclip.weights.shards import local

WORLD, STEPS, ALPHA, C = 2, 4, 0.35, 0.7
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """``[B, 5] -> [B, 3]``, with odd sizes, a layer that is used twice, and a frozen scalar."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh())
        self.again = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.head = nn.Linear(7, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(torch.tanh(self.again(self.body(x))))
        return self.head(torch.tanh(hidden)) * self.scale * self.temperature


def batch(step: int, part: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the joined batch of a step, or the part of one process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    return (x, y) if part is None else (x.chunk(WORLD)[part], y.chunk(WORLD)[part])


def loss_of(model: nn.Module, step: int, *, joint: bool = False) -> Tensor:
    x, y = batch(step, None if joint else distributed.get_rank())
    return functional.cross_entropy(model(x), y)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def by_hand(model: nn.Module, anchor: dict[str, Tensor], alpha: float, step: int) -> None:
    """Set the gradients of ``model`` to Equation 9 on the joined batch."""
    other = Net(0)
    theta = snapshot(model)
    other.load_state_dict({n: alpha * anchor[n] + (1 - alpha) * theta[n] for n in theta})
    model.zero_grad()
    loss_of(model, step, joint=True).backward()
    (C * loss_of(other, step, joint=True)).backward()
    for parameter, second in zip(model.parameters(), other.parameters(), strict=True):
        if parameter.grad is not None:
            parameter.grad += second.grad


def trained_by_hand(
    steps: int = STEPS, max_norm: float | None = None, every: int = 1
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Train in one process. Return the model, and its weights after each step."""
    model, anchor = Net(0), snapshot(Net(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    path = []
    for step in range(steps):
        if step % every == 0:
            by_hand(model, anchor, ALPHA, step)
        else:
            model.zero_grad()
            loss_of(model, step, joint=True).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        path.append(snapshot(model))
    return model, path


def mean(path: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(weights[name] for weights in path) / len(path) for name in path[0]}  # type: ignore[misc]


def regulariser(
    model: nn.Module, inner: nn.Module | None = None, **settings: Any
) -> InterpolatedWeightRegularizer:
    settings = {"interval": (ALPHA, ALPHA), "weight": C, "anchor": snapshot(Net(1))} | settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return InterpolatedWeightRegularizer(inner or model, optimizer, **settings)


def train(
    iwr: InterpolatedWeightRegularizer, model: nn.Module, steps: int = STEPS, **options: Any
) -> None:
    for step in range(steps):
        iwr.step(lambda step=step: loss_of(model, step), **options)  # type: ignore[misc]


def skips_where_one_overflows(model: nn.Module) -> None:
    """Check that an infinite loss in one process skips the step in both, for either pass."""
    iwr, scaler = regulariser(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [local(p).clone() for p in model.parameters()]
    for broken_call in (1, 2):
        calls = 0

        def closure(broken_call: int = broken_call) -> Tensor:
            nonlocal calls
            calls += 1
            broken = calls == broken_call and distributed.get_rank() == 1
            return loss_of(model, 0) * (torch.inf if broken else 1.0)

        iwr.step(closure, scaler=scaler)
        assert scaler.get_scale() == 1024.0 / 2**broken_call
        now = [local(p) for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    iwr.step(lambda: loss_of(model, 0), scaler=scaler)
    assert scaler.get_scale() == 256.0
    now = [local(p) for p in model.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def assert_close(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert {name.removeprefix("module.") for name in state} == expected.keys()
    for name, value in state.items():
        # Whole tensors of shards are gathered on the CPU.
        wanted = expected[name.removeprefix("module.")].cpu()
        torch.testing.assert_close(
            value.cpu(),
            wanted,
            rtol=1e-9,
            atol=1e-11,
            msg=lambda m: f"{name}{m}",  # noqa: B023
        )


def gathered(values: object) -> list[Any]:
    out: list[Any] = [None] * WORLD
    distributed.all_gather_object(out, values)
    return out
