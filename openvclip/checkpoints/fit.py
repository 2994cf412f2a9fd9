"""Check that the entries of a file fit a model, and copy them into the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from openvclip.checkpoints.families import (
    Plan,
    chosen_prefix,
    plan_as_named,
    plan_under_prefix,
    require_one_model,
)
from openvclip.checkpoints.formats import WeightFile
from openvclip.checkpoints.inspection import CheckpointInfo
from openvclip.checkpoints.sharding import index_of_shard
from openvclip.checkpoints.sizes import Sizes, model_sizes
from openvclip.errors import (
    NonFiniteWeightsError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
    listed,
)
from openvclip.weights.adapters import factor_names
from openvclip.weights.kinds import kind_of, refuse, require_values
from openvclip.weights.names import mismatches
from openvclip.weights.numerics import non_finite_names
from openvclip.weights.shards import local, local_like, whole


@dataclass(frozen=True)
class Allowed:
    """Patterns for the names that may be missing, and for the names that may be unexpected."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def not_missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that must not be missing."""
        return [name for name in names if not _matches(name, self.missing)]

    def not_unexpected(self, names: Iterable[str]) -> list[str]:
        """Return the names that must not be unexpected."""
        return [name for name in names if not _matches(name, self.unexpected)]

    def left_out(self, name: str) -> bool:
        """Return whether an entry of this name may be left out."""
        return _matches(name, self.unexpected)


def allowed_patterns(missing: str | Iterable[str], unexpected: str | Iterable[str]) -> Allowed:
    """Return the patterns that the arguments ``allow_missing`` and ``allow_unexpected`` hold."""
    return Allowed(_patterns(missing), _patterns(unexpected))


def _patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# --- names ---------------------------------------------------------------------------------------


def plan_for_model(
    file: WeightFile, plan: Plan, live: Mapping[str, Tensor], allowed: Allowed
) -> Plan:
    """Return the plan that gives the entries the names of a model.

    The names of the file are kept if they are the names of the model. Otherwise the names are those
    of ``plan``, or the names behind a prefix such as ``net.`` under which the file holds the whole
    model.

    Args:
        file: the file.
        plan: the conversion to open_clip's names.
        live: the entries of the model, under canonical names.
        allowed: names that may be missing or unexpected.

    Raises:
        CheckpointError: the file holds several models, under several prefixes.
    """
    names, needed = file.weights.keys(), allowed.not_missing(live)
    if needed and names >= set(needed):
        return plan_as_named(plan, names, wanted=needed)
    if plan.targets.keys() >= set(needed):
        return plan
    if len(names & live.keys()) > len(plan.targets.keys() & live.keys()):
        return plan_as_named(plan, names, wanted=needed)  # a model of transformers, of another size
    first = max(needed, key=len)
    ends = [name for name in names if name.endswith(f".{first}")]
    prefixes = [name.removesuffix(first) for name in ends]
    prefixes = [p for p in prefixes if all(f"{p}{name}" in names for name in needed)]
    prefix = chosen_prefix(prefixes, names, allowed.left_out)
    if prefix is not None:
        return plan_under_prefix(names, prefix, as_named=True)
    plan = replace(plan, prefixes=tuple(sorted(prefixes)) or plan.prefixes)
    require_one_model(plan, str(file.path))
    return plan


