"""Weights that are overwritten for a block are restored, also if their memory changes inside it.

``fully_shard`` can replace the local tensor of a parameter in the first forward pass. Here
``parameter.data = ...`` replaces the memory of a plain parameter in the same way, so the rule is
tested with every version of PyTorch and in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.evaluation import Mixture, sweep
from openvclip.weights.numerics import memory_of, overwriting
from tests.helpers import Net, assert_same_state, snapshot


def other_weights() -> dict[str, Tensor]:
    return {name: value + 1 for name, value in snapshot(Net(1)).items()}


def whole_state(model: nn.Module) -> AbstractContextManager[Any]:
    @contextmanager
    def block() -> Iterator[None]:
        live = list(model.state_dict(keep_vars=True).values())
        with overwriting(live):
            for value, other in zip(live, other_weights().values(), strict=True):
                value.detach().copy_(other)
            yield

    return block()


def interpolated(model: nn.Module, **settings: Any) -> AbstractContextManager[Any]:
    return InterpolatedWeightRegularizer(
        model, anchor=other_weights(), interval=(0.5, 0.5), **settings
    ).interpolated()


def interpolated_on_the_cpu(model: nn.Module) -> AbstractContextManager[Any]:
    return interpolated(model, anchor_device="cpu")


def average(model: nn.Module) -> AbstractContextManager[Any]:
    tracker, trained = SWATracker(model), snapshot(model)
    model.load_state_dict(other_weights())
    tracker.update(model)
    model.load_state_dict(trained)
    return tracker.applied(model)


def mixture(model: nn.Module) -> AbstractContextManager[Any]:
    return Mixture(other_weights()).setters(model)


BLOCKS = [whole_state, interpolated, interpolated_on_the_cpu, average, mixture]


def move_to_new_memory(model: nn.Module) -> list[Tensor]:
    """Return the old tensors. Their memory is not used again as long as they are kept."""
    old = []
    for value in model.state_dict(keep_vars=True).values():
        old.append(value.data)
        value.data = value.data.clone()
    return old


@pytest.mark.parametrize("block", BLOCKS)
def test_weights_are_restored_where_they_are_after_the_block(
    block: Callable[[nn.Module], AbstractContextManager[Any]],
) -> None:
    model = Net()
    before, parameters = snapshot(model), list(model.parameters())
    memory = {memory_of(value) for value in model.state_dict().values()}
    manager = block(model)
    assert_same_state(model.state_dict(), before)
    with manager:
        inside = snapshot(model)
        assert not torch.equal(inside["head.weight"], before["head.weight"])
        old = move_to_new_memory(model)
        assert_same_state(model.state_dict(), inside)
    assert_same_state(model.state_dict(), before)
    assert memory == {memory_of(value) for value in old}
    assert memory.isdisjoint(memory_of(value) for value in model.state_dict().values())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


class Moving(nn.Module):
    """A classifier whose first call moves the weights of its model to new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)
        self.calls = 0
        self.old: list[Tensor] = []

    def forward(self, video: Tensor) -> Tensor:
        if self.calls == 0:
            self.old = move_to_new_memory(self.model)
        self.calls += 1
        logits = self.model(video.flatten(1)[:, :3])
        return cast(Tensor, logits)


def test_a_sweep_restores_weights_that_the_first_batch_moves() -> None:
    torch.manual_seed(0)
    classifier = Moving()
    before = snapshot(classifier.model)
    original = {name: value + 1 for name, value in before.items()}
    loader = [(torch.rand(2, 3, 2, 4, 4), torch.tensor([0, 1]))]
    sweep(classifier, original, before, loader, lams=[0.3, 0.6], progress=False)
    assert classifier.calls == 2
    assert_same_state(classifier.model.state_dict(), before)
