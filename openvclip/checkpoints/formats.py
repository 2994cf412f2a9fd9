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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints.extra_state import decode, load_safely
from openvclip.checkpoints.file_kinds import SAFETENSORS, TORCHSCRIPT, kind_of_file, not_whole
from openvclip.checkpoints.folders import deepspeed_advice
from openvclip.checkpoints.layout import map_entries, read_errors
from openvclip.checkpoints.sharding import is_index, open_model, read_index
from openvclip.errors import CheckpointError, UnsafeCheckpointError, listed
from openvclip.weights.names import canonical_names, is_extra_state
from openvclip.weights.shards import is_sharded

# Names under which training code stores the weights, beside optimizers and counters.
_WEIGHT_KEYS = ("model_state", "state_dict", "model_state_dict", "model")

# Integers that OpenAI's files hold among the weights. They describe the model.
SETTINGS = frozenset({"input_resolution", "context_length", "vocab_size"})


@dataclass(frozen=True)
class WeightFile:
    """The weights of a file under canonical names.

    Attributes:
        path: the path of the file.
        format: ``"safetensors"``, ``"PyTorch"`` or ``"TorchScript"``, or several of them for the
            index of a model whose shards differ: ``"PyTorch and safetensors"``.
        weights: names to tensors. The tensors are on the meta device if only sizes were read.
        key: the top-level entry that holds the weights, or ``""`` if the file has no such entry.
        beside: the other top-level entries, such as the state of an optimizer.
        metadata: the texts in the header of a safetensors file.
        extra: the extra state of modules (``get_extra_state``), by name. It is no weight.
        gelu: whether the code of a TorchScript archive calls GELU.
        files: the files that hold the weights: the file itself, or the shards of an index.
    """

    path: Path
    format: str
    weights: dict[str, Tensor]
    key: str = ""
    beside: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    gelu: bool = False
    files: tuple[Path, ...] = ()


def read_weights(
    path: str | os.PathLike[str], *, sizes_only: bool = False, mapped: bool = False
) -> WeightFile:
    """Read a file of weights onto the CPU and keep its names.

    The entries of a safetensors file are mapped into memory and read when they are first used.

    Args:
        path: a safetensors, PyTorch or TorchScript file, or the index of a sharded model, whose
            shards are such files. The name of the file does not matter.
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
    kind = kind_of_file(file)
    if kind == SAFETENSORS:
        found, files = _read_safetensors(file, sizes_only)
        return _weight_file(file, kind, found, files)
    with read_errors(file):
        has_shards = is_index(file)
    if has_shards:
        return _read_shards(file, sizes_only, mapped)
    return _weight_file(file, kind, _read_found(file, kind, sizes_only, mapped), (file,))


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the texts in the header of a safetensors file, or of the index of a sharded model.

    Args:
        path: a file of weights. Files of other formats have no texts.

    Raises:
        CheckpointError: the file is missing, truncated or no file of weights.
    """
    file = Path(path)
    if kind_of_file(file) != SAFETENSORS:
        return {}
    with ExitStack() as stack:
        return open_model(file, stack)[1]


@dataclass(frozen=True)
class _Found:
    """The entries of a file under the names in the file, and what stands beside them."""

    entries: dict[str, object]
    key: str = ""
    beside: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    gelu: bool = False


def _weight_file(file: Path, kind: str, found: _Found, files: tuple[Path, ...]) -> WeightFile:
    weights: dict[str, Tensor] = {}
    extra: dict[str, object] = {}
    for name, file_name in canonical_names(found.entries).items():
        value = found.entries[file_name]
        if isinstance(value, Tensor) and not is_extra_state(name):
            weights[name] = value
        else:
            extra[name] = value
    return WeightFile(
        file, kind, weights, found.key, found.beside, found.metadata, extra, found.gelu, files
    )


