"""Merging files in several threads, in runs that end in any order."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip.checkpoints.streaming import pipeline, threads
from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.errors import NonFiniteWeightsError
from openvclip.weights import weights_hash
from openvclip.weights.hashing import joined_checksum
from tests.checkpoints.test_streaming import recipe_of
from tests.helpers import assert_same_state

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of 16 bytes, runs of 3 parts and 4 threads, all of which end."""
    monkeypatch.setattr(pipeline, "_LARGEST_PART", 16)
    monkeypatch.setattr(pipeline, "_SMALLEST_PART", 16)
    monkeypatch.setattr(threads, "_RUN", 48)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("openvclip-merge")]
    torch.set_num_threads(before)


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(7, 43, generator=generator),
        "half": torch.randn(101, generator=generator).half(),
        "double": torch.randn(50, generator=generator).double(),
        "scale": torch.randn((), generator=generator),
        "mask": torch.full((9, 9), float("-inf")).triu(1),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor([seed, seed + 1]),
        **{f"small.{k}": torch.randn(k, generator=generator) for k in range(1, 12)},
    }


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        save_file(state(seed), file)
    return files


@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_checksums_are_joined(first: bytes, second: bytes) -> None:
    joined = joined_checksum(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


@pytest.mark.parametrize("lacking", [None, "preadv", "pwrite"])
def test_bits_and_hashes(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str | None
) -> None:
    if lacking is not None:
        monkeypatch.delattr(os, lacking)  # as on Windows
    outs = [tmp_path / "0.safetensors", tmp_path / "1.safetensors.index.json"]
    openvclip.interpolate_files(*paths, outs, [0.3, lambda name: len(name) / 20])
    for out, lam in zip(outs, (0.3, lambda name: len(name) / 20), strict=True):
        expected = openvclip.interpolate(state(0), state(1), lam)
        loaded = openvclip.load_checkpoint(out)
        assert_same_state({name: loaded[name] for name in expected}, expected)
    hashes = [entry["weights_hash"] for entry in recipe_of(outs[0])["inputs"]]
    assert hashes == [weights_hash(state(seed)) for seed in range(2)]


def test_shards_are_written_by_several_threads(paths: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors.index.json"
    openvclip.interpolate_files(*paths, out, 0.5, max_shard_size=300)
    assert len(list(tmp_path.glob("out-*"))) > 4
    expected = openvclip.interpolate(state(0), state(1), 0.5)
    loaded = openvclip.load_checkpoint(out)
    assert_same_state({name: loaded[name] for name in expected}, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["large", "small.11"])
def test_an_error_in_a_thread_ends_all(
    paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    where: str,
) -> None:
    read_part = WeightInput.read_part

    def failing(self: WeightInput, name: str, start: int, into: Tensor, checksum: int) -> int:
        if name == where:
            raise error("stop")
        return read_part(self, name, start, into, checksum)

    monkeypatch.setattr(WeightInput, "read_part", failing)
    with pytest.raises(error, match="stop"):
        openvclip.interpolate_files(*paths, tmp_path / "out.safetensors", 0.5)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_mean_in_threads_names_the_broken_file(paths: list[Path], tmp_path: Path) -> None:
    broken = state(1)
    broken["large"][6, 42] = float("nan")
    save_file(broken, paths[1])
    with pytest.raises(NonFiniteWeightsError, match=r"large holds NaN .*b\.safetensors"):
        openvclip.average_files(paths, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


def test_each_run_is_read_once_and_in_order(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[tuple[int, str], list[int]] = {}
    read_part = WeightInput.read_part

    def noted(self: WeightInput, name: str, start: int, into: Tensor, checksum: int) -> int:
        read.setdefault((id(self), name), []).extend(range(start, start + len(into)))
        return read_part(self, name, start, into, checksum)

    monkeypatch.setattr(WeightInput, "read_part", noted)
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(*paths, out, 0.5)
    for (_, name), elements in read.items():
        assert sorted(elements) == list(range(state(0)[name].numel()))
    assert load_file(out).keys() == state(0).keys()
