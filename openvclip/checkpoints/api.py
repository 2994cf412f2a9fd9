"""Load, save, convert and inspect files of weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.families import convert
from openvclip.checkpoints.formats import read_weights
from openvclip.checkpoints.inspection import (
    CheckpointInfo,
    describe,
    inspect_checkpoint,
    plan_of,
)
from openvclip.checkpoints.sizes import Sizes, model_sizes
from openvclip.errors import ActivationWarning, CheckpointError, StateMismatchError, UsageError
from openvclip.weights.names import canonical_state, mismatches, named_state
from openvclip.weights.shards import any_process, mesh_groups, whole

__all__ = [
    "CheckpointInfo",
    "atomic_path",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]


def save_checkpoint(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a state dict as a safetensors file, atomically, under canonical names.

    Sharded entries (``DTensor``, of a model under ``fully_shard``) are gathered one after the
    other. Every process that holds a part must call this function. The first process writes the
    file. All processes return when the file is complete.

    Args:
        state: names to tensors on any device. The prefixes of wrappers are removed from the names.
        path: the file to write. An existing file is replaced. Missing folders are created.
        dtype: the dtype in which floating-point entries are stored. Default: the dtype of each
            entry.
        metadata: texts to store in the header of the file. Default: none.

    Raises:
        WeightTypeError, StateMismatchError: ``state`` is not a state dict.
        CheckpointError: the file could not be written. An existing file is then unchanged.
    """
    entries = canonical_state(state, "state")
    groups = mesh_groups(entries.values())
    is_writer = all(group.rank() == 0 for group in groups)
    stored: dict[str, Tensor] = {}
    for name, value in entries.items():
        gathered = whole(value)  # every process takes part
        if is_writer:
            stored[name] = _to_store(gathered, dtype)
    failure = None
    try:
        if is_writer:
            _write(stored, path, metadata)
    except CheckpointError as error:
        failure = error
    if any_process([failure is not None], entries.values())[0]:
        failure = failure or CheckpointError(
            f"Could not write {os.fspath(path)}: see the error of the process that writes the file."
        )
    if failure is not None:
        raise failure


