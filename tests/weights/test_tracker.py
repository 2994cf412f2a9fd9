"""WeightTracker: a new tracker is one class with three methods."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip.errors import EmptyAverageError, NonFiniteWeightsError, StateMismatchError
from openvclip.weights import (
    EMATracker,
    GaussianTracker,
    LAWATracker,
    SWATracker,
    WeightTracker,
)
from openvclip.weights.tracker import Entries
from tests.helpers import Net, assert_same_state, jump, same_bits, snapshot, through_a_file


class Median(WeightTracker):
    """The median of the last three models."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._latest: Entries = {}
        self._middle: Entries = {}
        self._oldest: Entries = {}

    def _add(self, weights: Entries) -> None:
        self._oldest.update(self._middle)
        self._middle.update(self._latest)
        self._latest.update(self._wide_copy(weights))

    def _mean(self) -> Entries:
        models = [entries for entries in self._tensors().values() if entries]
        return {
            name: torch.stack([model[name] for model in models]).median(dim=0).values
            for name in models[0]
        }

    def _tensors(self) -> dict[str, Entries]:
        return {"latest": self._latest, "middle": self._middle, "oldest": self._oldest}


def history_of(tracker: WeightTracker, model: Net, steps: range) -> list[dict[str, Tensor]]:
    """Train for some steps, and return the models that were added."""
    added = []
    for step in steps:
        jump(model, step)
        model.norm.running_mean.fill_(step)
        if tracker.update(model):
            added.append(snapshot(model))
    return added


def test_a_new_tracker_has_schedule_carried_entries_and_use_in_a_model() -> None:
    model = Net()
    tracker = Median(model, start=1, every=2)
    with pytest.raises(EmptyAverageError, match="first enters at step 3"):
        tracker.averaged_state_dict()
    added = history_of(tracker, model, range(10))
    assert tracker.n_averaged == len(added) == 4
    average = tracker.averaged_state_dict()
    for name, parameter in model.named_parameters():
        expected = torch.stack([weights[name] for weights in added[-3:]]).median(dim=0).values
        assert same_bits(average[name], expected if parameter.requires_grad else parameter), name
    assert same_bits(average["norm.running_mean"], added[-1]["norm.running_mean"])
    live = snapshot(model)
    with tracker.applied(model):
        assert_same_state(model.state_dict(), average)
    assert_same_state(model.state_dict(), live)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_a_new_tracker_resumes_bitwise(stop: int, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    straight, first = Median(model, every=2), Median(model, every=2)
    for step in range(10):
        if step == stop:
            saved = through_a_file(first.state_dict())
            first = Median(Net(7).to(dtype))
            first.load_state_dict(saved)
        jump(model, step)
        straight.update(model)
        first.update(model)
    assert_same_state(first.averaged_state_dict(), straight.averaged_state_dict())


def test_a_new_tracker_refuses_what_the_others_refuse() -> None:
    model = Net()
    tracker = Median(model)
    history_of(tracker, model, range(2))
    before = tracker.averaged_state_dict()
    with pytest.raises(StateMismatchError, match="not the state of a Median"):
        tracker.load_state_dict({"latest": {}})
    with pytest.raises(StateMismatchError, match="Freeze the same parameters"):
        Median(Net(freeze=False)).load_state_dict(tracker.state_dict())
    model.head.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(head.bias\)"):
        tracker.update(model)
    assert_same_state(tracker.averaged_state_dict(), before)


def test_the_example_of_the_base_class_runs() -> None:
    text = WeightTracker.__doc__ or ""
    code = text[text.index("class FirstAndLast") : text.index("    Args:")]
    namespace: dict[str, Any] = {"WeightTracker": WeightTracker}
    exec(textwrap.dedent("    " + code), namespace)
    model = Net()
    tracker = namespace["FirstAndLast"](model)
    first, *_, last = history_of(tracker, model, range(4))
    expected = (first["head.weight"] + last["head.weight"]) / 2
    assert same_bits(tracker.averaged_state_dict()["head.weight"], expected)
    again = namespace["FirstAndLast"](model)
    again.load_state_dict(tracker.state_dict())
    assert_same_state(again.averaged_state_dict(), tracker.averaged_state_dict())


@pytest.mark.parametrize(
    ("tracker", "entries"),
    [
        (SWATracker(nn.Linear(1, 1)), ["start", "every", "sums", "earlier"]),
        (EMATracker(nn.Linear(1, 1)), ["start", "every", "decay", "warmup", "average"]),
        (LAWATracker(nn.Linear(1, 1), k=2), ["start", "every", "model_0", "model_1"]),
        (
            GaussianTracker(nn.Linear(1, 1), mu=2, sigma=1),
            ["start", "every", "mu", "sigma", "sums", "earlier", "scale"],
        ),
    ],
)
def test_the_entries_of_states_in_files_keep_their_names(
    tracker: WeightTracker, entries: list[str]
) -> None:
    expected = ["steps", "n_averaged", *entries, "carried", "aliases"]
    assert set(tracker.state_dict()) == set(expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_a_float64_average_is_bitwise_the_arithmetic_mean(values: list[float]) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    swa = SWATracker(model)
    total = 0.0
    for value in values:
        model.weight.data.fill_(value)
        swa.update(model)
        total += value
    assert swa.averaged_state_dict()["weight"].item() == total / len(values)
