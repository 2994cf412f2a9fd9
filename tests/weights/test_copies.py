"""Copies that a GPU hides behind its arithmetic: their order, their memory, the same bits.

A GPU is imitated by tests/weights/lanes.py, which finds each access that waits for no event.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import InterpolatedWeightRegularizer
from openvclip.weights import anchored
from openvclip.weights.copies import HiddenCopies, after_half, hidden_copies
from tests.benchmarks.hidden_copies import hidden_share
from tests.helpers import assert_same_state, snapshot
from tests.weights.lanes import Lanes, RaceError, Stream

GROUP = 100  # bytes, so the network has several groups


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [part for _ in range(6) for part in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(6, 2)).to(dtype)


def weight_bytes() -> int:
    return sum(p.nbytes for p in network().parameters())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that lets new regularisers use imitated streams."""

    def use(lanes: Lanes) -> Lanes:
        def copies(live: Any, device: Any, before: HiddenCopies | None) -> HiddenCopies:
            return HiddenCopies(lanes, GROUP) if before is None else before

        monkeypatch.setattr(anchored, "hidden_copies", copies)
        return lanes

    return use


def regulariser(model: nn.Module, **settings: Any) -> InterpolatedWeightRegularizer:
    return InterpolatedWeightRegularizer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        anchor=snapshot(network(1)),
        anchor_device="cpu",
        **settings,
    )


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def trained(model: nn.Module, steps: int = 4, **settings: Any) -> dict[str, Tensor]:
    iwr = regulariser(model, **settings)
    for step in range(steps):
        iwr.step(lambda step=step: loss_of(model, step))  # type: ignore[misc]
    return snapshot(model)


