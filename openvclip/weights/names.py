"""Names, matching and dtypes of state dicts: the one owner of those rules.

A *state* is a mapping from names to tensors. Wrappers put their own parts into the names
(``module.`` from data parallelism, ``_orig_mod.`` from ``torch.compile`` and so on); everything
in openvclip compares *canonical* names, from which those parts are gone, and never compares
entries by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from openvclip.errors import StateMismatchError, WeightTypeError
from openvclip.weights.shards import reshard

# These parts can stand anywhere in a name, since any submodule can be wrapped on its own.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def _without_wrappers(name: str) -> str:
    if not any(part in name for part in _WRAPPER_PARTS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Map the canonical form of each name to the name as it was given.

    ``_orig_mod`` and the wrappers of FSDP and activation checkpointing are dropped wherever they
    stand. A leading ``module.`` is dropped, as often as it is there, only when every name has it:
    data parallelism wraps the whole model, while a single ``module.`` is somebody's own attribute.

    Raises:
        StateMismatchError: two names have the same canonical form.
    """
    given = list(names)
    short = [_without_wrappers(name) for name in given]
    while short and all(name.startswith("module.") for name in short):
        short = [name.removeprefix("module.") for name in short]
    canonical = dict(zip(short, given, strict=True))
    if len(canonical) < len(given):
        twice = {name for name in short if short.count(name) > 1}
        raise StateMismatchError(
            "Several names become the same once the names of wrappers are taken out.",
            unexpected=[raw for name, raw in zip(short, given, strict=True) if name in twice],
            hint="Keep one entry of each, under the name that the plain model gives it.",
        )
    return canonical


def canonical_state(
    state: Mapping[str, Tensor], what: str = "state", *, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The same tensors (not copies) under canonical names, in the same order.

    Args:
        state: names to tensors.
        what: the name of the argument, for the error.
        like: the live entries of a model that the names are to be those of. Where its own names
            all begin with ``module.`` (it keeps everything in an attribute of that name and is no
            data-parallel wrapper), the result's begin with it too.

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
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        first = strange[0]
        raise WeightTypeError(
            f"{what}: expected names mapped to tensors, but {first!r} holds a "
            f"{type(state[first]).__name__} ({len(strange)} such entries). If this is a training "
            "checkpoint, pass the entry that holds the weights, for example ckpt['state_dict']."
        )
    prefix = _own_prefix(like) if like is not None else ""
    return {prefix + name: state[raw] for name, raw in canonical_names(state).items()}


def _own_prefix(live: Mapping[str, Tensor]) -> str:
    prefix = ""
    while live and all(name.startswith(prefix + "module.") for name in live):
        prefix += "module."
    return prefix


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without data-parallel and ``torch.compile`` wrappers around it.

    Raises:
        WeightTypeError: it is not a module.
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
    """The live parameters under canonical names; a shared one appears once, under its first.

    Under ``fully_shard`` they are the shards, as the optimizer has them.
    """
    plain = unwrap(model)
    reshard(plain)
    return {_without_wrappers(name): parameter for name, parameter in plain.named_parameters()}


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """The live entries of the state dict (parameters and buffers) under canonical names."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {
        _without_wrappers(name): value for name, value in state.items() if isinstance(value, Tensor)
    }


def mismatches(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """``(name, expected shape, given shape)`` for shared names whose shapes differ."""
    for name in expected.keys() & given.keys():
        if expected[name].shape != given[name].shape:
            yield name, tuple(expected[name].shape), tuple(given[name].shape)


def require_match(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, hint: str = ""
) -> None:
    """Raise one :class:`StateMismatchError` with everything that differs, or return.

    Args:
        expected: entries under canonical names.
        given: entries under canonical names.
        what: the first line of the error.
        hint: the last line of the error.
    """
    missing = expected.keys() - given.keys()
    unexpected = given.keys() - expected.keys()
    mismatched = list(mismatches(expected, given))
    if missing or unexpected or mismatched:
        raise StateMismatchError(
            what, missing=missing, unexpected=unexpected, mismatched=mismatched, hint=hint
        )


def listed(names: Sequence[str]) -> str:
    """The first names of a list that may be long, for an error's text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
