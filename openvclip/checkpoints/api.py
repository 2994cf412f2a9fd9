"""Load, save, convert and inspect files of weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openvclip.checkpoints.adapter_files import read_fine_tune
from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_KEY, contract_to_merge
from openvclip.checkpoints.extra_state import encode
from openvclip.checkpoints.families import convert, plan_as_named, require_one_model
from openvclip.checkpoints.fit import (
    Allowed,
    allowed_patterns,
    copy_into,
    hint,
    plan_for_model,
    require_fit,
)
from openvclip.checkpoints.formats import read_weights
from openvclip.checkpoints.hugging_face import open_clip_name
from openvclip.checkpoints.inspection import (
    CheckpointInfo,
    describe,
    inspect_checkpoint,
    plan_of,
)
from openvclip.checkpoints.layout import require_storable
from openvclip.checkpoints.task_vectors import require_model
from openvclip.errors import (
    ActivationWarning,
    CheckpointError,
    ContractError,
    StateMismatchError,
    UsageError,
)
from openvclip.weights.kinds import refuse, require_values
from openvclip.weights.names import (
    canonical_model,
    live_model,
    require_live,
    set_extra_state,
    unwrap,
)
from openvclip.weights.shards import any_process, mesh_groups, reshard, whole

Names = Literal["open_clip", "original"]
"""The names of the entries that :func:`load_checkpoint` returns."""

__all__ = [
    "CheckpointInfo",
    "Names",
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

    The extra state of modules (``get_extra_state``) is stored too: tensors as they are, other
    objects as bytes that :func:`load_checkpoint` turns into the same objects.

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
        WeightTypeError: ``state`` is not a state dict, or holds sparse entries, entries without
            values (on the meta device) or quantised tensors.
        StateMismatchError: two names have the same canonical form.
        CheckpointError: the file could not be written, or safetensors files can't hold a dtype or
            an extra state. An existing file is then unchanged.
    """
    entries, extra_state = canonical_model(state, "state")
    _require_storable(entries, dtype)
    encoded, texts = encode(extra_state)
    entries |= encoded
    metadata = {**(metadata or {}), **texts}
    groups = mesh_groups(entries.values())
    is_writer = all(group.rank() == 0 for group in groups)
    stored: dict[str, Tensor] = {}
    for name, value in entries.items():
        gathered = whole(value)  # every process takes part
        if is_writer:
            stored[name] = _to_store(gathered, None if name in encoded else dtype)
    failure: Exception | None = None
    try:
        if is_writer:
            _write(stored, path, metadata)
    except Exception as error:  # any error: the other processes wait for this one
        failure = error
    if any_process([failure is not None], entries.values())[0]:
        failure = failure or CheckpointError(
            f"Could not write {os.fspath(path)}: see the error of the process that writes the file."
        )
    if failure is not None:
        raise failure


