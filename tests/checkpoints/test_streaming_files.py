"""Merging files: kinds of files, headers, errors, memory and progress."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import openvclip
from openvclip import merging
from openvclip.errors import (
    CheckpointError,
    EmptyAverageError,
    ExtrapolationWarning,
    LambdaError,
    NonFiniteWeightsError,
    StateMismatchError,
    UnsafeCheckpointError,
    UsageError,
    WeightTypeError,
)
from tests.checkpoints.test_streaming import (
    State,
    a_state,
    files,
    recipe_of,
    same_entries,
    weights_hash,
)
from tests.helpers import REPO

# --- files of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "under a key", "old format", "transposed"])
def test_pytorch_files_are_read(tmp_path: Path, form: str) -> None:
    states = [a_state(seed) for seed in range(2)]
    if form == "transposed":
        for state in states:
            state["visual.w"] = state["visual.w"].T
    paths = [tmp_path / f"epoch-{number}.pth" for number in range(2)]
    for state, path in zip(states, paths, strict=True):
        content = {"epoch": 3, "model_state": state} if form == "under a key" else state
        torch.save(content, path, _use_new_zipfile_serialization=form != "old format")
    openvclip.average_files(paths, tmp_path / "swa.safetensors")
    same_entries(load_file(tmp_path / "swa.safetensors"), expected_mean(states))
    openvclip.interpolate_files(*paths, tmp_path / "out.safetensors", 0.3)
    expected = openvclip.interpolate(*states, 0.3)
    same_entries(load_file(tmp_path / "out.safetensors"), expected)
    recipe = recipe_of(tmp_path / "out.safetensors")
    assert recipe["inputs"][1] == {"file": "epoch-1.pth", "weights_hash": weights_hash(states[1])}


def expected_mean(states: list[State]) -> State:
    return {
        name: (
            torch.stack([state[name].to(torch.complex128) for state in states])
            .mean(dim=0)
            .to(v.dtype)
            if v.is_complex()
            else (sum(state[name].double() for state in states) / len(states)).to(v.dtype)
            if v.is_floating_point()
            else v
        )
        for name, v in states[-1].items()
    }


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "cfg": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(UnsafeCheckpointError, match="Nothing was run"):
        openvclip.average_files([tmp_path / "w.pth"], tmp_path / "swa.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_shards_in_and_out(tmp_path: Path) -> None:
    states = [a_state(seed) for seed in range(2)]
    a, b = files(tmp_path, *states)
    index = tmp_path / "new" / "m.safetensors.index.json"
    openvclip.interpolate_files(a, b, index, 0.5, max_shard_size=100)
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    tag = shards[0].split("-")[1]
    assert re.fullmatch("[0-9a-f]{8}", tag)
    assert shards == [
        f"m-{tag}-0000{k}-of-0000{len(shards)}.safetensors" for k in range(1, len(shards) + 1)
    ]
    assert len(shards) >= 4
    assert sorted(path.name for path in index.parent.iterdir()) == [*shards, index.name]
    merged: State = {}
    for shard in shards:
        part = load_file(index.parent / shard)
        assert sum(v.nbytes for v in part.values()) <= 100 or len(part) == 1
        assert all(content["weight_map"][name] == shard for name in part)
        merged.update(part)
        assert recipe_of(index.parent / shard) == json.loads(
            content["metadata"]["openvclip_recipe"]
        )
    expected = openvclip.interpolate(*states, 0.5)
    same_entries(merged, expected)
    same_entries(openvclip.load_checkpoint(index), expected)
    assert content["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    openvclip.interpolate_files(index, b, tmp_path / "out.safetensors", 0.5)
    same_entries(
        load_file(tmp_path / "out.safetensors"), openvclip.interpolate(expected, states[1], 0.5)
    )
    source = recipe_of(tmp_path / "out.safetensors")["inputs"][0]
    assert source["file"] == index.name
    assert source["weights_hash"] == weights_hash(expected)
    content["metadata"].update(of="the index", total_parameters=92)
    index.write_text(json.dumps(content))
    out, second_index = (
        tmp_path / "out.safetensors",
        tmp_path / "again.safetensors.index.json",
    )
    openvclip.average_files([index], out)
    openvclip.average_files([index], second_index, max_shard_size=100)
    with safe_open(out, "pt") as opened:
        texts = opened.metadata()
    assert texts.keys() == {"of", "openvclip_recipe"}
    assert texts["of"] == "the index"
    total_size = content["metadata"]["total_size"]
    assert json.loads(second_index.read_text())["metadata"] == {**texts, "total_size": total_size}
    assert openvclip.inspect_checkpoint(second_index).metadata == texts


def test_an_output_may_be_one_of_the_inputs(tmp_path: Path) -> None:
    states = [a_state(seed) for seed in range(2)]
    a, b = files(tmp_path, *states)
    expected = openvclip.interpolate(*states, 0.5)
    openvclip.interpolate_files(a, b, b, 0.5)
    same_entries(load_file(b), expected)
    openvclip.average_files([a, b], a)
    same_entries(load_file(a), expected_mean([states[0], expected]))
    index = tmp_path / "m.safetensors.index.json"
    openvclip.average_files([b], index, max_shard_size=100)
    before = set(json.loads(index.read_text())["weight_map"].values())
    openvclip.interpolate_files(index, a, index, 0.0, max_shard_size=100)
    same_entries(openvclip.load_checkpoint(index), load_file(a))
    after = set(json.loads(index.read_text())["weight_map"].values())
    assert not before & after, "a shard was written over while the older index named it"
    assert {p.name for p in tmp_path.iterdir()} == after | {a.name, b.name, index.name}
    shard = index.with_name(min(after))
    with pytest.raises(CheckpointError, match="is a shard of a model that is read"):
        openvclip.average_files([index], shard)
    same_entries(openvclip.load_checkpoint(index), load_file(a))


# --- the header of the result --------------------------------------------------------------------


def test_metadata_are_kept_and_the_recipe_is_written(tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("clip", "tuned", "out"))
    save_file(a_state(0), a, metadata={"source_family": "OpenAI", "of": "clip"})
    save_file(a_state(1), b, metadata={"epoch": "3", "of": "tuned"})
    openvclip.interpolate_files(a, b, out, 0.25)
    with safe_open(out, "pt") as opened:
        texts = opened.metadata()
    recipe = json.loads(texts.pop("openvclip_recipe"))
    assert texts == {"source_family": "OpenAI", "of": "tuned", "epoch": "3"}
    assert recipe == {
        "method": "interpolate",
        "lam": 0.25,
        "openvclip": openvclip.__version__,
        "inputs": [
            {"file": "clip.safetensors", "weights_hash": weights_hash(a_state(0))},
            {"file": "tuned.safetensors", "weights_hash": weights_hash(a_state(1))},
        ],
    }
    openvclip.average_files([out, out], b)
    assert recipe_of(b)["inputs"][0]["recipe"] == recipe
    (tmp_path / "new").touch()
    assert b.stat().st_mode == (tmp_path / "new").stat().st_mode


# --- errors --------------------------------------------------------------------------------------


def test_all_that_differs_is_listed(tmp_path: Path) -> None:
    other = {**a_state(1), "text.w": torch.zeros(4), "new": torch.zeros(1)}
    del other["scale"]
    a, b = files(tmp_path, a_state(0), other)
    calls: list[Callable[[Path], None]] = [
        lambda out: openvclip.interpolate_files(a, b, out, 0.5),
        lambda out: openvclip.average_files([a, b], out),
        lambda out: openvclip.merge_files([a, b], out, merging.average),
    ]
    for call in calls:
        with pytest.raises(StateMismatchError) as caught:
            call(tmp_path / "out.safetensors")
        assert caught.value.missing == ["scale"]
        assert caught.value.unexpected == ["new"]
        assert caught.value.mismatched == [("text.w", (3,), (4,))]
        assert "openvclip convert" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [a, b]


def test_wrong_arguments(tmp_path: Path) -> None:
    a, b = files(tmp_path, a_state(0), a_state(1))
    out, interpolate_files = tmp_path / "out.safetensors", openvclip.interpolate_files
    cases: list[tuple[type[Exception], str, Callable[[], None]]] = [
        (CheckpointError, "There is no file", lambda: interpolate_files(a, tmp_path / "c", out, 0)),
        (CheckpointError, "ending in", lambda: interpolate_files(a, b, tmp_path / "out.pt", 0.5)),
        (LambdaError, "finite", lambda: interpolate_files(a, b, out, float("nan"))),
        (LambdaError, "'0.5'", lambda: interpolate_files(a, b, out, "0.5")),  # type: ignore[call-overload]
        (LambdaError, "expected a number", lambda: interpolate_files(a, b, out, [0.5])),  # type: ignore[call-overload]
        (UsageError, "one output for each", lambda: interpolate_files(a, b, [out], [0.5, 1.0])),
        (UsageError, "one output for each", lambda: interpolate_files(a, b, [], [])),
        (UsageError, "written twice", lambda: interpolate_files(a, b, [out, out], [0.5, 1.0])),
        (UsageError, "max_shard_size=9", lambda: interpolate_files(a, b, out, 1, max_shard_size=9)),
        (EmptyAverageError, "no files", lambda: openvclip.average_files([], out)),
        (WeightTypeError, "one path", lambda: openvclip.average_files(str(a), out)),
        (UsageError, "no files", lambda: openvclip.merge_files([], out, merging.average)),
        (
            CheckpointError,
            "dtype=torch.complex128: safetensors files hold float64",
            lambda: interpolate_files(a, b, out, 0.5, dtype=torch.complex128),
        ),
    ]
    for kind, reason, call in cases:
        with pytest.raises(kind, match=reason):
            call()
        assert sorted(tmp_path.iterdir()) == [a, b]


def test_extrapolation_warns_where_it_was_asked_for(tmp_path: Path) -> None:
    a, b = files(tmp_path, a_state(0), a_state(1))
    with pytest.warns(ExtrapolationWarning) as caught:
        openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", 1.5)
    assert [warning.filename for warning in caught] == [__file__]


# --- what it costs -------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.lerp(torch.zeros(9), torch.ones(9), 0.5); import tqdm, openvclip
before = peak()
openvclip.interpolate_files(*sys.argv[1:3], sys.argv[-1], 0.5)
openvclip.average_files(sys.argv[1:-1], sys.argv[-1])
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Merge two models of 75 MB in another process. One model is an input several times."""
    pytest.importorskip("resource")
    state = {f"w{number}": torch.full((6_250_000,), 1.5) for number in range(3)}
    a, b = files(tmp_path, state, state)
    out = str(tmp_path / "out.safetensors")
    command = [sys.executable, "-c", MEASURE, str(a), str(b), *[str(a)] * 7, out]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    assert float(done.stdout) < 100, "MB"


def test_progress_is_shown_where_asked_for(tmp_path: Path, capsys: Any) -> None:
    a, b = files(tmp_path, a_state(0), a_state(1))
    for progress, is_visible in ((None, False), (False, False), (True, True)):
        openvclip.average_files([a, b], tmp_path / "out.safetensors", progress=progress)
        assert ("100%" in capsys.readouterr().err) == is_visible


def test_pytorchs_number_of_threads_comes_back(tmp_path: Path) -> None:
    a, b = files(tmp_path, a_state(0), a_state(1))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        openvclip.interpolate_files(a, b, tmp_path / "out.safetensors", 0.5)
        assert torch.get_num_threads() == 3
        save_file({"w": torch.tensor([float("nan")])}, a)
        with pytest.raises(NonFiniteWeightsError):
            openvclip.average_files([a], b)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
