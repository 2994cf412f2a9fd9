"""Texts are added to the header of a file, and large models are written in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openvclip.checkpoints import load_checkpoint
from openvclip.checkpoints.formats import read_texts
from openvclip.checkpoints.model_files import save_model_file
from openvclip.checkpoints.texts import add_texts
from openvclip.errors import CheckpointError
from tests.helpers import assert_same_state

STATE = {
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "one": torch.tensor(float("nan")),
    "none": torch.empty(0, 3),
    "count": torch.tensor([7]),
}


def test_texts_are_added_and_the_entries_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path, metadata={"format": "pt", "old": "a", "kept": "b"})
    add_texts(path, {"old": "new", "more": "ü" * 1000})
    with safe_open(path, "pt") as file:
        expected = {"format": "pt", "old": "new", "kept": "b", "more": "ü" * 1000}
        assert file.metadata() == expected
    loaded = load_file(path)
    assert_same_state({name: loaded[name] for name in STATE}, STATE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_texts_of_shards_are_in_the_index(tmp_path: Path) -> None:
    name = save_model_file(STATE, tmp_path, "big", metadata={"kept": "b"}, max_shard_size=8)
    assert name == "big.safetensors.index.json"
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name for shard in shards][:1] == ["big-00001-of-00003.safetensors"]
    before = [shard.read_bytes() for shard in shards]
    add_texts(tmp_path / name, {"more": "text"})
    assert read_texts(tmp_path / name) == {"kept": "b", "more": "text"}
    assert [shard.read_bytes() for shard in shards] == before
    loaded = load_checkpoint(tmp_path / name)
    assert_same_state({entry: loaded[entry] for entry in STATE}, STATE)


def test_a_damaged_file_gets_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        add_texts(path, {"more": "text"})
    assert path.read_bytes() == whole[:-1]
