"""Extra state of modules (``get_extra_state``): it belongs to one model and is passed through."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import (
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    LAWATracker,
    SWATracker,
    interpolate,
    interpolate_into,
)
from openvclip.errors import WeightTypeError
from openvclip.merging import slerp
from openvclip.weights import weights_hash
from tests.merging.methods import MERGES, Merge, State


class Scaled(nn.Linear):
    """A layer that keeps a record beside its weights, as layers for float8 do."""

    def __init__(self, record: Any) -> None:
        super().__init__(2, 2)
        self.record = record

    def get_extra_state(self) -> Any:
        return self.record

    def set_extra_state(self, state: Any) -> None:
        self.record = state


def model(record: Any, weight: float) -> nn.Sequential:
    made = nn.Sequential(Scaled(record), nn.Linear(2, 2))
    for parameter in made.parameters():
        parameter.data.fill_(weight)
    return made


def plain(record: Any) -> Any:
    """A form of a record that ``==`` compares."""
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, io.BytesIO):
        return record.getvalue()
    return record.tolist() if isinstance(record, Tensor) else record


RECORDS: list[tuple[Any, Any]] = [
    ({"amax": 1.0, "history": torch.ones(2)}, {"amax": 2.0, "history": None}),
    (torch.ones(3, dtype=torch.uint8), torch.ones(5, dtype=torch.uint8)),  # pickled, other length
    (torch.zeros(2), torch.ones(2)),  # no arithmetic on these numbers
    (b"clip", b"tuned"),
    (io.BytesIO(b"clip"), io.BytesIO(b"tuned")),
    (None, "tuned"),
]


@pytest.mark.parametrize(("of_clip", "of_tuned"), RECORDS)
def test_the_record_of_the_tuned_model_is_passed_through(of_clip: Any, of_tuned: Any) -> None:
    # Report 22 (TransformerEngine#199)
    clip, tuned = model(of_clip, 0.0).state_dict(), model(of_tuned, 1.0).state_dict()
    theta = interpolate(clip, tuned, 0.25)
    theta = interpolate(clip, tuned, 0.25, out=theta)
    other, written = model(of_clip, 5.0), model(of_clip, 5.0)
    other.load_state_dict(theta)
    interpolate_into(written, clip, tuned, 0.25)
    for result in (other, written):
        assert result[0].weight.unique().tolist() == [0.75]
        assert plain(result[0].record) == plain(of_tuned)
        if isinstance(of_tuned, (dict, Tensor, io.BytesIO)):
            assert result[0].record is not of_tuned


@pytest.mark.parametrize(
    "tracker", [SWATracker, EMATracker, LAWATracker, partial(GaussianTracker, mu=2.0, sigma=1.0)]
)
@pytest.mark.parametrize(("first", "last"), RECORDS)
def test_the_average_can_be_loaded_back(tracker: Any, first: Any, last: Any) -> None:
    # Report 22 (TransformerEngine#199)
    trained = model(first, 1.0)
    mean, resumed = tracker(trained), tracker(trained)
    for record in (first, last):
        trained[0].record = record
        mean.update(trained)
    trained[0].record = "later"
    resumed.load_state_dict(mean.state_dict())
    for average_of_run in (mean, resumed):
        other = model(None, 5.0)
        other.load_state_dict(average_of_run.averaged_state_dict())
        assert other[0].weight.unique().tolist() == [1.0]
        assert plain(other[0].record) == plain(last)
    with mean.applied(trained):
        assert trained[0].record == "later"


def test_the_state_of_a_tracker_without_extra_state_has_no_new_entry() -> None:
    assert "extra_state" not in SWATracker(nn.Linear(2, 2)).state_dict()


METHODS: dict[str, Merge] = {
    **MERGES,
    "slerp by name": lambda a, others: slerp(
        others[0], a, lambda name: float("weight" in name) / 2
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("first", "second"), RECORDS)
def test_merges_pass_on_the_record_of_the_first_model(method: str, first: Any, second: Any) -> None:
    a, b = model(first, 1.0).state_dict(), model(second, 2.0).state_dict()
    other = model("none", 5.0)
    other.load_state_dict(METHODS[method](a, [b, dict(b)]))
    assert plain(other[0].record) == plain(first)


def test_anchors_and_hashes() -> None:
    clip = model({"amax": 1.0}, 0.0).state_dict()
    trained = model({"amax": 2.0}, 1.0)
    iwr = InterpolatedWeightRegularizer(trained, anchor=clip, interval=(0.5, 0.5))
    with iwr.interpolated():
        assert trained[0].weight.unique().tolist() == [0.5]
    without = {name: value for name, value in clip.items() if isinstance(value, Tensor)}
    assert weights_hash(clip) == weights_hash(without)


def test_wrapped_names_and_models_without_records() -> None:
    clip, tuned = model("clip", 0.0), model("tuned", 1.0)
    wrapped = {f"module.{name}": value for name, value in tuned.state_dict().items()}
    assert interpolate(clip.state_dict(), wrapped, 0.5)["0._extra_state"] == "tuned"
    bare = {name: value for name, value in clip.state_dict().items() if "_extra" not in name}
    assert interpolate(bare, tuned.state_dict(), 0.5)["0._extra_state"] == "tuned"
    assert "0._extra_state" not in interpolate(tuned.state_dict(), bare, 0.5)
    interpolate_into(nn.DataParallel(clip), snapshot_of(clip), tuned.state_dict(), 0.5)
    assert clip[0].record == "tuned"
    with pytest.raises(WeightTypeError, match="'optimizer' holds a dict"):
        interpolate({**bare, "optimizer": {}}, bare, 0.5)  # type: ignore[dict-item]


def snapshot_of(source: nn.Module) -> State:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in source.state_dict().items()
    }