def require_fit(
    state: dict[str, Tensor],
    left_over: list[str],
    live: Mapping[str, Tensor],
    info: CheckpointInfo,
    allowed: Allowed,
) -> None:
    """Check that the entries of a file have the names and shapes of a model.

    Args:
        state: the entries of the file under the names of the model. A scale of one number gets the
            shape of the model's scale.
        left_over: entries of the file that have no place in ``state`` and are not allowed.
        live: the entries of the model, under canonical names.
        info: the content of the file, for the error text.
        allowed: names that may be missing or unexpected.

    Raises:
        StateMismatchError: names or shapes differ.
        WeightTypeError: the model is lazy and has no shapes yet.
    """
    lazy = [name for name, value in live.items() if kind_of(value) == "uninitialized"]
    refuse("uninitialized", lazy, "The model")
    for name in ("logit_scale", "logit_bias"):  # of shape [] in some versions, [1] in others
        if name in live and name in state and live[name].numel() == state[name].numel() == 1:
            state[name] = state[name].reshape(live[name].shape)
    missing = allowed.not_missing(live.keys() - state.keys())
    unexpected = [*allowed.not_unexpected(state.keys() - live.keys()), *left_over]
    mismatched = list(mismatches(live, state))
    nothing_fits = bool(live) and not live.keys() & state.keys()
    if nothing_fits:  # patterns such as "*" allow less than this
        missing, unexpected = list(live), [*state, *left_over]
    if missing or unexpected or mismatched:
        raise StateMismatchError(
            f"{info.path} does not fit the model.{_shard_text(info, missing)}"
            f"{_adapter_text(unexpected)}{_submodule_text(state, live)}"
            f"{_sizes_table(info.sizes, model_sizes(live))}",
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            hint="No entry of the file has a name of the model."
            if nothing_fits
            else hint(missing, unexpected, mismatched=bool(mismatched)),
        )


def _adapter_text(unexpected: list[str]) -> str:
    if not factor_names(unexpected):
        return ""
    return (
        " It holds factors of an adapter. Give the folder of the adapter and the file of its base "
        "model: load_checkpoint(folder, base='clip.safetensors'). Or merge the adapter into its "
        "base model (merge_and_unload() in peft), and save it with openvclip.save_checkpoint."
    )


