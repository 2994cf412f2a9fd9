"""Invalid headers and indexes are refused before anything is written."""

from __future__ import annotations

import contextlib
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import openvclip
from openvclip.checkpoints import layout
from openvclip.checkpoints.layout import header_bytes, read_header
from openvclip.checkpoints.sharding import index_bytes
from openvclip.errors import CheckpointError
from tests.helpers import assert_same_state

GOOD: dict[str, Any] = {
    "__metadata__": {"epoch": "3"},
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [24, 24]},
    "n": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}


def raw_file(header: object, data: int = 32) -> bytes:
    """Return a file in the layout of the format, with any text as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(data))


def changed(name: str, **fields: object) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def refused_everywhere(bad: Path, good: Path, reason: str) -> None:
    """Check that every function that reads files refuses ``bad`` and writes nothing."""
    folder = bad.parent
    before = sorted(folder.iterdir())
    out = folder / "out.safetensors"
    calls: list[Callable[[], object]] = [
        lambda: openvclip.load_checkpoint(bad),
        lambda: openvclip.inspect_checkpoint(bad),
        lambda: openvclip.interpolate_files(good, bad, out, 0.5),
        lambda: openvclip.interpolate_files(bad, good, out, 0.5),
        lambda: openvclip.average_files([good, bad], out),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match=reason) as caught:
            call()
        assert bad.name in str(caught.value)
    assert sorted(folder.iterdir()) == before


def test_a_good_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(raw_file(GOOD))
    header = read_header(tmp_path / "w")
    assert header.metadata == {"epoch": "3"}
    assert {name: (size.dtype, tuple(size.shape)) for name, size in header.sizes.items()} == {
        "w": (torch.float32, (2, 3)),
        "none": (torch.float16, (0, 4)),
        "n": (torch.int64, ()),
    }
    assert header.starts == {
        "w": header.length,
        "none": header.length + 24,
        "n": header.length + 24,
    }
    with safe_open(tmp_path / "w", "pt") as opened:
        assert set(opened.keys()) == header.sizes.keys()


NESTED = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TWICE = json.dumps(GOOD).encode()[:-1] + b', "w": ' + json.dumps(GOOD["w"]).encode() + b"}"
INVALID: dict[str, tuple[bytes, str]] = {
    "cut in the values": (raw_file(GOOD)[:-1], "by its header it should have"),
    "a byte too many": (raw_file(GOOD) + b"x", "by its header it should have"),
    "cut in the header": (raw_file(GOOD)[:60], "its header would have"),
    "huge header": (struct.pack("<Q", 2**31) + b"{" + bytes(99), "would have 2147483648 bytes"),
    "begins late": (
        raw_file(changed("w", data_offsets=[8, 32])),
        "gap of 8 bytes before",
    ),
    "a gap": (
        raw_file(changed("n", data_offsets=[32, 40]), 40),
        "gap of 8 bytes before the bytes of 'n'",
    ),
    "overlap": (
        raw_file(changed("n", data_offsets=[16, 24]), 24),
        "'n' overlap the bytes of",
    ),
    "beyond the end": (raw_file(changed("n", data_offsets=[24, 32]), 20), "it should have"),
    "backwards": (raw_file(changed("w", data_offsets=[24, 0])), r"data_offsets \[24, 0\]"),
    "negative": (raw_file(changed("w", data_offsets=[-24, 0])), "data_offsets"),
    "fraction": (raw_file(changed("w", data_offsets=[0, 24.0])), "data_offsets"),
    "boolean": (raw_file(changed("w", data_offsets=[False, 24])), "data_offsets"),
    "three offsets": (raw_file(changed("w", data_offsets=[0, 24, 24])), "data_offsets"),
    "no list": (raw_file(changed("w", data_offsets="0")), "data_offsets"),
    "shape too large": (raw_file(changed("w", shape=[2, 4])), r"24 bytes, but F32 of shape \[2, 4"),
    "shape too small": (raw_file(changed("w", shape=[2, 2])), "needs 16"),
    "dtype too wide": (raw_file(changed("w", dtype="F64")), "needs 48"),
    "absurd shape": (raw_file(changed("w", shape=[2**62, 2**62, 3])), "needs 2552117"),
    "absurd beside 0": (raw_file(changed("none", shape=[0, 2**80])), "has the shape"),
    "negative size": (raw_file(changed("w", shape=[-2, -3])), r"shape \[-2, -3\]"),
    "size of text": (raw_file(changed("w", shape=["6"])), "has the shape"),
    "shape of text": (raw_file(changed("w", shape="6")), "has the shape"),
    "unknown dtype": (raw_file(changed("w", dtype="F4")), "dtype F4, which openvclip does not"),
    "dtype of numbers": (raw_file(changed("w", dtype=["F32"])), "which openvclip does not"),
    "no offsets": (raw_file({**GOOD, "w": {"dtype": "F32"}}), "'w' lacks a dtype, a shape"),
    "no entry": (raw_file({**GOOD, "w": 3}), "'w' lacks a dtype, a shape"),
    "name twice": (raw_file(TWICE), "its header has 'w' twice"),
    "field twice": (
        raw_file(json.dumps(GOOD).replace('"F32"', '"F32", "dtype": "F32"').encode()),
        "'dtype' twice",
    ),
    "texts no texts": (raw_file({**GOOD, "__metadata__": {"epoch": 3}}), "no|not a mapping of"),
    "texts a list": (raw_file({**GOOD, "__metadata__": []}), "not a mapping of texts"),
    "no object": (raw_file(b'{"w"}' + b" " * 8), "its header is not JSON"),
    "no text": (raw_file(b'{"\xff": 1}'), "its header is not JSON"),
    "nested": (raw_file(NESTED), "its header is not JSON"),
}


@pytest.mark.parametrize("read", ["file", "index", "merge"])
def test_a_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    """Neither this library nor the safetensors library parses the header a second time."""
    index, state = sharded(tmp_path)
    save_file(state, tmp_path / "w.safetensors")
    expected = {name: value.clone() for name, value in state.items()}
    headers: list[bytes] = []
    parse = layout._parse_header

    def count(text: bytes, file_size: int) -> layout.Header:
        headers.append(text)
        return parse(text, file_size)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the safetensors library read a file")

    monkeypatch.setattr(layout, "_parse_header", count)
    for name in ("load_file", "safe_open", "load"):
        monkeypatch.setattr(safetensors.torch, name, refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    if read == "merge":
        openvclip.average_files([index, tmp_path / "w.safetensors"], tmp_path / "out.safetensors")
        assert len(headers) == 3
        return
    loaded = openvclip.load_checkpoint(index if read == "index" else tmp_path / "w.safetensors")
    assert len(headers) == len(set(headers)) == (2 if read == "index" else 1)
    assert_same_state({name: loaded[name] for name in expected}, expected)


def test_values_at_unaligned_positions_are_read(tmp_path: Path) -> None:
    """The format allows a header of any length, so that no entry is aligned."""
    for spaces in range(8):
        (tmp_path / "w").write_bytes(raw_file(json.dumps(GOOD).encode() + b" " * spaces))
        loaded, values = openvclip.load_checkpoint(tmp_path / "w"), bytes(range(32))
        expected = {
            "w": torch.frombuffer(bytearray(values[:24]), dtype=torch.float32).view(2, 3),
            "none": torch.zeros(0, 4, dtype=torch.float16),
            "n": torch.frombuffer(bytearray(values[24:]), dtype=torch.int64).view(()),
        }
        assert_same_state({name: loaded[name] for name in expected}, expected)


def test_loaded_entries_are_independent_of_the_file_and_of_each_other(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(2).half()}
    save_file(state, tmp_path / "w")
    loaded = openvclip.load_checkpoint(tmp_path / "w")
    assert [value.untyped_storage().nbytes() for value in loaded.values()] == [12, 4]
    for value in loaded.values():
        value.fill_(7)
    (tmp_path / "w").unlink()
    assert [float(value.sum()) for value in loaded.values()] == [21, 14]
    save_file(state, tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w")["a"].fill_(7)
    assert_same_state(load_file(tmp_path / "w"), state)


@pytest.mark.parametrize("case", INVALID)
def test_a_lying_header_is_refused(tmp_path: Path, case: str) -> None:
    content, reason = INVALID[case]
    (tmp_path / "good.safetensors").write_bytes(raw_file(GOOD))
    (tmp_path / "bad.safetensors").write_bytes(content)
    refused_everywhere(
        tmp_path / "bad.safetensors", tmp_path / "good.safetensors", rf"\({len(content)} bytes\).*"
    )
    with pytest.raises(CheckpointError, match=reason):
        read_header(tmp_path / "bad.safetensors")


def test_what_is_refused_is_never_what_the_library_would_have_read(tmp_path: Path) -> None:
    """Damage the header at random. No other error is raised, and no other sizes are read."""
    state = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(2).half()}
    content = bytearray(save(state))
    numbers = random.Random(0)
    file, read = tmp_path / "w.safetensors", 0
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        damaged = bytearray(content)
        damaged[numbers.randrange(length)] = numbers.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            header = read_header(file)
            read += 1
            assert_same_sizes(header.sizes, load_file(file))
    assert 0 < read < 300


def assert_same_sizes(sizes: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    assert sizes.keys() == loaded.keys()
    for name, value in loaded.items():
        assert (sizes[name].shape, sizes[name].dtype) == (value.shape, value.dtype)


def test_written_headers_are_the_librarys(tmp_path: Path) -> None:
    state = {"ä": torch.randn(3), "b": torch.randn(2).bfloat16(), "c": torch.tensor([True])}
    texts = {"note": 'quotes " and \n lines'}
    data = b"".join(bytes(v.view(torch.uint8).numpy()) for v in state.values())
    (tmp_path / "w").write_bytes(header_bytes(state, texts) + data)
    assert_same_sizes(read_header(tmp_path / "w").sizes, state)
    assert all(torch.equal(v, state[name]) for name, v in load_file(tmp_path / "w").items())
    with safe_open(tmp_path / "w", "pt") as opened:
        assert opened.metadata() == texts
    assert read_header(tmp_path / "w").length % 8 == 0
    with pytest.raises(CheckpointError, match=r"No entry .* can have the name '__metadata__'"):
        header_bytes({"__metadata__": torch.zeros(1)}, {})


# --- sharded models ------------------------------------------------------------------------------


def sharded(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write two shards with the safetensors library, and an index."""
    first = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    second = {"c": torch.randn(5).half()}
    save_file(first, folder / "m-00001-of-00002.safetensors", metadata={"epoch": "3"})
    save_file(second, folder / "m-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "m-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 66}, "weight_map": weight_map}))
    return index, first | second