def _read_found(file: Path, kind: str, sizes_only: bool, mapped: bool) -> _Found:
    """Read a file that is not a safetensors file."""
    if kind == TORCHSCRIPT:
        content: object = _read_torchscript(file)
    else:
        content = _read_torch(file, sizes_only, mapped)
    found = _find_weights(content, file)
    if sizes_only:  # a TorchScript archive is always read with its values
        for name, value in found.entries.items():
            if isinstance(value, Tensor) and not value.is_meta:
                found.entries[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return replace(found, gelu=_calls_gelu(file)) if kind == TORCHSCRIPT else found


def _read_shards(index_path: Path, sizes_only: bool, mapped: bool) -> WeightFile:
    """Read a sharded model whose shards are not all safetensors files."""
    with read_errors(index_path):
        index = read_index(index_path)
    entries: dict[str, object] = {}
    kinds, gelu = set(), False
    for shard in index.shards:
        kind = kind_of_file(shard)
        kinds.add(kind)
        if kind == SAFETENSORS:
            part = _read_safetensors(shard, sizes_only)[0]
        else:
            part = _read_found(shard, kind, sizes_only, mapped)
        index.require_listed(shard, part.entries)
        entries.update(part.entries)
        gelu = gelu or part.gelu
    found = _Found(entries, metadata=index.metadata, gelu=gelu)
    return _weight_file(index_path, " and ".join(sorted(kinds)), found, tuple(index.shards))


# --- reading -----------------------------------------------------------------------------------


def _read_safetensors(file: Path, sizes_only: bool) -> tuple[_Found, tuple[Path, ...]]:
    with ExitStack() as stack:
        shards, metadata = open_model(file, stack)
        weights: dict[str, Tensor] = {}
        for shard in shards:
            weights.update(shard.header.sizes if sizes_only else map_entries(shard))
    entries, texts = decode(weights, metadata, str(file))
    return _Found(entries, metadata=texts), tuple(shard.path for shard in shards)


def _read_torchscript(file: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but OpenAI's released files are TorchScript archives.
            warnings.filterwarnings("ignore", r".*torch\.jit\.load.* is deprecated")
            archive = torch.jit.load(os.fspath(file), map_location="cpu")
        return {name: value.detach() for name, value in archive.state_dict().items()}
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise not_whole(
            file, f"the TorchScript archive can't be read ({_summary(error)})"
        ) from error


def _calls_gelu(file: Path) -> bool:
    """Return whether the code of a TorchScript archive calls GELU. The code is not run."""
    with zipfile.ZipFile(file) as archive:
        sources = [name for name in archive.namelist() if name.endswith(".py")]
        return any(b"torch.gelu(" in archive.read(name) for name in sources)


def _read_torch(file: Path, sizes_only: bool, mapped: bool) -> object:
    if not sizes_only:
        return _load(file, "cpu", mapped)
    try:
        return _load(file, "meta", mapped=False)
    except UnsafeCheckpointError:
        raise
    except CheckpointError:  # sparse and quantised tensors have no meta device
        return _load(file, "cpu", mapped=True)


def _load(file: Path, device: str, mapped: bool) -> object:
    try:
        with warnings.catch_warnings():
            # torch.load may warn first (of the pickle protocol, for example) and then raise.
            warnings.simplefilter("ignore")
            # torch.load reads a path *.safetensors as safetensors, whatever the file contains.
            named_safetensors = file.suffix == ".safetensors"
            if mapped and not named_safetensors and zipfile.is_zipfile(file):
                return load_safely(file, map_location=device, mmap=True)
            with file.open("rb") as opened:
                return load_safely(opened, map_location=device)
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(file, error) from error
    except Exception as error:  # a damaged file raises errors of many kinds
        raise not_whole(file, f"it can't be read to its end ({_summary(error)})") from error


def _unsafe_or_damaged(file: Path, error: Exception) -> CheckpointError:
    text = str(error)
    if _SHARDED_CLASSES.search(text):
        return _sharded(file)
    needed = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    detail = text.partition("WeightsUnpickler error: ")[2].splitlines()[:1]
    if needed:
        reason = f"it needs {needed.group(1)}, which is not a tensor or a plain value"
    elif re.search(r"(?i)unsupported (class|global|nested)|unrecognized function|blocklist", text):
        reason = detail[0] if detail else _summary(error)
    else:
        return not_whole(file, "it is a pickle but no checkpoint of tensors and plain values")
    return UnsafeCheckpointError(
        f"Loading {file} could run arbitrary code: {reason}. Nothing was run. If you trust the "
        "source of the file, load it once with torch.load(path, weights_only=False), which runs "
        "such code. Then save only the weights: "
        "openvclip.save_checkpoint(loaded['state_dict'], 'weights.safetensors'), or "
        "loaded.state_dict() if the file holds a whole module."
        f"{_deepspeed_text(file)}"
    )


_SHARDED_CLASSES = re.compile(r"torch\.distributed\.\S*(tensor|mesh)", re.IGNORECASE)


def _sharded(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} holds the parts of one process (DTensor or ShardedTensor), which are not whole "
        "weights. Save whole weights in the training: every process calls "
        "openvclip.save_checkpoint(model.state_dict(), path), which gathers the parts."
    )


def _summary(error: Exception) -> str:
    """Return the type of an error and the first line of its text that is not empty."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- finding the weights -------------------------------------------------------------------------


def _find_weights(content: object, file: Path) -> _Found:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file} holds a {type(content).__name__}; expected a mapping of names to tensors."
            f"{_deepspeed_text(file)}"
        )
    if "ds_version" in content:
        return _find_deepspeed(content, file)
    app = content.get("app")  # the usual top-level entry of torch.distributed.checkpoint
    if isinstance(app, Mapping) and not _has_weights(content):
        return _find_weights(app, file)
    keys = [key for key in _WEIGHT_KEYS if _has_weights(content.get(key))]
    if len(keys) == 1:
        beside = tuple(str(key) for key in content if key != keys[0])
        return _Found(_entries(content[keys[0]], file), keys[0], beside)
    if keys or not _has_weights(content):
        raise _no_weights(content, keys, file)
    return _Found(_entries(content, file))


def _find_deepspeed(content: Mapping[Any, object], file: Path) -> _Found:
    """Return the weights of a file of DeepSpeed, which holds whole weights up to ZeRO stage 2."""
    weights = content.get("module")
    is_whole = content.get("mp_world_size", 1) == 1 and _has_weights(weights)
    if is_whole and isinstance(weights, Mapping):
        shapes = [value.numel() for value in weights.values() if isinstance(value, Tensor)]
        if all(shapes):  # stage 3 leaves empty tensors
            beside = tuple(str(key) for key in content if key != "module")
            return _Found(_entries(weights, file), "module", beside)
    raise CheckpointError(
        f"{file} holds a part of a checkpoint of DeepSpeed. Join the parts with the script "
        f"zero_to_fp32.py, which DeepSpeed writes beside its checkpoints.{_deepspeed_text(file)}"
    )


def _has_weights(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _no_weights(content: Mapping[Any, object], keys: list[str], file: Path) -> CheckpointError:
    entries = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in content.items())
    problem = f"weights under each of {keys}" if keys else "no weights"
    if content.keys() == {"state", "param_groups"}:
        problem = "the state of an optimizer and no weights"
    return CheckpointError(
        f"{file} holds {problem}; expected names mapped to tensors, at the top level or under one "
        f"of {', '.join(map(repr, _WEIGHT_KEYS))}. Its entries are {entries[:600]}. Load the file "
        "yourself and save the weights with openvclip.save_checkpoint."
        f"{_deepspeed_text(file)}"
    )


def _deepspeed_text(file: Path) -> str:
    try:
        advice = deepspeed_advice(file.parent)
    except OSError:
        return ""
    return f" {advice}" if advice else ""


def _entries(content: Mapping[Any, object], file: Path) -> dict[str, object]:
    """Return the tensors and the extra state of modules."""
    entries = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, Tensor) or is_extra_state(str(name))
    }
    if any(isinstance(value, Tensor) and is_sharded(value) for value in entries.values()):
        raise _sharded(file)
    others = [
        f"{name} ({type(value).__name__})"
        for name, value in content.items()
        if str(name) not in entries and str(name) not in SETTINGS
    ]
    if any("_packed_params" in name for name in others):
        raise CheckpointError(
            f"{file} holds the packed weights of quantised modules ({listed(others)}). Quantise "
            "after merging: give the file that the model was quantised from."
        )
    if others:
        raise CheckpointError(
            f"{file}: {len(others)} entries among the weights are no tensors: "
            f"{', '.join(others[:20])}. Remove these entries and save the other entries with "
            "openvclip.save_checkpoint."
        )
    return entries
