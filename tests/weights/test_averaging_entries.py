"""SWATracker: entries that are not averaged, tied entries, errors, wrapped models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import SWATracker
from openvclip.errors import (
    EmptyAverageError,
    NonFiniteWeightsError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
)
from tests.helpers import Net, assert_same_state, jump, same_bits, snapshot, through_a_file

# --- entries that are not averaged -------------------------------------------------------------


def test_frozen_parameters_and_buffers_are_carried_bitwise() -> None:
    model = Net().bfloat16()
    model.frozen.weight.data[0, 0] = -0.0
    swa = SWATracker(model, every=2)
    for step in range(6):
        jump(model, step)
        model.norm.num_batches_tracked.fill_(step)
        model.norm.running_var.fill_(0.1 * step)
        swa.update(model)
    average = swa.averaged_state_dict()
    assert list(average) == list(model.state_dict())
    for name in ("frozen.weight", "frozen.bias", "norm.num_batches_tracked", "norm.running_var"):
        assert same_bits(average[name], model.state_dict()[name]), name
    model.load_state_dict(average)


def test_averaging_a_model_that_nothing_is_trained_in() -> None:
    """Checkpoints that are loaded one after the other into a frozen model."""
    model = nn.Linear(2, 2).requires_grad_(False)
    swa = SWATracker(model)
    for value in (1.0, 2.0, 6.0):
        model.weight.fill_(value)
        swa.update(model)
    assert swa.averaged_state_dict()["weight"].unique().tolist() == [3.0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.embed.weight


def test_tied_parameters_appear_under_both_names() -> None:
    model = Tied()
    swa = SWATracker(model)
    for value in (1.0, 5.0):
        model.embed.weight.data.fill_(value)
        swa.update(model)
    assert len(swa.state_dict()["sums"]) == 1
    for tracker in (swa, SWATracker(Tied())):
        tracker.load_state_dict(through_a_file(swa.state_dict()))
        average = tracker.averaged_state_dict()
        assert list(average) == ["embed.weight", "out.weight"]
        assert all((value == 3.0).all() for value in average.values())
        assert average["embed.weight"].data_ptr() != average["out.weight"].data_ptr()
    Tied().load_state_dict(average)


def test_the_average_shares_no_memory_with_tracker_or_model() -> None:
    model = Net()
    swa = SWATracker(model)
    swa.update(model)
    first = swa.averaged_state_dict()
    expected = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert_same_state(swa.averaged_state_dict(), expected)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_leave_the_average_as_it_was(bad: float) -> None:
    model = Net()
    swa = SWATracker(model)
    for broken_first in (True, False):
        healthy = model.head.bias.detach().clone()
        before = None if broken_first else swa.averaged_state_dict()
        model.head.bias.data[1] = bad
        with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(head.bias\)"):
            swa.update(model)
        model.head.bias.data.copy_(healthy)
        if before is not None:
            assert_same_state(swa.averaged_state_dict(), before)
            assert swa.n_averaged == 1
        swa.update(model)


def test_without_the_check_they_enter() -> None:
    model = Net()
    swa = SWATracker(model, check_finite=False)
    model.head.bias.data[1] = float("nan")
    assert swa.update(model)
    assert swa.averaged_state_dict()["head.bias"].isnan().tolist() == [
        i == 1 for i in range(model.head.bias.numel())
    ]


def test_large_finite_weights_are_no_error() -> None:
    model = nn.Linear(4, 4).half()
    model.weight.data.fill_(6e4)
    swa = SWATracker(model)
    swa.update(model)
    assert (swa.averaged_state_dict()["weight"] == model.weight[0, 0].float()).all()


def test_an_empty_average() -> None:
    swa = SWATracker(Net(), start=3)
    live = snapshot(model := Net())
    with pytest.raises(EmptyAverageError, match="after 0 steps"):
        swa.averaged_state_dict()
    with pytest.raises(EmptyAverageError), swa.applied(model):
        pass
    assert_same_state(model.state_dict(), live)


def test_another_model() -> None:
    swa = SWATracker(Net())
    with pytest.raises(
        StateMismatchError, match="does not fit the tracker: the tracked model defines"
    ):
        swa.update(nn.Linear(4, 4))
    swa.update(Net())
    with pytest.raises(StateMismatchError), swa.applied(nn.Linear(4, 4)):
        pass


def test_late_unfreezing_is_an_error_and_late_freezing_is_none() -> None:
    model = Net()
    swa = SWATracker(model)
    model.head.requires_grad_(False)
    swa.update(model)
    assert "head.weight" in swa.state_dict()["sums"]
    model.frozen.requires_grad_(True)
    for look in (swa.check_model, swa.update):
        with pytest.raises(UsageError, match=r"2 parameters .*\(frozen.weight, frozen.bias\)"):
            look(model)


def test_a_check_of_the_model_changes_nothing() -> None:
    model = Net()
    swa = SWATracker(model, start=5)
    swa.check_model(model)
    assert (swa.n_averaged, swa.state_dict()["steps"]) == (0, 0)
    with pytest.raises(StateMismatchError):
        swa.check_model(nn.Linear(4, 4))


# --- wrappers ----------------------------------------------------------------------------------


def test_wrapped_models_have_plain_names() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    wrappers = [model, compiled, nn.DataParallel(model), nn.DataParallel(compiled)]
    swa = SWATracker(wrappers[-1])
    for wrapper in wrappers:
        jump(model, 1)
        swa.update(wrapper)
    average = swa.averaged_state_dict()
    assert list(average) == list(model.state_dict())
    live = snapshot(model)
    for wrapper in wrappers:
        with swa.applied(wrapper):
            assert same_bits(model.head.weight, average["head.weight"])
        assert_same_state(model.state_dict(), live)


def test_one_foreach_addition_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch._foreach_add_

    def counted(tensors: list[Tensor], *rest: Any, **options: Any) -> None:
        calls.append(len(tensors))
        real(tensors, *rest, **options)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    model = Net()
    swa = SWATracker(model)
    for _ in range(3):
        swa.update(model)
    assert calls == [6 + 1, 6 + 1]  # the entries, and the mark that they are in


# --- long runs ---------------------------------------------------------------------------------


def test_long_average_of_wild_bf16_weights_keeps_its_rounding_down() -> None:
    """With 3,000 models of many magnitudes, the error of a plain sum is larger."""
    model, plain = nn.Linear(16, 8).bfloat16(), torch.zeros(8, 16)
    swa, generator = SWATracker(model), torch.Generator().manual_seed(0)
    total = torch.zeros(8, 16, dtype=torch.float64)
    for _ in range(3000):
        with torch.no_grad():
            model.weight.copy_(torch.randn(8, 16, generator=generator).mul(2).exp())
        total += model.weight.double()
        plain += model.weight.float()
        swa.update(model)
    exact = total / 3000
    spacing = torch.finfo(torch.float32).eps * exact.abs().max()
    average = swa.averaged_state_dict()["weight"]
    assert (average.double() - exact).abs().max() <= 2 * spacing
    assert (plain.double() / 3000 - exact).abs().max() > 4 * spacing


def test_resuming_around_the_end_of_a_block_is_bitwise() -> None:
    """A block has 128 models. Resuming before, at and after its end gives the same average."""
    model = nn.Linear(3, 2)
    whole = SWATracker(model)
    parts = {stop: SWATracker(model) for stop in (127, 128, 129, 256)}
    for step in range(1, 300):
        jump(model, step)
        whole.update(model)
        for stop, part in parts.items():
            part.update(model)
            if step == stop:
                parts[stop] = SWATracker(model)
                parts[stop].load_state_dict(through_a_file(part.state_dict()))
    for part in parts.values():
        assert_same_state(part.averaged_state_dict(), whole.averaged_state_dict())


@settings(max_examples=10)
@given(st.integers(1, 400))
def test_every_model_counts_once_whatever_the_number(n: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    swa = SWATracker(model)
    for step in range(n):
        with torch.no_grad():
            model.weight.fill_(step)
        swa.update(model)
    assert swa.averaged_state_dict()["weight"].item() == pytest.approx((n - 1) / 2, rel=1e-6)
    with swa.applied(model):
        assert model.weight.item() == pytest.approx((n - 1) / 2, rel=1e-6)


def test_a_state_dict_in_place_of_a_model_is_named() -> None:
    with pytest.raises(WeightTypeError, match=r"Expected a torch\.nn\.Module, got OrderedDict"):
        SWATracker(nn.Linear(1, 1).state_dict())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"every=1\.5"):
        SWATracker(nn.Linear(1, 1), every=1.5)  # type: ignore[arg-type]
