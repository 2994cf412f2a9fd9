"""Files of task vectors: their values, their mark, and merges that take them as models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import openvclip
from openvclip.checkpoints import read_contract, save_adapter, task_vector_file
from openvclip.errors import CheckpointError, StateMismatchError
from openvclip.merging import apply_task_vectors, average, iso_c, task_vector
from openvclip.weights import Adapter, LowRank, weights_hash
from tests.checkpoints.test_contract import CONTRACT
from tests.checkpoints.test_streaming import State, a_state, files
from tests.helpers import assert_same_state as assert_same_order

Pair = tuple[Path, Path]


def assert_same_state(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare bitwise. The order of entries in a file is that of safetensors."""
    assert got.keys() == expected.keys()
    assert_same_order({name: got[name] for name in expected}, dict(expected))


@pytest.fixture
def states() -> list[State]:
    return [a_state(seed) for seed in range(2)]


@pytest.fixture
def pair(tmp_path: Path, states: list[State]) -> Pair:
    a, b = files(tmp_path, *states)
    return a, b


def vector_of(pair: Pair, tmp_path: Path) -> Path:
    out = tmp_path / "vector.safetensors"
    task_vector_file(*pair, out)
    return out


def test_a_file_holds_what_task_vector_gives(
    pair: Pair, states: list[State], tmp_path: Path
) -> None:
    vector = vector_of(pair, tmp_path)
    loaded = openvclip.load_checkpoint(vector, names="original")
    expected = task_vector(*states)
    assert_same_state({name: loaded[name] for name in expected}, expected)
    assert loaded.keys() == expected.keys()
    with safe_open(vector, "pt") as opened:
        texts = opened.metadata()
    base_hash = weights_hash(states[0])
    assert json.loads(texts["openvclip_task_vector"]) == {"base_weights_hash": base_hash}
    recipe = json.loads(texts["openvclip_recipe"])
    assert recipe["method"] == "task_vector"
    assert [i["weights_hash"] for i in recipe["inputs"]] == [weights_hash(s) for s in states]
    half = tmp_path / "half.safetensors"
    task_vector_file(*pair, half, dtype=torch.float16)
    stored = load_file(half)
    for name, change in expected.items():
        dtype = change.dtype if change.is_complex() else torch.float16
        torch.testing.assert_close(stored[name], change.to(dtype))


def test_merges_read_it_as_its_model(pair: Pair, states: list[State], tmp_path: Path) -> None:
    vector, out = vector_of(pair, tmp_path), tmp_path / "out.safetensors"
    base, tuned = states
    read = {
        name: apply_task_vectors(base, [task_vector(base, tuned)])[name].to(value.dtype)
        for name, value in base.items()
    }
    openvclip.average_files([pair[0], vector], out)
    same(load_file(out), average([base, read]))
    openvclip.interpolate_files(pair[0], vector, out, 0.25)
    same(load_file(out), openvclip.interpolate(base, read, 0.25))
    openvclip.merge_files([pair[0], vector], out, lambda s: iso_c(s[0], s[1:]))
    same(load_file(out), iso_c(base, [read]))
    with safe_open(out, "pt") as opened:
        assert opened.metadata().keys() == {"openvclip_recipe"}


