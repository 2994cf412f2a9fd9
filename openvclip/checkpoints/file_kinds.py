"""Recognise the kind of a file from its content, and say what to do with files of other kinds.

The name of a file does not matter.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

from openvclip.checkpoints.folders import advice_for_folder, advice_for_part
from openvclip.checkpoints.sharding import is_index, shard_names_in
from openvclip.errors import CheckpointError, listed, near_path

SAFETENSORS, TORCH, TORCHSCRIPT = "safetensors", "PyTorch", "TorchScript"

_CONVERT = "load its arrays, and save them as tensors with openvclip.save_checkpoint"

# Other kinds of files that users give by mistake: the position of the first bytes, these bytes, and
# what the file is.
_OTHER_KINDS = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"RIFF", "an AVI, WAV or WebP file"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (0, b"%PDF", "a PDF"),
    (0, b"\x89HDF", f"an HDF5 file, as Keras writes; {_CONVERT}"),
    (0, b"\x93NUMPY", f"a NumPy array; {_CONVERT}"),
    (0, b"GGUF", "a GGUF file, whose weights are quantised; give the file it was made from"),
    (0, b"ggml", "a GGML file, whose weights are quantised; give the file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model; give the file it was made from"),
    (4, b"ET12", "an ExecuTorch program; give the file it was made from"),
    (0, b"\x08\x01\x12", "a SavedModel of TensorFlow; convert it to PyTorch first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (0, b"Rar!", "a RAR archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (0, b"/annex/objects", "a git-annex pointer, not the file itself; run `git annex get`"),
)


def kind_of_file(file: Path) -> str:
    """Return ``SAFETENSORS``, ``TORCH`` or ``TORCHSCRIPT``.

    The index of a sharded model is ``SAFETENSORS`` if all its shards are, and ``TORCH`` otherwise.

    Raises:
        CheckpointError: there is no such file, or it is of another kind.
    """
    try:
        _require_file(file)
        with file.open("rb") as opened:
            head = opened.read(512)
        if is_index(file):
            return _kind_of_shards(file)
        advice = advice_for_part(file)
    except OSError as error:
        raise CheckpointError(f"Can't read {file}: {error}.") from error
    if advice:
        raise CheckpointError(f"{file} is one part of a checkpoint. {advice}")
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if len(head) > 1 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return TORCH  # the format of torch.save before PyTorch 1.6
    raise not_whole(file, _description(head))


def not_whole(file: Path, reason: str) -> CheckpointError:
    """Return the error for a file that can't be read as weights."""
    return CheckpointError(
        f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file, PyTorch "
        f"checkpoint or TorchScript archive: {reason}. Check the path, or copy or download it "
        "again."
    )


def _require_file(file: Path) -> None:
    if file.is_dir():
        advice = advice_for_folder(file) or "Give the file of weights."
        raise CheckpointError(f"There is no file {file}: it is a folder. {advice}")
    if not file.is_file():
        raise CheckpointError(
            f"There is no file {file}{near_path(file)}; expected a file of weights "
            "(.safetensors, .pt, .pth, .bin)."
        )


def _kind_of_shards(index: Path) -> str:
    # A shard that is missing is reported when the shards are opened.
    shards = [index.with_name(name) for name in sorted(shard_names_in(index))]
    kinds = {kind_of_file(shard) for shard in shards if shard.is_file()}
    return TORCH if kinds - {SAFETENSORS} else SAFETENSORS


def _kind_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise not_whole(file, f"the archive is cut off or damaged ({error})") from error
    last_parts = {name.rpartition("/")[2] for name in names}
    if {"archive_format", "serialized_exported_program.json"} & last_parts:
        raise not_whole(
            file,
            "it is a program of torch.export; load it with torch.export.load, and save its "
            "state_dict with openvclip.save_checkpoint",
        )
    if "constants.pkl" in last_parts:
        return TORCHSCRIPT
    if "data.pkl" in last_parts:
        return TORCH
    raise not_whole(file, f"it is {_description_of_zip(names)}")


def _description_of_zip(names: list[str]) -> str:
    description = f"a zip archive of other things ({listed(names) or 'nothing'})"
    if names and all(name.endswith(".npy") for name in names):
        return f"{description}, a .npz file of NumPy; {_CONVERT}"
    weights = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    if weights:
        return f"{description}; unpack it, and give the file of weights ({listed(weights)})"
    return description


def _description(head: bytes) -> str:
    if not head:
        return "it is empty"
    for position, first_bytes, description in _OTHER_KINDS:
        if head.startswith(first_bytes, position):
            return f"it is {description}"
    if head[0] == 0x08 and head[1:2] <= b"\x20" and (b"onnx" in head or b"pytorch" in head):
        return "it is an ONNX model; give the file it was exported from"
    if 0x81 <= head[0] <= 0x8F and 0xA1 <= head[1] <= 0xBF:
        return f"it is a msgpack file, as Flax writes; {_CONVERT}"
    text = head.decode("utf-8", errors="ignore")
    cut_off = len(head) - len(text.encode())  # bytes of a letter that continues after the head
    if cut_off < 4 and all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        if text.lstrip()[:1] == "<":
            return "it is a web page or XML, perhaps because a download failed"
        return f"it is a text that begins with {text.strip()[:40]!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}, which none of these formats does"
