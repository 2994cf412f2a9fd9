"""Names, matching and dtypes of state dicts: the one owner of those rules.

A *state* is a mapping from names to tensors. Wrappers put their own parts into the names
(``module.`` from data parallelism, ``_orig_mod.`` from ``torch.compile`` and so on); everything
in openvclip compares *canonical* names, from which those parts are gone, and never compares
entries by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from openvclip.errors import StateMismatchError, WeightTypeError
from openvclip.weights.shards import any_process, local, reshard

foreach = cast(Any, torch)
"""``torch`` as the home of the ``_foreach_*`` functions, which carry no type annotations."""

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


def is_interpolable(tensor: Tensor) -> bool:
    """Whether arithmetic on the entry means something: floating point and complex entries."""
    return tensor.is_floating_point() or tensor.is_complex()


def memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    """Where this process keeps the tensor's values; the same for tensors that share memory."""
    part = local(tensor)
    return part.device, part.untyped_storage().data_ptr()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for arithmetic on weights stored as ``dtype``: never less than float32."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds both without loss (float32 where only float32 does)."""
    return a if a == b else torch.promote_types(compute_dtype(a), compute_dtype(b))


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


def non_finite_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the entries that hold NaN or infinity.

    One number of each entry is looked at first, all together; entries are looked at one by one
    only where one of these is not finite. Of sharded entries each process looks at its own part,
    and all of them get the same names.
    """
    own = {name: local(value) for name, value in state.items() if is_interpolable(value)}
    if not any_process([not all_finite(_witnesses(list(own.values())))], state.values())[0]:
        return []
    broken = [not bool(torch.isfinite(value).all()) for value in own.values()]
    broken = any_process(broken, state.values())
    return [name for name, is_broken in zip(own, broken, strict=True) if is_broken]


def witness(tensor: Tensor) -> Tensor:
    """A real number that is not finite where the tensor holds one that is not.

    It may overflow where all are finite, so that a closer look has to follow.
    """
    if tensor.is_complex():
        return tensor.sum().abs()
    if tensor.dtype != compute_dtype(tensor.dtype) and tensor.numel():
        low, high = torch.aminmax(tensor)  # a sum in float32 would make a copy of half precision
        return high.float() - low.float()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        flat, half = tensor.view(-1), (tensor.numel() + 1) // 2
        return flat[:half].dot(flat[-half:])  # quicker there than a sum
    return tensor.sum()


def all_finite(witnesses: Iterable[Tensor]) -> bool:
    """Whether every :func:`witness` is finite in float32; each device is waited for once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in witnesses:
        by_device.setdefault(value.device, []).append(value.float())
    return all(bool(torch.isfinite(torch.stack(group)).all()) for group in by_device.values())


def _witnesses(tensors: list[Tensor]) -> list[Tensor]:
    """One for each tensor; on a GPU by few kernels, where the tensors are of one dtype."""
    if all(tensor.device.type == "cpu" or not tensor.numel() for tensor in tensors):
        return [witness(tensor) for tensor in tensors]
    return list(foreach._foreach_norm([t for t in tensors if t.numel()], float("inf")))


@torch.no_grad()
def lerp_(live: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """``live <- weight * towards + (1 - weight) * live``, rounded once, at the end.

    Args:
        live: tensors to overwrite.
        towards: tensors of the same shapes, of any dtypes, on any devices.
        weight: how far to go.
    """
    pairs = list(zip(live, towards, strict=True))
    if all((t.device, t.dtype) == (own.device, own.dtype) for own, t in pairs):
        foreach._foreach_lerp_(live, towards, weight)  # computes half precision in float32
        return
    for own, other in pairs:
        wide = common_dtype(own.dtype, other.dtype)
        # The allocator gives the memory of one copy to the next, in the stream's order.
        there = other.to(own.device, non_blocking=other.is_pinned()).to(wide)
        if own.dtype == wide:
            foreach._foreach_lerp_([own], [there], weight)
        else:
            own.copy_(torch.lerp(own.to(wide), there, weight))


def few(names: Sequence[str]) -> str:
    """The first names of a list that may be long, for an error's text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@contextmanager
def overwriting(live: list[Tensor], stash: list[Tensor] | None = None) -> Iterator[None]:
    """Within the block ``live`` may be overwritten; afterwards it holds bitwise what it held.

    Args:
        live: tensors that are views of a model's weights (detached, so that autograd's version
            counters see the writes and refuse a backward pass through weights that changed).
        stash: tensors to keep the values in, one for each of ``live``, on any device; made where
            not given.
    """
    with torch.no_grad():
        if stash is None:
            stash = [torch.empty_like(tensor) for tensor in live]
        # Copies between a GPU and page-locked memory need not be waited for: the GPU does them
        # in the order of its stream, so before and after all that is done to the weights.
        free = all(tensor.is_pinned() for tensor in stash)
        foreach._foreach_copy_(stash, live, non_blocking=free)
    try:
        # Inside an autocast region PyTorch keeps half-precision copies of the weights, which
        # would outlive the change of the weights that they were made from.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            foreach._foreach_copy_(live, stash, non_blocking=free)
        torch.clear_autocast_cache()