def same(got: State, expected: State) -> None:
    """Compare up to one rounding: base + (tuned - base) is rounded."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_a_vector_of_half_precision_gives_back_the_model(tmp_path: Path) -> None:
    states = [{"w": torch.randn(40, 9).bfloat16()} for _ in range(2)]
    pair = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, state in zip(pair, states, strict=True):
        save_file(state, path)
    vector = vector_of(pair, tmp_path)
    assert load_file(vector)["w"].dtype == torch.float32
    openvclip.interpolate_files(pair[0], vector, tmp_path / "out.safetensors", 0.0)
    assert_same_state(load_file(tmp_path / "out.safetensors"), states[1])


class Counting(nn.Module):
    """A module with all kinds of entries beside weights."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.note = note

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_counters_masks_and_extra_state_are_those_of_the_base(tmp_path: Path, ending: str) -> None:
    base, tuned = Counting("base"), Counting("tuned")
    tuned.norm(torch.randn(5, 3))
    tuned.mask.logical_not_()  # type: ignore[operator]
    pair = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    for path, model in zip(pair, (base, tuned), strict=True):
        if ending == "pt":
            torch.save(model.state_dict(), path)
        else:
            openvclip.checkpoints.save_checkpoint(model.state_dict(), path)
    vector = vector_of(pair, tmp_path)
    with safe_open(vector, "pt") as opened:
        assert set(opened.keys()) == {f"norm.{n}" for n in ("weight", "bias", *STATISTICS)}
        assert opened.metadata().keys() == {"openvclip_recipe", "openvclip_task_vector"}
    in_memory = apply_task_vectors(
        openvclip.load_checkpoint(pair[0], names="original"),
        [openvclip.load_checkpoint(vector, names="original")],
    )
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(pair[0], vector, out, 0.0)
    for state in (in_memory, openvclip.load_checkpoint(out, names="original")):
        model = Counting("")
        model.load_state_dict(state)
        assert (model.note, model.norm.num_batches_tracked) == ("base", 0)
        assert torch.equal(model.mask, base.mask)  # type: ignore[arg-type]
        for name in STATISTICS:
            torch.testing.assert_close(getattr(model.norm, name), getattr(tuned.norm, name))


STATISTICS = ("running_mean", "running_var")


def test_extra_state_that_the_base_lacks_is_left_out(tmp_path: Path) -> None:
    """An older vector names extra state in its header that no entry holds."""
    pair = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for seed, path in enumerate(pair):
        extra = {"_extra_state": {"k": 1}} if seed else {}
        openvclip.checkpoints.save_checkpoint({"w": torch.full((2,), seed + 1.0), **extra}, path)
    vector, out = vector_of(pair, tmp_path), tmp_path / "out.safetensors"
    with safe_open(vector, "pt") as opened:
        texts = {**opened.metadata(), "openvclip_extra_state": '["_extra_state"]'}
    save_file(load_file(vector), vector, metadata=texts)
    openvclip.average_files([pair[0], vector], out)
    with safe_open(out, "pt") as opened:
        assert opened.metadata().keys() == {"openvclip_recipe"}
    assert openvclip.load_checkpoint(out, names="original")["w"].tolist() == [1.5, 1.5]


def test_shards_and_lora_fine_tunes(tmp_path: Path) -> None:
    base = {"fc.weight": torch.randn(6, 5), "fc.bias": torch.randn(6)}
    adapter = Adapter({"fc.weight": LowRank(torch.randn(6, 2), torch.randn(2, 5))}, {})
    save_file(base, tmp_path / "clip.safetensors")
    save_adapter(adapter, tmp_path / "lora")
    index = tmp_path / "v.safetensors.index.json"
    files = tmp_path / "clip.safetensors", tmp_path / "lora"
    task_vector_file(*files, index, max_shard_size=60)
    openvclip.interpolate_files(files[0], index, tmp_path / "out.safetensors", 0.0)
    got = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(got, dict(adapter.merged(base)))
    with pytest.raises(CheckpointError, match="is a task vector"):
        openvclip.load_checkpoint(index)


def test_its_contract_is_that_of_the_model(pair: Pair, states: list[State], tmp_path: Path) -> None:
    openvclip.save_checkpoint(states[1], pair[1], metadata={"openvclip": CONTRACT.to_json()})
    contract = read_contract(vector_of(pair, tmp_path))
    assert contract is not None
    assert contract.expansion == CONTRACT.expansion


def test_what_a_task_vector_does_not_fit(pair: Pair, states: list[State], tmp_path: Path) -> None:
    vector, out = vector_of(pair, tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError, match=r"is a task vector: the change of a model"):
        openvclip.load_checkpoint(vector)
    with pytest.raises(CheckpointError, match="is a task vector"):
        openvclip.average_files([vector], out)
    with pytest.raises(CheckpointError, match="is the change of another model than"):
        openvclip.interpolate_files(pair[1], vector, out, 0.5)
    openvclip.interpolate_files(pair[1], vector, out, 0.0, override=True)
    smaller = tmp_path / "smaller.safetensors"
    save_file({name: v for name, v in states[0].items() if name != "visual.w"}, smaller)
    with pytest.raises(StateMismatchError, match="does not fit the model"):
        openvclip.average_files([smaller, vector], out)
