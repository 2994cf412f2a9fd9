"""A cache of text features on the disk, for commands that are called again and again.

Encoding 400 class names in 28 templates takes minutes on a CPU. The features depend only on the
text tower and on the texts, so a later call reads them from a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.api import save_checkpoint
from openvclip.errors import CheckpointError
from openvclip.models.text_weights import text_names, text_state
from openvclip.weights.hashing import weights_hash
from openvclip.weights.numerics import bytes_of
from openvclip.weights.shards import is_sharded

LIMIT = 256 << 20
"""Largest size of all files of a cache in bytes. The files that were not read for the longest time
are removed first."""

_ENTRY = "text_features"
_MARK = "openvclip"  # the key and the hash of the features: the file is whole, and no other's
_ABANDONED = 24 * 3600.0  # seconds; a temporary file of this age belongs to a process that died

# Parts of a configuration of transformers that change no feature.
_NOT_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version")

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


def cache_folder() -> Path | None:
    """Return the folder of the cache, or ``None`` if the user has no folder for caches.

    The environment variable ``OPENVCLIP_CACHE`` names the folder. Otherwise it is the folder
    ``openvclip`` in ``XDG_CACHE_HOME``, or in the usual folder of the platform: ``~/.cache``,
    ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows.
    """
    own = os.environ.get("OPENVCLIP_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    try:
        if own:
            return Path(own).expanduser()
        if os.path.isabs(shared):
            return Path(shared) / "openvclip"
        if sys.platform == "win32":
            return Path(local or Path.home() / "AppData" / "Local") / "openvclip" / "cache"
        caches = ("Library", "Caches") if sys.platform == "darwin" else (".cache",)
        return Path.home().joinpath(*caches, "openvclip")
    except RuntimeError:  # there is no home folder
        return None


@contextmanager
def text_cache(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Context manager in which text features are kept in a folder.

    Features that are read from the folder are bitwise those that the model computes. A file that is
    damaged, or that another program wrote, is ignored and replaced. Several processes can use one
    folder. If the folder can't be written, nothing is kept.

    Args:
        folder: the folder, such as :func:`cache_folder`. ``None`` uses no cache.
    """
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def cached_features(
    model: nn.Module, tokens: Sequence[Tensor], compute: Callable[[], Tensor]
) -> Tensor:
    """Return the result of ``compute``, from the cache if one is in use.

    Args:
        model: a CLIP model, whose text tower gives the features.
        tokens: token ids of the texts, in the batches in which they are encoded.
        compute: computes the features ``[K, D]``.
    """
    folder = _folder.get()
    key = None if folder is None else _key(model, tokens)
    if folder is None or key is None:
        return compute()
    path = folder / "text-features" / f"{key}.safetensors"
    features = _read(path, key)
    if features is None:
        features = compute()
        _write(path, key, features)
    return features.to(next(model.parameters()).device)


def _key(model: nn.Module, tokens: Sequence[Tensor]) -> str | None:
    """Return a hash of everything that text features depend on, or ``None`` if this is unknown."""
    state = text_state(model)
    structure = _structure(model)
    if structure is None or any(is_sharded(value) or value.is_meta for value in state.values()):
        return None
    device = next(model.parameters()).device
    autocast = torch.is_autocast_enabled(device.type)
    about = {
        "structure": structure,
        "weights": weights_hash(state),
        "tokens": [_digest(batch) for batch in tokens],
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "machine": _machine(device),
        "versions": [_version(name) for name in ("torch", "open_clip_torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _structure(model: nn.Module) -> list[str] | None:
    """Return the modules outside of the image tower with their settings.

    Returns:
        ``None`` if a module has hooks, or settings that can't be written down. Then the features
        can depend on code that the cache does not know.
    """
    modules = dict(model.named_modules())
    own = [name.removesuffix(".") for name in text_names(f"{name}." for name in modules if name)]
    lines = []
    for name in ("", *own):
        module = modules[name]
        # The attributes that torch gives to every module begin with an underscore. These two hold
        # functions that run in each forward pass.
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        settings = {key: _setting(value) for key, value in vars(module).items() if key[0] != "_"}
        if None in settings.values():
            return None
        settings.pop("training")  # texts are encoded in eval mode
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        lines.append(f"{name} {kind} {settings}")
    return lines


def _setting(value: Any) -> str | None:
    """Return a setting of a module as text, or ``None`` for an object of an unknown kind."""
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        parts = [_setting(part) for part in value]
        return None if None in parts else repr(parts)
    if isinstance(value, dict):
        return _setting(sorted(value.items(), key=repr))
    if isinstance(value, functools.partial):
        return _setting([value.func, value.args, value.keywords])
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict") and hasattr(
        value, "model_type"
    ):  # a configuration of transformers
        about = {k: v for k, v in value.to_dict().items() if k not in _NOT_SETTINGS}
        return json.dumps([about, getattr(value, "_attn_implementation", None)], default=str)
    return None


def _machine(device: torch.device) -> list[object]:
    """Return what decides how sums are rounded."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cpu = [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    return [name, *cpu, torch.get_float32_matmul_precision()]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(bytes_of(flat))
    return digest.hexdigest()


def _read(path: Path, key: str) -> Tensor | None:
    """Return the features of a file, or ``None`` if the file is not there or not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        mark = json.loads(data[8 : 8 + length])["__metadata__"][_MARK]
        features: Tensor = load(data)[_ENTRY]
        if mark != f"{key} {_digest(features)}":
            return None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
    with suppress(OSError):
        os.utime(path)  # the file was used now
    return features


def _write(path: Path, key: str, features: Tensor) -> None:
    """Write features; do nothing if the folder can't be written."""
    with suppress(OSError, CheckpointError):
        save_checkpoint({_ENTRY: features}, path, metadata={_MARK: f"{key} {_digest(features)}"})
        _prune(path.parent)


def _prune(folder: Path) -> None:
    """Remove the files that were not used for the longest time, and abandoned temporary files."""
    files = []
    for file in folder.iterdir():
        with suppress(OSError):  # another process removes files too
            status = file.stat()
            if file.suffix == ".safetensors":
                files.append((status.st_mtime, status.st_size, file))
            elif file.suffix == ".tmp" and time.time() - status.st_mtime > _ABANDONED:
                file.unlink()
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= LIMIT:
            return
        with suppress(OSError):
            file.unlink()
        total -= size