def _submodule_text(state: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> str:
    """Return the text for a model that has the entries of the file in a submodule."""
    first = max(state, key=len, default="")
    prefixes = [name.removesuffix(first) for name in live if name.endswith(f".{first}")]
    inner = [p for p in prefixes if all(f"{p}{name}" in live for name in state)]
    if not first or len(inner) != 1:
        return ""
    return f" Pass the submodule that the file is for: model.{inner[0].rstrip('.')}."


def _shard_text(info: CheckpointInfo, missing: list[str]) -> str:
    index = index_of_shard(info.path) if missing else None
    return f" It is one shard of a model; give the index {index}." if index else ""


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


def hint(missing: list[str], unexpected: list[str], *, mismatched: bool = False) -> str:
    """Return what to do if names or shapes differ, as the last line of an error text."""
    if mismatched:
        return "Build the model that the file is for, or give a file that is for this model."
    hints, flags = [], []
    if missing:
        hints.append(f"allow_missing={_hint_patterns(missing)} to accept that these are missing")
        flags.append("--allow-missing")
    if unexpected:
        hints.append(f"allow_unexpected={_hint_patterns(unexpected)} to leave these entries out")
        flags.append("--allow-unexpected")
    return (
        f"If this is intended, give {' and '.join(hints)}. On the command line, give "
        f"{' and '.join(flags)} once for each name."
    )


def _hint_patterns(names: list[str]) -> list[str]:
    return sorted({f"{name.partition('.')[0]}.*" if "." in name else name for name in names})


# --- values --------------------------------------------------------------------------------------


def copy_into(
    state: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    info: CheckpointInfo,
    quantized: Collection[str],
) -> dict[str, Tensor]:
    """Copy the entries that a model has into the model, and return these entries.

    All entries are checked before the first entry is copied. The model may be sharded: each process
    then copies its part.

    Args:
        state: the entries of a file, under the names of the model.
        live: the entries of the model.
        info: the content of the file, for error texts.
        quantized: the names of quantised entries.

    Raises:
        UsageError: the model is on the meta device.
        WeightTypeError: the file holds quantised, sparse or complex entries that the model can't
            hold.
        NonFiniteWeightsError: an entry holds NaN or infinity.
    """
    state = {name: value for name, value in state.items() if name in live}
    if any(live[name].is_meta for name in state):
        raise UsageError(
            f"{info.path} can't be loaded: the model is on the meta device and has no memory for "
            "its weights. Call model.to_empty(device=...) first. If accelerate offloads the "
            "weights, call accelerate.hooks.remove_hook_from_module(model, recurse=True) first."
        )
    require_values(state, info.path)
    _require_kinds(state, live, info, quantized)
    _require_finite(state, live, info)
    with torch.no_grad():
        for name, value in state.items():
            local(live[name]).copy_(local_like(value, live[name]))
    return state


def _require_kinds(
    state: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    info: CheckpointInfo,
    quantized: Collection[str],
) -> None:
    """Check that the copy of each entry into the model means the same numbers."""
    whole = [
        name
        for name, value in state.items()
        if live[name].is_floating_point()
        and value.dtype != live[name].dtype
        and (name in quantized or not (value.is_floating_point() or value.is_complex()))
    ]
    if whole:
        raise WeightTypeError(
            f"{info.path} holds whole numbers or quantised weights in {len(whole)} entries "
            f"({listed(whole)}), for which the model has floating-point weights. Dequantise the "
            "model with the library that quantised it, for example with model.dequantize(), and "
            "save the result with openvclip.save_checkpoint."
        )
    imaginary = [name for name, value in state.items() if _loses_imaginary(value, live[name])]
    if imaginary:
        raise WeightTypeError(
            f"{info.path} holds complex numbers in {len(imaginary)} entries ({listed(imaginary)}), "
            "for which the model has real numbers. Build the model with complex weights, or give a "
            "file with real numbers."
        )


def _loses_imaginary(value: Tensor, live: Tensor) -> bool:
    return value.is_complex() and not live.is_complex()


def _require_finite(
    state: Mapping[str, Tensor], live: Mapping[str, Tensor], info: CheckpointInfo
) -> None:
    names = [n for n in non_finite_names(state) if not _is_mask(n, state[n], live[n])]
    if names:
        raise NonFiniteWeightsError(
            f"{info.path} holds NaN or infinity in {len(names)} entries ({listed(names)}), so the "
            "model would compute NaN. The model is unchanged. Use an earlier checkpoint of the "
            "run. Look for a learning rate that is too high or a loss that overflows."
        )
    overflowing = [name for name, value in state.items() if _overflows(value, live[name].dtype)]
    if overflowing:
        dtype = str(live[overflowing[0]].dtype).removeprefix("torch.")
        raise NonFiniteWeightsError(
            f"{info.path} holds numbers in {len(overflowing)} entries ({listed(overflowing)}) that "
            f"are too large for the {dtype} of the model, where they would become infinity. The "
            "model is unchanged. Build the model in float32 or bfloat16."
        )


def _is_mask(name: str, value: Tensor, live: Tensor) -> bool:
    """Return whether the infinities of an entry are those of an attention mask.

    A mask is a buffer. The buffer of the model has the same infinities, or ``mask`` is part of its
    name.
    """
    if isinstance(live, nn.Parameter) or bool(value.isnan().any()):
        return False
    infinite = value.isinf()
    if "mask" in name and bool((value[infinite] < 0).all()):
        return True
    own = whole(live).to(value.device, value.dtype)
    return torch.equal(own[infinite], value[infinite])


def _overflows(value: Tensor, dtype: torch.dtype) -> bool:
    if not (value.is_floating_point() and dtype.is_floating_point and value.numel()):
        return False
    largest = torch.finfo(dtype).max
    if torch.finfo(value.dtype).max <= largest:
        return False
    low, high = torch.aminmax(value)
    if max(-float(low), float(high)) <= largest:
        return False
    finite = value[value.isfinite()]  # without the infinities of masks
    return bool(finite.numel()) and float(finite.abs().max()) > largest
