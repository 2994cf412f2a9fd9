"""Names of state dicts: canonical forms, comparison, and the named weights of a model.

A *state dict* maps names to tensors. Wrappers add parts to the names: ``module.`` (data
parallelism), ``_orig_mod.`` (``torch.compile``) and others. All of openvclip compares *canonical*
names, which are the names without these parts. Entries are never matched by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from openvclip.errors import StateMismatchError, WeightTypeError, listed
from openvclip.weights.shards import reshard

__all__ = [
    "canonical_names",
    "canonical_state",
    "listed",
    "mismatches",
    "named_parameters",
    "named_state",
    "require_match",
    "unwrap",
]

# Any submodule can be wrapped, so these parts can occur at any position of a name.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def _without_wrappers(name: str) -> str:
    if not any(part in name for part in _WRAPPER_PARTS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return a dict from the canonical form of each name to the original name.

    The parts that ``torch.compile``, FSDP and activation checkpointing add are removed at any
    position. A leading ``module.`` is removed, repeatedly, only if all names have it. Data
    parallelism wraps the whole model. If only some names start with ``module.``, then ``module`` is
    a submodule of the model, and the names are kept.

    Raises:
        StateMismatchError: two names have the same canonical form.
    """
    raw_names = list(names)
    short_names = [_without_wrappers(name) for name in raw_names]
    while short_names and all(name.startswith("module.") for name in short_names):
        short_names = [name.removeprefix("module.") for name in short_names]
    pairs = list(zip(short_names, raw_names, strict=True))
    canonical = dict(pairs)
    if len(canonical) < len(raw_names):
        repeated = {name for name in short_names if short_names.count(name) > 1}
        raise StateMismatchError(
            "Several names become the same once the names of wrappers are removed.",
            unexpected=[raw for short, raw in pairs if short in repeated],
            hint="Keep one entry for each weight, under the name of the model without wrappers.",
        )
    return canonical


def canonical_state(
    state: Mapping[str, Tensor], what: str = "state", *, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a state dict under canonical names, in the same order.

    The tensors are not copied.

    Args:
        state: mapping from names to tensors.
        what: name of the argument, for the error text.
        like: entries of the target model. If all their names start with ``module.``, the names of
            the result start with this prefix too.

    Raises:
        WeightTypeError: ``state`` is not a mapping from names to tensors.
        StateMismatchError: two names have the same canonical form.
    """
    if isinstance(state, nn.Module):
        raise WeightTypeError(
            f"{what}: expected a state dict, got a {type(state).__name__}; pass its .state_dict()."
        )
    if not isinstance(state, Mapping):
        raise WeightTypeError(
            f"{what}: expected a mapping of names to tensors, got {type(state).__name__}."
        )
    non_tensors = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if non_tensors:
        first = non_tensors[0]
        raise WeightTypeError(
            f"{what}: expected names mapped to tensors, but {first!r} holds a "
            f"{type(state[first]).__name__} ({len(non_tensors)} such entries). If this is a "
            "training checkpoint, pass its weights, for example ckpt['state_dict']."
        )
    prefix = _module_prefix(like) if like is not None else ""
    return {prefix + name: state[raw] for name, raw in canonical_names(state).items()}


def _module_prefix(live: Mapping[str, Tensor]) -> str:
    prefix = ""
    while live and all(name.startswith(prefix + "module.") for name in live):
        prefix += "module."
    return prefix


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of data parallelism and ``torch.compile``.

    Raises:
        WeightTypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise WeightTypeError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the live parameters of a model under canonical names.

    A shared parameter appears once, under its first name. Under ``fully_shard`` the parameters are
    the shards that the optimizer updates.
    """
    plain_model = unwrap(model)
    reshard(plain_model)
    return {_without_wrappers(name): value for name, value in plain_model.named_parameters()}


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the live parameters and buffers of a model's state dict under canonical names."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {
        _without_wrappers(name): value for name, value in state.items() if isinstance(value, Tensor)
    }


def mismatches(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield ``(name, expected shape, given shape)`` of shared names whose shapes differ."""
    for name in expected.keys() & given.keys():
        if expected[name].shape != given[name].shape:
            yield name, tuple(expected[name].shape), tuple(given[name].shape)


def require_match(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, hint: str = ""
) -> None:
    """Raise one :class:`StateMismatchError` with all differences of names and shapes, if any.

    Args:
        expected: entries under canonical names.
        given: entries under canonical names.
        what: first line of the error text.
        hint: second line of the error text: what to do.
    """
    missing = expected.keys() - given.keys()
    unexpected = given.keys() - expected.keys()
    mismatched = list(mismatches(expected, given))
    if missing or unexpected or mismatched:
        raise StateMismatchError(
            what, missing=missing, unexpected=unexpected, mismatched=mismatched, hint=hint
        )
