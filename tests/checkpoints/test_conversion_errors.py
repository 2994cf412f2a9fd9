"""Files that are no checkpoints or do not fit the model raise an error; no pickled code is run."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import openvclip
from openvclip.errors import (
    CheckpointError,
    OpenVCLIPError,
    StateMismatchError,
    UnsafeCheckpointError,
    UsageError,
)
from tests.checkpoints.test_conversion import (
    FILES,
    averaged,
    clip_state,
    same_entries,
    torchscript,
    training,
)
from tests.helpers import snapshot, tiny_clip

READERS = (openvclip.load_checkpoint, openvclip.inspect_checkpoint)
each_reader = pytest.mark.parametrize("read", READERS)
Reader = Callable[[Path], object]


# --- files of another kind -----------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


STRANGE = {
    "empty": (b"", "it is empty"),
    "a byte": (b"\x00", "it begins with the bytes 00"),
    "text": (b"epoch 1, loss 0.5\nepoch 2", "it is a text that begins with 'epoch 1, loss"),
    "umlauts": ("ä".encode() * 400 + b"!", "it is a text"),
    "umlauts, cut": (b"!" + "ä".encode() * 400, "it is a text"),
    "json": (b'{"epoch": 1, "loss": 0.5}', "it is a text"),
    "page": (b"\n<!DOCTYPE html><html>Quota exceeded", "web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
    "mp4": (b"\x00\x00\x00\x20ftypisom" + bytes(99), "an MP4"),
    "mkv": (b"\x1a\x45\xdf\xa3" + bytes(99), "a Matroska"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "gzip archive; unpack it first"),
    "no letters": (b"\xfe" * 100, "it begins with the bytes fe fe"),
    "zeros": (bytes(1000), "it begins with the bytes 00 00"),
    "zip": (zipped("notes.txt", "model.safetensors"), "zip archive of other things (notes.txt"),
    "npz": (numpy_archive(), "zip archive of other things (a.npy)"),
    "zip, cut": (zipped("archive/data.pkl")[:40], "cut off or damaged"),
    "pickle": (pickle.dumps({"a": [1.0]}), "it is a pickle but no checkpoint"),
}


@each_reader
@pytest.mark.parametrize("case", STRANGE)
def test_files_of_another_kind_are_named(tmp_path: Path, read: Reader, case: str) -> None:
    content, reason = STRANGE[case]
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(file)
    text = str(caught.value)
    assert reason in text
    assert f"{file} ({len(content)} bytes) is not a whole" in text
    assert "download it again" in text
    assert not isinstance(caught.value, UnsafeCheckpointError)


@each_reader
def test_missing_files_and_folders(tmp_path: Path, read: Reader) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*absent"):
        read(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"is a folder\. Give the file of weights\."):
        read(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"is a folder.* in it \(model\.safetensors\)"):
        read(tmp_path)
    with pytest.raises(CheckpointError):
        read(tmp_path / "model.safetensors" / "below a file")


@each_reader
@pytest.mark.parametrize(
    "case", ["openai-archive", "open-clip-safetensors", "open-clip-old-format", "hugging-face-bin"]
)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, read: Reader, case: str) -> None:
    file = tmp_path / "w"
    FILES[case].write(file)
    content = file.read_bytes()
    numbers = random.Random(0)
    lengths = {1, 4, 8, 9, 30, 512, len(content) - 1} | {
        numbers.randrange(1, len(content)) for _ in range(15)
    }
    for length in sorted(lengths):
        file.write_bytes(content[:length])
        if case == "open-clip-old-format" and read is openvclip.inspect_checkpoint:
            with contextlib.suppress(CheckpointError):
                read(file)  # sizes precede the values, so a cut among the values is not seen
            continue
        with pytest.raises(CheckpointError):
            read(file)


@each_reader
@pytest.mark.parametrize("case", ["open-clip-safetensors", "open-clip-old-format", "openai-state"])
def test_damaged_bytes_never_give_a_foreign_error(tmp_path: Path, read: Reader, case: str) -> None:
    file = tmp_path / "w"
    FILES[case].write(file)
    content = file.read_bytes()
    numbers = random.Random(1)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[numbers.randrange(min(len(content), 3000))] = numbers.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(OpenVCLIPError):
            read(file)


# --- no weights in it, or something among them ---------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "holds no weights; expected names"),
        ({"epoch": 3, "net": {"w": torch.zeros(1)}}, "'epoch': int, 'net': dict"),
        (
            {"state_dict": {"w": torch.zeros(1)}, "model": {"w": torch.zeros(1)}},
            r"weights under each of \['state_dict', 'model'\]",
        ),
        # The released averaging tool writes a list for an entry that it can't average.
        (
            {"model_state": {"w": torch.zeros(1), "n": [torch.zeros(1)]}},
            r"no tensors: n \(list\)",
        ),
        ({"w": torch.zeros(1), "epoch": 3}, r"no tensors: epoch \(int\)"),
    ],
)
@each_reader
def test_what_holds_no_state_dict_is_refused(
    tmp_path: Path, read: Reader, content: object, reason: str
) -> None:
    torch.save(content, tmp_path / "w")
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path / "w")


def test_a_tensor_beside_the_weights_is_none_of_them(tmp_path: Path) -> None:
    state = clip_state()
    torch.save({"loss": torch.tensor(0.3), "state_dict": state}, tmp_path / "w")
    assert openvclip.inspect_checkpoint(tmp_path / "w").beside == ("loss",)
    same_entries(openvclip.load_checkpoint(tmp_path / "w"), state)


def test_one_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    save_file({"a._orig_mod.w": torch.zeros(1), "a.w": torch.ones(1)}, tmp_path / "w")
    with pytest.raises(StateMismatchError, match="become the same"):
        openvclip.load_checkpoint(tmp_path / "w")


@pytest.mark.parametrize("wrong", ["query", "projection"])
def test_shapes_that_no_clip_has_are_refused(tmp_path: Path, wrong: str) -> None:
    names = {
        "query": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "projection": "visual_projection.weight",
    }
    FILES["hugging-face"].write(tmp_path / "w")
    state = load_file(tmp_path / "w") | {names[wrong]: torch.zeros(4)}
    save_file(state, tmp_path / "v")
    openvclip.inspect_checkpoint(tmp_path / "v")
    with pytest.raises(CheckpointError, match=names[wrong].replace(".", r"\.")):
        openvclip.load_checkpoint(tmp_path / "v")


# --- pickles -------------------------------------------------------------------------------------


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def with_bomb(where: str, mark: Path) -> dict[str, Any]:
    state = clip_state()
    if where == "beside":
        return {**training(state), "args": Bomb(mark)}
    return averaged({**state, "bomb": Bomb(mark)})  # type: ignore[dict-item]


@each_reader
@pytest.mark.parametrize("where", ["beside", "among"])
@pytest.mark.parametrize("zipped_format", [True, False])
def test_no_pickle_is_executed(
    tmp_path: Path, read: Reader, where: str, zipped_format: bool
) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "w.safetensors"
    torch.save(with_bomb(where, mark), file, _use_new_zipfile_serialization=zipped_format)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read(file)
    assert not mark.exists()
    for part in (str(file), "Nothing was run", "weights_only=False", "save_checkpoint"):
        assert part in str(caught.value)
    torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
    assert mark.exists(), "the bomb is a dud, so that this test shows nothing"


@each_reader
def test_a_bomb_in_the_clothes_of_torchscript_does_not_run(tmp_path: Path, read: Reader) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "w.pt"
    torch.save(with_bomb("beside", mark), file)
    torchscript(clip_state(), tmp_path / "good.pt")
    with zipfile.ZipFile(file) as bad, zipfile.ZipFile(tmp_path / "good.pt") as good:
        bomb = bad.read("w/data.pkl")
        entries = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, bomb if name.endswith("/data.pkl") else content)
    with pytest.raises(CheckpointError, match="TorchScript archive can't be read"):
        read(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(0.5), r"numpy\.\S*multiarray\.scalar"),
    ],
)
def test_what_a_checkpoint_needs_is_named(tmp_path: Path, value: object, name: str) -> None:
    torch.save({**averaged(clip_state()), "cfg": value}, tmp_path / "w")
    with pytest.raises(UnsafeCheckpointError, match=f"it needs {name}"):
        openvclip.load_checkpoint(tmp_path / "w")


# --- another model -------------------------------------------------------------------------------


def other_clip() -> Any:
    return tiny_clip(seed=9, layers=2, patch_size=2, width=32)


@pytest.mark.parametrize("case", ["openai-archive", "hugging-face", "open-vclip-ddp"])
def test_another_backbone_is_shown_side_by_side(tmp_path: Path, case: str) -> None:
    FILES[case].write(tmp_path / "w")
    model = other_clip()
    before = snapshot(model)
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(tmp_path / "w", model)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert rows[1] == ["file", "model"]
    assert rows[2:5] == [
        ["patch", "size", "4", "2"],
        ["vision", "width", "16", "32"],
        ["vision", "layers", "3", "2"],
    ]
    assert len(caught.value.unexpected) == 12
    assert all("visual.transformer.resblocks.2." in name for name in caught.value.unexpected)
    assert ("visual.conv1.weight", (32, 3, 2, 2), (16, 3, 4, 4)) in caught.value.mismatched
    assert "Build the model that the file is for" in str(caught.value)
    same_entries(dict(model.state_dict()), before)


def test_a_model_of_the_same_sizes_gets_no_table(tmp_path: Path) -> None:
    state = clip_state()
    del state["logit_scale"]
    torch.save({**state, "extra.w": torch.zeros(1)}, tmp_path / "w")
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(tmp_path / "w", tiny_clip())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("does not fit the model.")
    assert "allow_missing=['logit_scale']" in lines[1]
    assert "allow_unexpected=['extra.*']" in lines[1]
    assert lines[2:4] == ["  missing (1): logit_scale", "  unexpected (1): extra.w"]


def test_patterns_allow_what_they_name_and_no_more(tmp_path: Path) -> None:
    state = clip_state()
    removed = [name for name in state if name.startswith("transformer.")]
    remaining = {name: value for name, value in state.items() if name not in removed}
    torch.save({**remaining, "extra.w": torch.zeros(1), "other.w": torch.zeros(1)}, tmp_path / "w")
    model = tiny_clip(seed=9)
    before = snapshot(model)

    def load(missing: Any, unexpected: Any) -> dict[str, torch.Tensor]:
        return openvclip.load_checkpoint(
            tmp_path / "w", model, allow_missing=missing, allow_unexpected=unexpected
        )

    for missing, unexpected in (
        ("transformer.*", "extra.*"),
        ("transformer", ("extra.*", "other.*")),
        ((), "*"),
        ("Transformer.*", "*"),
    ):
        with pytest.raises(StateMismatchError):
            load(missing, unexpected)
        same_entries(dict(model.state_dict()), before)
    for missing, unexpected in (("transformer.*", ("extra.w", "other.?")), ("*", "*")):
        same_entries(load(missing, unexpected), remaining)
        same_entries(dict(model.state_dict()), {**before, **remaining})
        model.load_state_dict(before)


def test_no_pattern_allows_another_shape(tmp_path: Path) -> None:
    FILES["openai-state"].write(tmp_path / "w")
    with pytest.raises(StateMismatchError, match=r"shape of visual\.proj"):
        openvclip.load_checkpoint(
            tmp_path / "w", other_clip(), allow_missing="*", allow_unexpected="*"
        )


def test_an_entry_lost_on_the_way_is_missing_also_without_a_model(tmp_path: Path) -> None:
    state = clip_state()
    for name_lost in ("logit_scale", "visual.proj", "transformer.resblocks.0.attn.in_proj_bias"):
        torch.save(averaged({n: v for n, v in state.items() if n != name_lost}), tmp_path / "w")
        assert openvclip.inspect_checkpoint(tmp_path / "w").missing == (name_lost,)
        with pytest.raises(StateMismatchError) as caught:
            openvclip.load_checkpoint(tmp_path / "w")
        assert (caught.value.missing, caught.value.unexpected) == ([name_lost], [])
        assert name_lost not in openvclip.load_checkpoint(tmp_path / "w", allow_missing=name_lost)


def test_a_scale_of_one_number_fits_a_scalar(tmp_path: Path) -> None:
    state = clip_state()
    torch.save({**state, "logit_scale": state["logit_scale"][None]}, tmp_path / "w")
    model = tiny_clip(seed=9)
    openvclip.load_checkpoint(tmp_path / "w", model)
    same_entries(dict(model.state_dict()), state)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    FILES["openai-state"].write(tmp_path / "w")
    with pytest.raises(UsageError, match="to_empty"):
        openvclip.load_checkpoint(tmp_path / "w", tiny_clip().to("meta"))