ROOMS = {"none": 0, "some": weight_bytes() // 2, "all": 2**40}


@pytest.mark.parametrize(
    ("room", "every", "dtype"),
    [
        ("none", 1, torch.float32),
        ("some", 1, torch.bfloat16),  # with an anchor in float32
        ("some", 3, torch.float32),
        ("all", 1, torch.float32),
        ("all", 3, torch.bfloat16),
    ],
)
def test_no_bit_changes_and_no_access_is_unordered(
    gpu: Any, room: str, every: int, dtype: torch.dtype
) -> None:
    expected = trained(network(dtype=dtype), every=every)
    lanes = gpu(Lanes(ROOMS[room]))
    with lanes:
        found = trained(network(dtype=dtype), every=every)
    assert_same_state(found, expected)
    assert lanes.early == []


# What each wait is for: without it, an access is unordered.
WAITS = {
    "the stash is written after the optimizer": ("d2h", "wait_stream", 2**40),
    "memory is used by a copy after earlier work in it": ("h2d", "wait_stream", 2**40),
    "the anchor is used after it has come": ("compute", "wait_event", 2**40),
    "the stash is read after it was written": ("compute", "wait_stream", 0),
}


@pytest.mark.parametrize("wait", WAITS)
def test_each_wait_is_needed(gpu: Any, monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    name, method, room = WAITS[wait]
    lanes, whole = gpu(Lanes(room)), getattr(Stream, method)

    def forgetful(self: Stream, other: Any) -> None:
        if self.name != name:
            whole(self, other)

    monkeypatch.setattr(Stream, method, forgetful)
    with pytest.raises(RaceError), lanes:
        trained(network())


def test_the_weights_on_their_way_to_the_cpu_keep_their_memory(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = gpu(Lanes())
    monkeypatch.setattr(Lanes, "keep", lambda *_: None)
    with lanes:
        trained(network(), 1)
    assert set(lanes.early) == {"d2h"}


def copies_of(log: list[tuple[str, str]], lane: str) -> list[int]:
    return [i for i, entry in enumerate(log) if entry == (lane, "_foreach_copy_")]


def test_with_memory_all_copies_to_the_device_begin_while_a_backward_pass_runs(gpu: Any) -> None:
    """After the first step, whose anchor nothing could fetch before."""
    model, lanes = network(), gpu(Lanes())
    iwr = regulariser(model)
    iwr.step(lambda: loss_of(model))
    lanes.log.clear()
    with lanes:
        iwr.step(lambda: loss_of(model))
    layers = [i for i, entry in enumerate(lanes.log) if entry == ("compute", "tanh_backward")]
    assert len(layers) == 12  # two passes of six layers
    groups = len(HiddenCopies(lanes, GROUP)._groups(dict(model.named_parameters())))
    assert groups > 4
    to_device = copies_of(lanes.log, "h2d")
    assert len(to_device) == 2 * groups
    # The weights come back in the second half of the first pass, the anchor in that of the second.
    for pass_, some in enumerate((to_device[:groups], to_device[groups:])):
        first, last = layers[6 * pass_], layers[6 * pass_ + 5]
        assert first < some[0]
        assert some[-1] < last
    to_host = copies_of(lanes.log, "d2h")
    assert len(to_host) == groups
    assert to_host[-1] < layers[0]


def test_without_memory_two_groups_at_a_time_are_on_the_device(gpu: Any) -> None:
    model, lanes = network(), gpu(Lanes(room=0))
    iwr, held = regulariser(model), list[int]()
    fetch = HiddenCopies._fetch

    def counted(self: HiddenCopies, store: Any, *others: Any) -> None:
        fetch(self, store, *others)
        held.append(sum(t.nbytes for tensors, _ in store.values() for t in tensors))

    with pytest.MonkeyPatch.context() as patch, lanes:
        patch.setattr(HiddenCopies, "_fetch", counted)
        for _ in range(3):
            iwr.step(lambda: loss_of(model))
    assert 0 < max(held) <= 2 * (GROUP + 6 * 6 * 4)


def test_a_device_without_enough_memory_is_no_error(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(network())
    lanes, calls, fetch = gpu(Lanes()), list[int](), HiddenCopies._fetch

    def failing(self: HiddenCopies, store: Any, *others: Any) -> None:
        calls.append(len(store))
        if len(store) == 2:
            raise torch.OutOfMemoryError
        fetch(self, store, *others)

    monkeypatch.setattr(HiddenCopies, "_fetch", failing)
    with lanes:
        found = trained(network())
    assert 2 in calls
    assert_same_state(found, expected)
    assert lanes.early == []


@pytest.mark.parametrize("where", ["forward", "backward", "interpolation"])
def test_after_an_exception_the_weights_are_back(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, lanes = network(), gpu(Lanes())
    iwr = regulariser(model)
    iwr.step(lambda: loss_of(model))
    before = snapshot(model)

    def broken(calls: int) -> Any:
        def function(*_: Any) -> None:
            nonlocal calls
            calls -= 1
            if calls == 0:
                raise KeyboardInterrupt

        return function

    if where == "forward":
        model[6].register_forward_hook(broken(1))
    elif where == "backward":
        model[2].register_full_backward_hook(broken(1))
    else:
        take, third = HiddenCopies._take, broken(3)

        def interrupted(self: HiddenCopies, *args: Any) -> Any:
            third()
            return take(self, *args)

        monkeypatch.setattr(HiddenCopies, "_take", interrupted)
    with lanes, pytest.raises(KeyboardInterrupt):
        iwr.step(lambda: loss_of(model))
    assert_same_state(snapshot(model), before)
    monkeypatch.undo() if where == "interpolation" else None
    with lanes:
        iwr.free_memory()
    assert lanes.early == []


def test_a_parameter_can_be_frozen_between_two_interpolations(gpu: Any) -> None:
    def run(model: nn.Module) -> None:
        iwr = regulariser(model, every=3)
        for step in range(7):
            if step == 1:
                model.get_parameter("0.weight").requires_grad_(False)
            iwr.step(lambda step=step: loss_of(model, step))  # type: ignore[misc]

    expected, found = network(), network()
    run(expected)
    with gpu(Lanes()):
        run(found)
    assert_same_state(snapshot(found), snapshot(expected))


@pytest.mark.parametrize("backwards", [None, 1, 2, 3])
def test_a_loop_of_its_own_with_several_backward_passes(gpu: Any, backwards: int | None) -> None:
    def run(model: nn.Module) -> None:
        iwr = regulariser(model, interval=(0.4, 0.4))
        for _ in range(2):
            with iwr.interpolated(backwards=backwards):
                for micro in range(2):
                    (iwr.weight * loss_of(model, micro)).backward()
            loss_of(model).backward()

    expected, found = network(), network()
    run(expected)
    lanes = gpu(Lanes())
    with lanes:
        run(found)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert_same_state(snapshot(found), snapshot(expected))
    assert lanes.early == []


@pytest.mark.parametrize("backwards", [1, 2])
def test_the_action_runs_in_the_second_half_of_the_last_backward_pass(backwards: int) -> None:
    model, order = network(), list[str]()
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, n=number: order.append(str(n)))
    with after_half(parameters, backwards, lambda: order.append("action")):
        for _ in range(backwards):
            order.clear()
            loss_of(model).backward()
    first = order.index("action")
    assert 0.4 * len(parameters) <= first <= 0.7 * len(parameters)
    order.clear()
    loss_of(model).backward()
    assert "action" not in order  # the hooks are gone


def test_on_the_cpu_nothing_is_hidden() -> None:
    parameters = list(network().parameters())
    assert hidden_copies(parameters, torch.device("cpu"), None) is None
    assert hidden_copies(parameters, None, None) is None
    iwr = regulariser(network())
    with iwr.interpolated(backwards=1):
        pass
    assert iwr._weights._copies is None
    iwr.free_memory()


def test_the_hidden_share_is_the_time_of_the_copies_beside_kernels() -> None:
    kernels = [(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]
    assert hidden_share([(0.5, 2.5)], kernels) == 1
    assert hidden_share([(2.0, 6.0)], kernels) == 0.5
    assert hidden_share([(3.0, 5.0), (7.0, 9.0)], kernels) == 0
    assert hidden_share([(2.0, 4.0), (5.0, 6.0)], kernels) == pytest.approx(2 / 3)
