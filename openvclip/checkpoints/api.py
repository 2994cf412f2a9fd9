"""Files of weights: safe loading and atomic saving."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.families import convert
from openvclip.checkpoints.formats import read_weights
from openvclip.checkpoints.inspection import (
    CheckpointInfo,
    Sizes,
    describe,
    inspect_checkpoint,
    model_sizes,
    plan_of,
)
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
    """Save a state dict as a safetensors file, atomically, under plain names.

    A state with sharded entries (``DTensor``, of a model under ``fully_shard``) is put together
    entry by entry: every process that holds a part calls this, the first one writes, and all
    return when the file is there.

    Args:
        state: names (wrappers' prefixes are taken out) to tensors on any device.
        path: the file to write; its folder is made where it is missing.
        dtype: dtype to store floating-point entries in; their own by default.
        metadata: texts to keep in the file's header.

    Raises:
        WeightTypeError, StateMismatchError: ``state`` is not a state dict.
        CheckpointError: the file could not be written; an older file is left as it was.
    """
    given = canonical_state(state, "state")
    groups = mesh_groups(given.values())
    writer = all(group.rank() == 0 for group in groups)
    plain: dict[str, Tensor] = {}
    for name, value in given.items():
        entry = whole(value)
        if writer:
            plain[name] = _stored(entry, dtype)
    failure = None
    try:
        if writer:
            _write(plain, path, metadata)
    except CheckpointError as error:
        failure = error
    if any_process([failure is not None], given.values())[0]:
        failure = failure or CheckpointError(
            f"Could not write {os.fspath(path)}: the process that writes it says why."
        )
    if failure is not None:
        raise failure


def _write(
    plain: dict[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None
) -> None:
    from safetensors.torch import save_file

    with write_errors(path), atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the process's umask gives a new file
        save_file(plain, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # safetensors makes files that their owner alone can read


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    # Entries that share memory (tied weights, views) are written as entries of their own.
    return value.to("cpu", wanted, copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> dict[str, Tensor]:
    """Load a file of weights as a state dict on the CPU, under open_clip's names.

    Known from their content, whatever the file is called: OpenAI's TorchScript archives and state
    dicts, open_clip's checkpoints, Hugging Face's CLIP, and the checkpoints of Open-VCLIP and
    FROSTER. The values come bit for bit; separate query, key and value weights are joined and
    projections transposed where open_clip has them so. A state dict that needs no new names (of
    open_clip, of openvclip, or of any other model) is returned as it is.
    :func:`inspect_checkpoint` tells what a file holds without loading it.

    Args:
        path: a safetensors, PyTorch or TorchScript file.
        model: a model with open_clip's names, expanded or not, to load the weights into. They
            take its dtypes and devices; it is left as it was if anything does not fit. The
            activation is no weight: OpenAI's, Open-VCLIP's and FROSTER's weights belong into a
            model whose name ends in ``-quickgelu``.
        allow_missing: names that need not be there, as patterns of :mod:`fnmatch` such as
            ``"transformer.*"``.
        allow_unexpected: names that may be in the file with no place in the result, for example
            ``("projector_*", "raw_model.*")`` for FROSTER; they are left out.

    Returns:
        The entries that the file gives, in the file's dtypes.

    Raises:
        CheckpointError: there is no such file, it is truncated or of another kind, or it holds
            no weights.
        UnsafeCheckpointError: the file can't be read without running code that it names.
        StateMismatchError: weights are left over, missing or of other shapes than the model's.
        UsageError: the model has no memory for its weights (it is on the meta device).

    Warns:
        ActivationWarning: the weights were trained with QuickGELU, and the model has GELU.
    """
    missing, unexpected = _Allowed(allow_missing), _Allowed(allow_unexpected)
    state, info = _load(path, missing, unexpected, model, whole=False)
    if model is not None:
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
    """Write a file of weights as safetensors under open_clip's names, atomically.

    Its header says which family the weights came from. Unlike :func:`load_checkpoint` this also
    refuses a file under open_clip's own names some of whose blocks lack what others have.

    Args:
        source: a file that :func:`load_checkpoint` knows.
        target: the file to write.
        dtype: dtype to store floating-point entries in; their own by default.
        allow_missing: see :func:`load_checkpoint`.
        allow_unexpected: see :func:`load_checkpoint`.

    Returns:
        What ``source`` holds.

    Raises:
        CheckpointError, UnsafeCheckpointError, StateMismatchError: as for
            :func:`load_checkpoint`; or ``target`` could not be written.
    """
    missing, unexpected = _Allowed(allow_missing), _Allowed(allow_unexpected)
    state, info = _load(source, missing, unexpected, None, whole=True)
    metadata = {**info.metadata, "source_family": info.source_family}
    save_checkpoint(state, target, dtype=dtype, metadata=metadata)
    return info


class _Allowed:
    """Names that match one of some patterns; a single text is one pattern, not its letters."""

    def __init__(self, patterns: str | Iterable[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def __contains__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


def _load(
    path: str | os.PathLike[str],
    missing: _Allowed,
    unexpected: _Allowed,
    model: nn.Module | None,
    *,
    whole: bool,
) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """The converted weights, once all that is wrong with their names and shapes is known."""
    file = read_weights(path)
    plan = plan_of(file)
    info = describe(file, plan)
    state = convert(plan, file.weights)
    left_over = [name for name in plan.left_over if name not in unexpected]
    if model is not None:
        _require_fit(state, left_over, named_state(model), info, missing, unexpected)
        return state, info
    judged = plan.missing if info.converted or whole else ()
    lacking = [name for name in judged if name not in missing]
    if left_over or lacking:
        raise StateMismatchError(
            f"{info.path}: not every weight of this {info.family} checkpoint has its place in "
            "open_clip's CLIP.",
            missing=lacking,
            unexpected=left_over,
            hint=_hint(lacking, left_over),
        )
    return state, info


def _require_fit(
    state: dict[str, Tensor],
    left_over: list[str],
    live: Mapping[str, Tensor],
    info: CheckpointInfo,
    missing: _Allowed,
    unexpected: _Allowed,
) -> None:
    for name in ("logit_scale", "logit_bias"):  # scalars in some versions, one number in others
        if name in live and name in state and live[name].numel() == state[name].numel() == 1:
            state[name] = state[name].reshape(live[name].shape)
    lacking = [name for name in live.keys() - state.keys() if name not in missing]
    strange = [name for name in state.keys() - live.keys() if name not in unexpected]
    different = list(mismatches(live, state))
    if lacking or strange or left_over or different:
        raise StateMismatchError(
            f"{info.path} does not fit the model.{_side_by_side(info, model_sizes(live))}",
            missing=lacking,
            unexpected=[*strange, *left_over],
            mismatched=different,
            hint=_hint(lacking, [*strange, *left_over], different=bool(different)),
        )


def _side_by_side(file: Sizes, model: Sizes) -> str:
    """A table of the sizes in which a file and a model differ, or nothing."""
    rows = [
        (entry.name.replace("_", " "), getattr(file, entry.name), getattr(model, entry.name))
        for entry in fields(Sizes)
    ]
    unlike = [(title, str(a or "-"), str(b or "-")) for title, a, b in rows if a != b]
    if not unlike:
        return ""
    table = [("", "file", "model"), *unlike]
    return "".join(f"\n  {title:<16}{a:<20}{b}".rstrip() for title, a, b in table)


def _hint(lacking: list[str], strange: list[str], *, different: bool = False) -> str:
    if different:
        return "Build the model that the file is for, or take the file that is for the model."
    hints = []
    if lacking:
        hints.append(f"allow_missing={_patterns(lacking)} to keep what the model has of these")
    if strange:
        hints.append(f"allow_unexpected={_patterns(strange)} to leave these out")
    return f"If this is meant, give {' and '.join(hints)}."


def _patterns(names: list[str]) -> list[str]:
    first = {f"{name.partition('.')[0]}.*" if "." in name else name for name in names}
    return sorted(first)


def _copy_into(
    model: nn.Module, state: Mapping[str, Tensor], info: CheckpointInfo
) -> dict[str, Tensor]:
    """Load the entries that the model has, and return these."""
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
    # QuickGELU is a class of its own in OpenAI's code, in open_clip and in Hugging Face's.
    kinds = {type(module).__name__ for module in model.modules()}
    if info.quick_gelu and "GELU" in kinds and not any("quick" in kind.lower() for kind in kinds):
        warnings.warn(
            f"The weights of {info.path} ({info.source_family}) were trained with QuickGELU, but "
            "the model has GELU, with which they give other features. Create the open_clip model "
            "whose name ends in -quickgelu, or with force_quick_gelu=True.",
            ActivationWarning,
            stacklevel=3,
        )
