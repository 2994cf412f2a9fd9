"""Parameters that share memory, and parameters that a state-dict hook renames, hides or copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import (
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    LAWATracker,
    SWATracker,
    interpolate_into,
)
from openvclip.errors import StateMismatchError, UsageError
from openvclip.weights.memory import require_no_overlap, tied_names
from openvclip.weights.names import named_parameters
from tests.helpers import assert_same_state, snapshot

GAUSSIAN = partial(GaussianTracker, mu=2.0, sigma=1.0)
TRACKERS: list[Any] = [SWATracker, EMATracker, LAWATracker, GAUSSIAN]


class Layer(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Tied(nn.Module):
    """Two layers on one parameter, or on two parameters that ``view`` derives from one memory."""

    def __init__(self, view: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(2, 3))
        self.embed = Layer(weight)
        self.head = Layer(weight if view is None else nn.Parameter(view(weight.data)))


def untied() -> Tied:
    """Two parameters on one memory."""
    model = Tied()
    model.load_state_dict(Tied().state_dict(), assign=True)
    assert model.embed.weight is not model.head.weight
    assert model.embed.weight.data_ptr() == model.head.weight.data_ptr()
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("model", [Tied(), untied(), Tied(lambda w: w)])
def test_a_tie_moves_once(model: Tied) -> None:
    # Report 10 (pytorch#188346)
    iwr = InterpolatedWeightRegularizer(model, anchor=zeros(model), interval=(0.5, 0.5))
    with iwr.interpolated():
        assert model.embed.weight.unique().tolist() == [0.5]
        assert model.head.weight.unique().tolist() == [0.5]
    assert model.head.weight.unique().tolist() == [1.0]


def test_a_tie_that_is_untied_after_the_regulariser_was_created() -> None:
    model = Tied()
    iwr = InterpolatedWeightRegularizer(model, anchor=zeros(model), interval=(0.5, 0.5))
    model.load_state_dict(Tied().state_dict(), assign=True)
    with iwr.interpolated():
        assert model.head.weight.unique().tolist() == [0.5]


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("frozen", ["", "embed", "head"])
def test_the_average_of_a_tie_is_that_of_its_trained_name(tracker: Any, frozen: str) -> None:
    model = untied()
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    average = tracker(model)
    values = (1.0, 2.0, 6.0)
    for value in values:
        model.embed.weight.data.fill_(value)
        average.update(model)
    gaussian = (math.exp(-0.5) * 1.0 + 2.0 + math.exp(-0.5) * 6.0) / (1 + 2 * math.exp(-0.5))
    means: dict[Any, float] = {
        SWATracker: 3.0,
        LAWATracker: 3.0,
        EMATracker: 1.0006,
        GAUSSIAN: gaussian,
    }
    expected = means[tracker]
    state = average.averaged_state_dict()
    assert state.keys() == model.state_dict().keys()
    for value in state.values():
        torch.testing.assert_close(value, torch.full((2, 3), expected), atol=1e-4, rtol=0)
    with average.applied(model):
        torch.testing.assert_close(model.head.weight.data, state["head.weight"])
    assert model.embed.weight.unique().tolist() == [6.0]


def test_partial_overlaps_are_errors_where_they_would_be_wrong() -> None:
    transposed = Tied(lambda weight: weight.t())
    with pytest.raises(UsageError, match=r"embed.weight and head.weight share a part of their mem"):
        InterpolatedWeightRegularizer(transposed)
    SWATracker(transposed)  # the mean of a transpose is the transpose of the mean
    transposed.embed.requires_grad_(False)
    with pytest.raises(UsageError, match=r"share a part of their memory.*\.clone\(\)"):
        SWATracker(transposed)
    with pytest.raises(UsageError, match="share a part of their memory"):
        InterpolatedWeightRegularizer(transposed)
    frozen = Tied(lambda weight: weight[:1]).requires_grad_(False)
    SWATracker(frozen)


@given(
    st.lists(
        st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(1, 4)] * 2, st.booleans()),
        min_size=2,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_overlaps_are_found_exactly(boxes: list[tuple[int, int, int, int, bool]]) -> None:
    """Rectangles of one matrix overlap if and only if they have an element in common."""
    memory = torch.arange(100.0).reshape(10, 10)
    views = {}
    for number, (top, left, height, width, turned) in enumerate(boxes):
        box = memory[top : top + height, left : left + width]
        views[str(number)] = nn.Parameter(box.t() if turned else box)
    kept = {name: value for name, value in views.items() if name not in tied_names(views)}
    elements = [value.flatten().tolist() for value in kept.values()]
    overlap = sum(map(len, elements)) > len({e for part in elements for e in part})
    if overlap:
        with pytest.raises(UsageError):
            require_no_overlap(kept, kept)
    else:
        require_no_overlap(kept, kept)


def test_ties_are_views_of_the_same_values() -> None:
    memory = torch.ones(4, 4)
    entries = {
        "frozen": memory[:2],
        "trained": nn.Parameter(memory[:2]),
        "again": memory[:2].detach(),
        "other": memory[2:],
        "turned": memory[:2].t(),
        "cast": memory[:2].view(torch.int32),
        "empty": torch.empty(0),
        "also empty": torch.empty(0),
    }
    assert tied_names(entries) == {"frozen": "trained", "again": "trained"}


# --- state-dict hooks ----------------------------------------------------------------------------


def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Leave out ``layer.`` in the names, as wrappers do to keep the names of checkpoints."""
    for name in [name for name in state if name.startswith(f"{prefix}layer.")]:
        state[name.replace("layer.", "")] = state.pop(name)


