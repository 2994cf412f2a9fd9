"""Read the weights of safetensors, PyTorch and TorchScript files.

The format of a file is recognised from its content, not from its name. No pickled code is run:
PyTorch files are read with ``weights_only=True``. TorchScript archives are read with
``torch.jit.load``, which restores tensors and calls no Python code.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints.layout import map_entries
from openvclip.checkpoints.sharding import is_index, open_model
from openvclip.errors import CheckpointError, UnsafeCheckpointError, near_path
from openvclip.weights.names import canonical_state, listed

SAFETENSORS, TORCH, TORCHSCRIPT = "safetensors", "PyTorch", "TorchScript"

# Names under which training code stores the weights, beside optimizers and counters.
_WEIGHT_KEYS = ("model_state", "state_dict", "model_state_dict", "model")

# Integers that OpenAI's files hold among the weights. They describe the model.
SETTINGS = frozenset({"input_resolution", "context_length", "vocab_size"})

# Other kinds of files that users give by mistake, by their first bytes.
_OTHER_KINDS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "an AVI, WAV or WebP file"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
)


@dataclass(frozen=True)
class WeightFile:
    """The weights of a file under canonical names.

    Attributes:
        path: the path of the file.
        format: ``"safetensors"``, ``"PyTorch"`` or ``"TorchScript"``.
        weights: names to tensors. The tensors are on the meta device if only sizes were read.
        key: the top-level entry that holds the weights, or ``""`` if the file has no such entry.
        beside: the other top-level entries, such as the state of an optimizer.
        metadata: the texts in the header of a safetensors file.
    """

    path: Path
    format: str
    weights: dict[str, Tensor]
    key: str
    beside: tuple[str, ...]
    metadata: dict[str, str]


def read_weights(
    path: str | os.PathLike[str], *, sizes_only: bool = False, mapped: bool = False
) -> WeightFile:
    """Read a file of weights onto the CPU and keep its names.

    The entries of a safetensors file are mapped into memory and read when they are first used.

    Args:
        path: a safetensors, PyTorch or TorchScript file, or the index of a sharded safetensors
            model. The name of the file does not matter.
        sizes_only: return tensors on the meta device, with shapes and dtypes but without values.
            Of a safetensors file, only the header is then read.
        mapped: map the entries of a PyTorch file into memory as well, if its format allows this.
            The file must then not change while the tensors are used. Default: ``False``.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, or it holds no weights.
        UnsafeCheckpointError: the file contains a pickle that could run arbitrary code.
        StateMismatchError: two names differ only by the prefix of a wrapper.
    """
    file = Path(path)
    kind = kind_of(file)
    if kind == SAFETENSORS:
        weights, metadata = _read_safetensors(file, sizes_only)
        return WeightFile(file, kind, canonical_state(weights, str(file)), "", (), metadata)
    if kind == TORCHSCRIPT:
        content: object = _read_torchscript(file)
    else:
        content = _read_torch(file, sizes_only, mapped)
    weights, key, beside = _find_weights(content, file)
    if sizes_only:  # a TorchScript archive is always read with its values
        weights = {name: value.to("meta") for name, value in weights.items()}
    return WeightFile(file, kind, canonical_state(weights, str(file)), key, beside, {})


# --- the kind of a file ------------------------------------------------------------------------


def kind_of(file: Path) -> str:
    """Return ``SAFETENSORS``, ``TORCH`` or ``TORCHSCRIPT``.

    The index of a sharded model is ``SAFETENSORS`` as well.

    Raises:
        CheckpointError: there is no such file, or it is of another kind.
    """
    try:
        if file.is_dir():
            raise CheckpointError(
                f"There is no file {file}: it is a folder. Give the file of weights"
                f"{_candidates_text(file)}."
            )
        if not file.is_file():
            raise CheckpointError(
                f"There is no file {file}{near_path(file)}; expected a file of weights "
                "(.safetensors, .pt, .pth, .bin)."
            )
        with file.open("rb") as opened:
            head = opened.read(512)
        has_index = is_index(file)
    except OSError as error:
        raise CheckpointError(f"Can't read {file}: {error}.") from error
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(file)
    if (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32) or has_index:
        return SAFETENSORS
    if len(head) > 1 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return TORCH  # the format of torch.save before PyTorch 1.6
    raise _not_whole(file, _description(head))


def _candidates_text(folder: Path) -> str:
    endings = (".safetensors", ".pt", ".pth", ".bin")
    candidates = sorted(entry.name for entry in folder.iterdir() if entry.suffix in endings)
    return f" in it ({listed(candidates)})" if candidates else ""


def _kind_of_zip(file: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _not_whole(file, f"the archive is cut off or damaged ({error})") from error
    last_parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last_parts:
        return TORCHSCRIPT
    if "data.pkl" in last_parts:
        return TORCH
    raise _not_whole(file, f"it is a zip archive of other things ({listed(names) or 'nothing'})")


def _not_whole(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file, PyTorch "
        f"checkpoint or TorchScript archive: {reason}. Check the path, or copy or download it "
        "again."
    )


def _description(head: bytes) -> str:
    if not head:
        return "it is empty"
    for first_bytes, description in _OTHER_KINDS:
        if head.startswith(first_bytes):
            return f"it is {description}"
    if head[4:8] == b"ftyp":
        return "it is an MP4 or QuickTime video"
    text = head.decode("utf-8", errors="ignore")
    cut_off = len(head) - len(text.encode())  # bytes of a letter that continues after the head
    if cut_off < 4 and all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        if text.lstrip()[:1] == "<":
            return "it is a web page or XML, perhaps because a download failed"
        return f"it is a text that begins with {text.strip()[:40]!r}"
    return f"it begins with the bytes {head[:8].hex(' ')}, which none of these formats does"


# --- reading -----------------------------------------------------------------------------------


def _read_safetensors(file: Path, sizes_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    with ExitStack() as stack:
        shards, metadata = open_model(file, stack)
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights.update(shard.header.sizes if sizes_only else map_entries(shard))
    return weights, metadata


def _read_torchscript(file: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but OpenAI's released files are TorchScript archives.
            warnings.filterwarnings("ignore", r".*torch\.jit\.load.* is deprecated")
            archive = torch.jit.load(os.fspath(file), map_location="cpu")
        return {name: value.detach() for name, value in archive.state_dict().items()}
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise _not_whole(
            file, f"the TorchScript archive can't be read ({_summary(error)})"
        ) from error


def _read_torch(file: Path, sizes_only: bool, mapped: bool) -> object:
    try:
        with warnings.catch_warnings():
            # torch.load may warn first (of the pickle protocol, for example) and then raise.
            warnings.simplefilter("ignore")
            device = "meta" if sizes_only else "cpu"
            # torch.load reads a path *.safetensors as safetensors, whatever the file contains.
            named_safetensors = file.suffix == ".safetensors"
            if mapped and not named_safetensors and zipfile.is_zipfile(file):
                return torch.load(file, map_location=device, weights_only=True, mmap=True)
            with file.open("rb") as opened:
                return torch.load(opened, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(file, error) from error
    except Exception as error:  # a damaged file raises errors of many kinds
        raise _not_whole(file, f"it can't be read to its end ({_summary(error)})") from error


def _unsafe_or_damaged(file: Path, error: Exception) -> CheckpointError:
    text = str(error)
    needed = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    detail = text.partition("WeightsUnpickler error: ")[2].splitlines()[:1]
    if needed:
        reason = f"it needs {needed.group(1)}, which is not a tensor or a plain value"
    elif re.search(r"(?i)unsupported (class|global|nested)|unrecognized function|blocklist", text):
        reason = detail[0] if detail else _summary(error)
    else:
        return _not_whole(file, "it is a pickle but no checkpoint of tensors and plain values")
    return UnsafeCheckpointError(
        f"Loading {file} could run arbitrary code: {reason}. Nothing was run. If you trust the "
        "source of the file, load it once with torch.load(path, weights_only=False), which runs "
        "such code. Then save only the weights: "
        "openvclip.save_checkpoint(loaded['state_dict'], 'weights.safetensors')."
    )


def _summary(error: Exception) -> str:
    """Return the type of an error and the first line of its text that is not empty."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- finding the weights -------------------------------------------------------------------------