def _require_storable(entries: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    require_values(entries, "state")
    refuse("quantized", [name for name, v in entries.items() if v.is_quantized], "state")
    for name, value in entries.items():
        require_storable(stored_dtype(value, dtype), name)


def _write(
    stored: dict[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None
) -> None:
    from safetensors.torch import save_file

    with write_errors(path), atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the mode that the umask of the process gives a new file
        try:
            save_file(stored, temporary, metadata=dict(metadata or {}))
        except KeyError as error:  # of the table of dtypes of an older safetensors
            raise CheckpointError(
                f"The installed version of safetensors can't store {error}. Install "
                "safetensors 0.8 or newer, or convert the entries to another dtype."
            ) from error
        temporary.chmod(mode)  # safetensors creates files that only their owner can read


def _to_store(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    # A copy, since safetensors refuses entries that share memory (tied weights, views).
    copied = value.to(
        "cpu", stored_dtype(value, dtype), copy=True, memory_format=torch.contiguous_format
    )
    return copied.resolve_conj().resolve_neg()


def stored_dtype(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which an entry is stored if floating-point entries get ``dtype``."""
    return dtype if dtype is not None and value.is_floating_point() else value.dtype


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
    names: Names = "open_clip",
    base: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """Load a file of weights as a state dict on the CPU, under open_clip's names.

    These families are recognised from the content of the file: OpenAI's TorchScript archives and
    state dicts, open_clip's checkpoints, Hugging Face's CLIP, and the checkpoints of Open-VCLIP and
    FROSTER. The values are those of the file, bit for bit. Separate query,
    key and value weights are joined, and projections are transposed if open_clip stores them
    transposed. A state dict of open_clip, of openvclip or of an unknown model keeps its names.
    :func:`inspect_checkpoint` shows the content of a file without loading it.

    **Prefixes.** If all names of a CLIP start with a prefix, such as ``model.`` of a Lightning
    module or ``student.``, the prefix is removed. With ``model``, the names are those of the model:
    a prefix that the model has itself is kept. If a file holds several models, choose one with
    ``allow_unexpected``: ``"teacher.*"`` leaves the teacher out. Without ``model`` and without a
    choice, all entries are returned under their names. The counter of
    ``torch.optim.swa_utils.AveragedModel`` is left out.

    Args:
        path: a safetensors, PyTorch or TorchScript file, or the index of a sharded model, whose
            shards are safetensors or PyTorch files.
        model: a model with the names of the file or with open_clip's names, expanded or not, to
            load the weights into. The weights are converted to the dtypes and devices of the model.
            If an entry does not fit, the model is unchanged. Under ``fully_shard`` every process
            must call this function, and loads its part. The activation is not a weight: the weights
            of OpenAI, Open-VCLIP and FROSTER need a model whose name ends in ``-quickgelu``.
        allow_missing: names that may be missing from the file, as patterns of :mod:`fnmatch` such
            as ``"transformer.*"``. Default: none.
        allow_unexpected: names of entries that are left out if they have no place in the result,
            as patterns, for example ``("projector_*", "raw_model.*")`` for FROSTER. Default: none.
        names: ``"open_clip"``, or ``"original"`` for the names and the shapes of the file. Only the
            prefixes of wrappers are then removed. With ``model``, the weights always have the names
            of the model. Default: ``"open_clip"``.
        base: the file of the base model, if ``path`` is a folder of peft with a LoRA adapter. The
            result is the fine-tuned model. The adapter must have the names of this file.

    Returns:
        The entries of the file, in the dtypes of the file. The extra state of modules
        (``get_extra_state``) is among them, as the object that was saved.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, it holds no weights, it
            holds several models and ``model`` is given, or it is an adapter and ``base`` is not
            given.
        UnsafeCheckpointError: the file contains a pickle that could run arbitrary code.
        StateMismatchError: weights are left over or missing, or their shapes are not those of the
            model, or the adapter does not fit ``base``.
        WeightTypeError: the model has floating-point weights where the file has quantised, sparse
            or complex weights, or the file holds factors of an adapter such as LoRA.
        NonFiniteWeightsError: with ``model``, an entry holds NaN or infinity. The infinities of
            attention masks are accepted. Without ``model``, values are not checked.
        UsageError: the model is on the meta device and has no memory for its weights; or ``names``
            is ``"original"`` and a model or a name that may be missing is given.

    Warns:
        ActivationWarning: the weights are known to be trained with QuickGELU, and the model has
            GELU.
    """
    allowed = allowed_patterns(allow_missing, allow_unexpected)
    if names != "open_clip":
        if base is not None:
            raise UsageError(f"names={names!r} with base: leave one of them out.")
        return _load_original(path, allowed, names, model)
    if model is None:
        loaded = _load(path, allowed, base=base)
        return {**loaded.weights, **loaded.extra_state}
    reshard(unwrap(model))
    live, _ = live_model(model)
    require_live(model, live)
    loaded = _load(path, allowed, live, base=base)
    weights = copy_into(loaded.weights, live, loaded.info, loaded.quantized)
    set_extra_state(model, loaded.extra_state)
    _check_activation(model, loaded.info)
    return {**weights, **loaded.extra_state}


def _load_original(
    path: str | os.PathLike[str], allowed: Allowed, names: str, model: nn.Module | None
) -> dict[str, Any]:
    """Return the entries of a file under the names of the file."""
    if names != "original":
        raise UsageError(f"names={names!r}: expected 'open_clip' or 'original'.")
    if model is not None or allowed.missing:
        option = "a model" if model is not None else "allow_missing"
        raise UsageError(
            f"names='original' with {option}: the names of the file are then not compared with "
            f"other names. Leave names or {option} out."
        )
    file = read_weights(path)
    entries = {**file.weights, **file.extra}
    return {name: value for name, value in entries.items() if not allowed.left_out(name)}


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
    override: bool = False,
) -> CheckpointInfo:
    """Convert a file of weights to a safetensors file under open_clip's names, atomically.

    The header of the new file stores the family that the weights came from, as ``source_family``,
    and the contract of the model, if the file or its folder has one.
    Unlike :func:`load_checkpoint`, this function also refuses a file of open_clip if some blocks of
    a tower lack entries that other blocks have.

    Args:
        source: a file that :func:`load_checkpoint` can load.
        target: the file to write. An existing file is replaced.
        dtype: the dtype in which floating-point entries are stored. Default: the dtype of each
            entry.
        allow_missing: see :func:`load_checkpoint`.
        allow_unexpected: see :func:`load_checkpoint`.
        override: whether to leave the contract out if it can't be passed on, because open_clip's
            name of a model of transformers is not known.

    Returns:
        The content of ``source``.

    Raises:
        CheckpointError: ``source`` can't be read, see :func:`load_checkpoint`, or ``target`` could
            not be written.
        UnsafeCheckpointError, StateMismatchError: see :func:`load_checkpoint`.
        ContractError: the contract can't be passed on, and ``override`` is false.
    """
    allowed = allowed_patterns(allow_missing, allow_unexpected)
    loaded = _load(source, allowed, even_blocks=True)
    metadata = {**loaded.info.metadata, "source_family": loaded.info.source_family}
    contract = _converted_contract(loaded.info, override)
    if contract is None:
        metadata.pop(CONTRACT_KEY, None)
    else:
        metadata[CONTRACT_KEY] = contract.with_(weights=None).to_json()
    state = {**loaded.weights, **loaded.extra_state}
    save_checkpoint(state, target, dtype=dtype, metadata=metadata)
    return loaded.info


def _converted_contract(info: CheckpointInfo, override: bool) -> Contract | None:
    """Return the contract of a converted file, whose weights have open_clip's names."""
    contract = contract_to_merge(Path(info.path), info.metadata, override=override)
    if contract is None or contract.library == "open_clip" or not info.converted:
        return contract
    name = open_clip_name(Path(info.path), info.backbone)
    if name is not None:
        return contract.with_(library="open_clip", model=name)
    if override:
        return None
    raise ContractError(
        f"{info.path} holds {contract.model} of transformers, and open_clip's name of this model "
        "is not known, so the contract can't be passed on. Give --override (override=True) to "
        "convert the weights without the contract."
    )


@dataclass(frozen=True)
class _Loaded:
    """The content of a file under the names of a model or of open_clip."""

    weights: dict[str, Tensor]
    extra_state: dict[str, Any]
    quantized: list[str]
    info: CheckpointInfo


def _load(
    path: str | os.PathLike[str],
    allowed: Allowed,
    live: Mapping[str, Tensor] | None = None,
    *,
    even_blocks: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> _Loaded:
    """Read and convert a file, and check all names and shapes.

    Args:
        path: the file.
        allowed: names that may be missing or unexpected.
        live: the entries of the model that the weights must fit. Default: the weights must fit
            open_clip's CLIP.
        even_blocks: whether to check, for files that keep their names, that all blocks of a tower
            have the same entries. Files that are converted are always checked. The argument has no
            effect if ``live`` is given.
        base: the file of the base model, if ``path`` is an adapter.
    """
    file = read_fine_tune(path, base)
    require_model(file.metadata, path)
    plan = plan_of(file, left_out=allowed.left_out)
    info = describe(file, plan)
    if live is not None:
        plan = plan_for_model(file, plan, live, allowed)
    elif even_blocks:
        require_one_model(plan, info.path)
    elif plan.prefix not in ("", "model.") and allowed.not_unexpected(plan.left_over):
        plan = plan_as_named(plan, file.weights)  # a model of its own, of which a CLIP is a part
    weights = convert(plan, file.weights)
    left_over = allowed.not_unexpected(plan.left_over)
    if live is not None:
        require_fit(weights, left_over, live, info, allowed)
    else:
        missing = allowed.not_missing(plan.missing if plan.converted or even_blocks else ())
        _require_whole(info, missing, left_over)
    prefix = plan.prefix
    extra = {n.removeprefix(prefix): v for n, v in file.extra.items() if n.startswith(prefix)}
    in_file = set(info.quantized)
    quantized = [n for n, source in plan.targets.items() if in_file.intersection(source.names)]
    return _Loaded(weights, extra, quantized, info)


def _require_whole(info: CheckpointInfo, missing: list[str], left_over: list[str]) -> None:
    if left_over or missing:
        raise StateMismatchError(
            f"{info.path}: the entries of this {info.family} checkpoint are not exactly those of "
            "open_clip's CLIP.",
            missing=missing,
            unexpected=left_over,
            hint=hint(missing, left_over),
        )


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