def test_an_index_stands_for_its_shards(tmp_path: Path) -> None:
    index, state = sharded(tmp_path)
    loaded = openvclip.load_checkpoint(index)
    assert_same_state({name: loaded[name] for name in state}, state)
    assert loaded.keys() == state.keys()
    assert openvclip.inspect_checkpoint(index).metadata == {"epoch": "3"}
    parts = {
        "m-00001-of-00002.safetensors": {"a": state["a"], "b": state["b"]},
        "m-00002-of-00002.safetensors": {"c": state["c"]},
    }
    assert json.loads(index_bytes(parts, {})) == json.loads(index.read_text())


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"of": "all", "total_size": "66", "layers": 3, "tags": ["a"]}, {"of": "all"}),
        ({"epoch": "4"}, {"epoch": "4"}),
        (["epoch"], {}),
        (None, {}),
    ],
)
def test_texts_of_an_index_are_read(
    tmp_path: Path, metadata: object, expected: dict[str, str]
) -> None:
    index, _ = sharded(tmp_path)
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": metadata}))
    assert openvclip.inspect_checkpoint(index).metadata == {"epoch": "3", **expected}


def test_a_lying_index_is_refused(tmp_path: Path) -> None:
    index, state = sharded(tmp_path)
    good = tmp_path / "good.safetensors"
    save_file(state, good)
    text = index.read_text()
    first, second = (f"m-0000{k}-of-00002.safetensors" for k in (1, 2))
    invalid = {
        text.replace(second, "m-00003-of-00002.safetensors"): "there is no file m-00003",
        text.replace('"c"', '"d"'): f"{second} does not hold d",
        text.replace(f'"b": "{first}"', f'"b": "{second}"'): "does not hold b|does not list .* b",
        text.replace(f'"b": "{first}", ', ""): f"does not list these entries of {first}: b",
        text.replace(second, f"../{tmp_path.name}/{second}"): "name of a file beside it",
        text.replace(second, str(tmp_path / second)): "name of a file beside it",
        text.replace(f'"{second}"', "2"): "name of a file beside it",
        text.replace(second, ""): "name of a file beside it",
        text.replace('"b"', '"a"'): "'a' twice",
        text[:-2]: "is not JSON",
        json.dumps({"weight_map": [first]}): "it has no weight_map",
    }
    for index_text, reason in invalid.items():
        assert index_text != text
        index.write_text(index_text)
        refused_everywhere(index, good, reason)
    index.write_text(text)
    content = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=re.escape(second) + ".* is not a whole"):
        openvclip.load_checkpoint(index)
    (tmp_path / second).unlink()
    refused_everywhere(index, good, f"there is no file {second}")