def _find_weights(content: object, file: Path) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(content).__name__}; expected a mapping of names to tensors."
        )
    keys = [key for key in _WEIGHT_KEYS if _has_weights(content.get(key))]
    if len(keys) == 1:
        beside = tuple(str(key) for key in content if key != keys[0])
        return _tensors(content[keys[0]], file), keys[0], beside
    if keys or not _has_weights(content):
        raise _no_weights(content, keys, file)
    return _tensors(content, file), "", ()


def _has_weights(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _no_weights(content: Mapping[Any, object], keys: list[str], file: Path) -> CheckpointError:
    entries = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in content.items())
    problem = f"weights under each of {keys}" if keys else "no weights"
    return CheckpointError(
        f"{file} holds {problem}; expected names mapped to tensors, at the top level or under one "
        f"of {', '.join(map(repr, _WEIGHT_KEYS))}. Its entries are {entries[:600]}. Load the file "
        "yourself and save the weights with openvclip.save_checkpoint."
    )


def _tensors(entries: Mapping[Any, object], file: Path) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    others = [
        f"{name} ({type(value).__name__})"
        for name, value in entries.items()
        if not isinstance(value, Tensor) and str(name) not in SETTINGS
    ]
    if others:
        raise CheckpointError(
            f"{file}: {len(others)} entries among the weights are no tensors: "
            f"{', '.join(others[:20])}. Remove these entries and save the other entries with "
            "openvclip.save_checkpoint."
        )
    return tensors