def _write(
    stored: dict[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None
) -> None:
    from safetensors.torch import save_file

    with write_errors(path), atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the mode that the umask of the process gives a new file
        save_file(stored, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # safetensors creates files that only their owner can read


def _to_store(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    stored_dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    # A copy, since safetensors refuses entries that share memory (tied weights, views).
    return value.to("cpu", stored_dtype, copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> dict[str, Tensor]:
    """Load a file of weights as a state dict on the CPU, under open_clip's names.

    These families are recognised from the content of the file: OpenAI's TorchScript archives and
    state dicts, open_clip's checkpoints, Hugging Face's CLIP, and the checkpoints of Open-VCLIP and
    FROSTER. The values are those of the file, bit for bit. Separate query,
    key and value weights are joined, and projections are transposed if open_clip stores them
    transposed. A state dict of open_clip, of openvclip or of an unknown model keeps its names.
    :func:`inspect_checkpoint` shows the content of a file without loading it.

    Args:
        path: a safetensors, PyTorch or TorchScript file, or the index of a sharded safetensors
            model.
        model: a model with open_clip's names, expanded or not, to load the weights into. The
            weights are converted to the dtypes and devices of the model. If an entry does not fit,
            the model is unchanged. The activation is not a weight: the weights of OpenAI,
            Open-VCLIP and FROSTER need a model whose name ends in ``-quickgelu``.
        allow_missing: names that may be missing from the file, as patterns of :mod:`fnmatch` such
            as ``"transformer.*"``. Default: none.
        allow_unexpected: names of entries that are left out if they have no place in the result,
            as patterns, for example ``("projector_*", "raw_model.*")`` for FROSTER. Default: none.

    Returns:
        The entries of the file, in the dtypes of the file.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, or it holds no weights.
        UnsafeCheckpointError: the file contains a pickle that could run arbitrary code.
        StateMismatchError: weights are left over or missing, or their shapes are not those of the
            model.
        UsageError: the model is on the meta device and has no memory for its weights.

    Warns:
        ActivationWarning: the weights were trained with QuickGELU, and the model has GELU.
    """
    allowed = _Allowed(_patterns(allow_missing), _patterns(allow_unexpected))
    if model is None:
        return _load(path, allowed)[0]
    state, info = _load(path, allowed, model)
    state = _copy_into(model, state, info)
    _check_activation(model, info)
    return state


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> CheckpointInfo:
    """Convert a file of weights to a safetensors file under open_clip's names, atomically.

    The header of the new file stores the family that the weights came from, as ``source_family``.
    Unlike :func:`load_checkpoint`, this function also refuses a file of open_clip if some blocks of
    a tower lack entries that other blocks have.

    Args:
        source: a file that :func:`load_checkpoint` can load.
        target: the file to write. An existing file is replaced.
        dtype: the dtype in which floating-point entries are stored. Default: the dtype of each
            entry.
        allow_missing: see :func:`load_checkpoint`.
        allow_unexpected: see :func:`load_checkpoint`.

    Returns:
        The content of ``source``.

    Raises:
        CheckpointError: ``source`` can't be read, see :func:`load_checkpoint`, or ``target`` could
            not be written.
        UnsafeCheckpointError, StateMismatchError: see :func:`load_checkpoint`.
    """
    allowed = _Allowed(_patterns(allow_missing), _patterns(allow_unexpected))
    state, info = _load(source, allowed, even_blocks=True)
    metadata = {**info.metadata, "source_family": info.source_family}
    save_checkpoint(state, target, dtype=dtype, metadata=metadata)
    return info


# --- names and shapes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Allowed:
    """Patterns for the names that may be missing, and for the names that may be unexpected."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def not_missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that must not be missing."""
        return [name for name in names if not _matches(name, self.missing)]

    def not_unexpected(self, names: Iterable[str]) -> list[str]:
        """Return the names that must not be unexpected."""
        return [name for name in names if not _matches(name, self.unexpected)]


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _load(
    path: str | os.PathLike[str],
    allowed: _Allowed,
    model: nn.Module | None = None,
    *,
    even_blocks: bool = False,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read and convert a file, and check all names and shapes before the model is changed.

    Args:
        path: the file.
        allowed: names that may be missing or unexpected.
        model: the model that the weights must fit. Default: the weights must fit open_clip's CLIP.
        even_blocks: whether to check, for files that keep their names, that all blocks of a tower
            have the same entries. Files that are converted are always checked. The argument has no
            effect if ``model`` is given.
    """
    file = read_weights(path)
    plan = plan_of(file)
    info = describe(file, plan)
    state = convert(plan, file.weights)
    left_over = allowed.not_unexpected(plan.left_over)
    if model is not None:
        _require_fit(state, left_over, named_state(model), info, allowed)
        return state, info
    missing = allowed.not_missing(plan.missing if info.converted or even_blocks else ())
    if left_over or missing:
        raise StateMismatchError(
            f"{info.path}: the entries of this {info.family} checkpoint are not exactly those of "
            "open_clip's CLIP.",
            missing=missing,
            unexpected=left_over,
            hint=_hint(missing, left_over),
        )
    return state, info


def _require_fit(
    state: dict[str, Tensor],
    left_over: list[str],
    live: Mapping[str, Tensor],
    info: CheckpointInfo,
    allowed: _Allowed,
) -> None:
    for name in ("logit_scale", "logit_bias"):  # of shape [] in some versions, [1] in others
        if name in live and name in state and live[name].numel() == state[name].numel() == 1:
            state[name] = state[name].reshape(live[name].shape)
    missing = allowed.not_missing(live.keys() - state.keys())
    unexpected = [*allowed.not_unexpected(state.keys() - live.keys()), *left_over]
    mismatched = list(mismatches(live, state))
    if missing or unexpected or mismatched:
        raise StateMismatchError(
            f"{info.path} does not fit the model.{_sizes_table(info.sizes, model_sizes(live))}",
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            hint=_hint(missing, unexpected, mismatched=bool(mismatched)),
        )


def _sizes_table(file: Sizes, model: Sizes) -> str:
    """Return a table of the sizes in which a file and a model differ, or an empty text."""
    rows = [
        (size.name.replace("_", " "), getattr(file, size.name), getattr(model, size.name))
        for size in fields(Sizes)
    ]
    different = [(title, str(a or "-"), str(b or "-")) for title, a, b in rows if a != b]
    if not different:
        return ""
    table = [("", "file", "model"), *different]
    return "".join(f"\n  {title:<16}{a:<20}{b}".rstrip() for title, a, b in table)


def _hint(missing: list[str], unexpected: list[str], *, mismatched: bool = False) -> str:
    if mismatched:
        return "Build the model that the file is for, or give a file that is for this model."
    hints = []
    if missing:
        hints.append(f"allow_missing={_hint_patterns(missing)} to accept that these are missing")
    if unexpected:
        hints.append(f"allow_unexpected={_hint_patterns(unexpected)} to leave these entries out")
    return f"If this is intended, give {' and '.join(hints)}."


def _hint_patterns(names: list[str]) -> list[str]:
    return sorted({f"{name.partition('.')[0]}.*" if "." in name else name for name in names})


# --- into a model --------------------------------------------------------------------------------


def _copy_into(
    model: nn.Module, state: Mapping[str, Tensor], info: CheckpointInfo
) -> dict[str, Tensor]:
    """Copy the entries that the model has into the model, and return these entries."""
    live = named_state(model)
    state = {name: value for name, value in state.items() if name in live}
    if any(live[name].is_meta for name in state):
        raise UsageError(
            f"{info.path} can't be loaded: the model is on the meta device and has no memory for "
            "its weights. Call model.to_empty(device=...) first."
        )
    with torch.no_grad():
        for name, value in state.items():
            live[name].copy_(value)
    return state


def _check_activation(model: nn.Module, info: CheckpointInfo) -> None:
    # OpenAI's code, open_clip and Hugging Face each have a class with "Quick" in its name.
    kinds = {type(module).__name__ for module in model.modules()}
    if info.quick_gelu and "GELU" in kinds and not any("quick" in kind.lower() for kind in kinds):
        warnings.warn(
            f"The weights of {info.path} ({info.source_family}) were trained with QuickGELU, but "
            "the model has GELU and computes other features. Create the open_clip model whose name "
            "ends in -quickgelu, or create the model with force_quick_gelu=True.",
            ActivationWarning,
            stacklevel=3,
        )