def hide(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}layer.")]:
        del state[name]


def copied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}layer.")]:
        state[name] = state[name].detach().clone()


class Hooked(nn.Module):
    def __init__(self, hook: Callable[..., None]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self._register_state_dict_hook(hook)


def hooked(hook: Callable[..., None], *, only: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Hooked(hook)) if only else nn.Sequential(Hooked(hook), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    return model


@pytest.mark.parametrize("hook", [rename, hide, copied])
@pytest.mark.parametrize("only", [False, True])
def test_without_an_anchor_hooks_do_not_matter(hook: Any, only: bool) -> None:
    # Report 09 (d2go#578)
    model = hooked(hook, only=only)
    iwr = InterpolatedWeightRegularizer(model, interval=(0.5, 0.5))
    for parameter in model.parameters():
        parameter.data.fill_(3.0)
    with iwr.interpolated():
        assert {p.unique().item() for p in model.parameters()} == {2.0}
    assert {p.unique().item() for p in model.parameters()} == {3.0}


def test_an_anchor_under_the_names_of_a_renaming_hook() -> None:
    model = hooked(rename)
    assert "0.weight" in model.state_dict()
    iwr = InterpolatedWeightRegularizer(model, anchor=zeros(model), interval=(0.5, 0.5))
    with iwr.interpolated():
        assert {p.unique().item() for p in model.parameters()} == {0.5}


def test_an_anchor_without_hidden_names_is_an_error() -> None:
    model = hooked(hide)
    with pytest.raises(StateMismatchError, match="a state-dict hook hides or copies them") as error:
        InterpolatedWeightRegularizer(model, anchor=zeros(model))
    assert error.value.missing == ["0.layer.bias", "0.layer.weight"]
    values = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    iwr = InterpolatedWeightRegularizer(model, anchor=values, interval=(0.5, 0.5))
    with iwr.interpolated():
        assert {p.unique().item() for p in model.parameters()} == {0.5}


def test_trackers_average_renamed_parameters_and_refuse_hidden_ones() -> None:
    model = hooked(rename)
    swa = SWATracker(model)
    for value in (1.0, 5.0):
        model[0].layer.weight.data.fill_(value)
        swa.update(model)
    assert swa.averaged_state_dict()["0.weight"].unique().tolist() == [3.0]
    with swa.applied(model):
        assert model[0].layer.weight.unique().tolist() == [3.0]
    for hook in (hide, copied):
        with pytest.raises(UsageError, match=r"not hold 2 trained parameters \(0.layer.weight, 0"):
            SWATracker(hooked(hook))
        frozen = hooked(hook)
        frozen[0].requires_grad_(False)
        SWATracker(frozen).update(frozen)


def test_interpolation_does_not_write_to_copies() -> None:
    model = hooked(copied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=r"holds 2 copies \(0.layer.weight, 0.layer.bias\)"):
        interpolate_into(model, zeros(model), snapshot(model), 0.5)
    assert_same_state({n: p.detach() for n, p in named_parameters(model).items()}, before)
    renamed = hooked(rename)
    interpolate_into(renamed, zeros(renamed), snapshot(renamed), 0.5)
    assert renamed[0].layer.weight.unique().tolist() == [0.5]
