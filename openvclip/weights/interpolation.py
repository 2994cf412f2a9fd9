"""Interpolation of weights: Equation 6 of Open-VCLIP (Weng et al., ICML 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from openvclip.errors import ExtrapolationWarning, LambdaError, UsageError
from openvclip.weights.names import canonical_state, listed, named_state, require_match
from openvclip.weights.numerics import (
    all_finite,
    common_dtype,
    compute_dtype,
    finite_probe,
    is_interpolable,
    memory_of,
)

Lambda = SupportsFloat | Callable[[str], SupportsFloat]
"""An interpolation weight: one number, or a function from an entry's name to its number."""

_HINT = (
    "Both state dicts must come from the same architecture; wrappers' prefixes (module., "
    "_orig_mod.) are already taken out of the names."
)


def interpolate(
    theta_a: Mapping[str, Tensor],
    theta_b: Mapping[str, Tensor],
    lam: Lambda,
    *,
    dtype: torch.dtype | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return ``lam * theta_a + (1 - lam) * theta_b``, entry by entry.

    This is Equation 6 (and the last step of Equation 10 and of Algorithm 2) with ``theta_a`` the
    original CLIP: **lam weights CLIP**, so ``lam=1`` is CLIP and ``lam=0`` the fine-tuned model.
    WiSE-FT and most merging tools weigh the *fine-tuned* model instead: their alpha is
    ``1 - lam``.

    Args:
        theta_a: state dict of the original model.
        theta_b: state dict of the fine-tuned model: the same names and shapes. Names may carry
            the prefixes of wrappers (``module.``, ``_orig_mod.``); the result has plain names.
        lam: a number, or a function that gets an entry's plain name and returns its number, for
            example ``lambda name: 0.5 if name.startswith("visual.") else 1.0``.
        dtype: dtype of the floating-point entries of the result. By default the entry's own;
            where the two inputs differ, the narrowest dtype that holds both.
        out: the result of an earlier call, to be overwritten. Fresh memory costs several times
            what the arithmetic does, so a loop over many pairs of models should give it. The
            entries keep their dtypes and devices; they must not be the inputs' own tensors. After
            an error in the middle of the arithmetic they hold something of both results.

    Returns:
        A new dict in the order of ``theta_b``, each tensor on the device of ``theta_b``'s entry,
        contiguous memory of its own (nothing is shared with the inputs), without a graph; the
        tensors are those of ``out`` where it is given. At ``lam=0`` and ``lam=1`` the entries are
        bitwise those of that end. Integer and boolean entries come from ``theta_b`` at every
        ``lam``. Half precision is computed in float32 and rounded once.

    Raises:
        StateMismatchError: names or shapes differ; the error lists all of them.
        WeightTypeError: an argument is not a mapping from names to tensors.
        LambdaError: a weight is not a finite number.
        UsageError: both ``dtype`` and ``out`` are given, ``out`` shares memory with an input or
            within itself, or has whole numbers where ``theta_b`` has others.

    Warns:
        ExtrapolationWarning: a weight lies outside [0, 1].

    Example:
        >>> import torch
        >>> clip, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> interpolate(clip, tuned, 0.25)["w"]
        tensor([0.7500, 0.7500])
    """
    a = canonical_state(theta_a, "theta_a")
    b = canonical_state(theta_b, "theta_b")
    require_match(a, b, "theta_a and theta_b do not fit together (theta_a is expected).", _HINT)
    weight_of = weights_of(lam, b)
    if out is None:
        result = {name: _empty_for(a[name], b[name], dtype) for name in b}
    else:
        result = _reusable(out, a, b, dtype)
    write_interpolated(result, a, b, weight_of)
    return result


@torch.no_grad()
def interpolate_into(
    model: nn.Module, theta_a: Mapping[str, Tensor], theta_b: Mapping[str, Tensor], lam: Lambda
) -> None:
    """Set the weights of ``model`` to ``interpolate(theta_a, theta_b, lam)``, in place.

    For sweeps over ``lam``: the result is written straight into the model's own tensors, so
    nothing of the size of the model is allocated where dtypes and devices agree. The parameters
    stay the same objects. The inputs must not be the model's own live tensors, or the next
    interpolation would start from this one's result.

    Raises:
        StateMismatchError: the names or shapes of ``theta_a``, ``theta_b`` and the model differ.
        LambdaError, WeightTypeError: as in :func:`interpolate`.
    """
    live = named_state(model)
    a = canonical_state(theta_a, "theta_a", like=live)
    b = canonical_state(theta_b, "theta_b", like=live)
    require_match(a, b, "theta_a and theta_b do not fit together (theta_a is expected).", _HINT)
    require_match(live, b, "The state dicts do not fit the model (the model is expected).", _HINT)
    write_interpolated(live, a, b, weights_of(lam, b))


def weights_of(lam: Lambda, names: Mapping[str, Tensor]) -> dict[str, float]:
    """The weight of each entry as a finite float; one warning for those outside [0, 1]."""
    if callable(lam):
        weights = {name: as_number(lam(name), f"lam({name!r})") for name in names}
    else:
        weights = dict.fromkeys(names, as_number(lam, "lam"))
    outside = {weight for weight in weights.values() if not 0.0 <= weight <= 1.0}
    if outside:
        warnings.warn(
            f"lam = {min(outside):g} lies outside [0, 1]: this extrapolates beyond the two models "
            "instead of interpolating between them. lam weighs theta_a (the original CLIP).",
            ExtrapolationWarning,
            stacklevel=3,
        )
    return weights


def as_number(value: SupportsFloat, what: str) -> float:
    """The weight as a finite float; ``what`` names it in the error."""
    try:
        if isinstance(value, str):
            raise TypeError("text, even of digits, is no number")
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LambdaError(
            f"{what}: expected a number or a function from a name to a number, got {value!r}."
        ) from error
    if not math.isfinite(number):
        raise LambdaError(f"{what} = {number}: expected a finite number, usually in [0, 1].")
    return number


def _empty_for(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not is_interpolable(b):
        dtype = b.dtype
    elif dtype is None:
        dtype = common_dtype(a.dtype, b.dtype)
    return torch.empty(b.shape, dtype=dtype, device=b.device)


def _reusable(
    out: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of an earlier result in the order of ``b``."""
    if dtype is not None:
        raise UsageError(
            f"dtype={dtype} and out were both given, but the entries of out keep their dtypes. "
            "Give one of the two."
        )
    given = canonical_state(out, "out")
    require_match(b, given, "out is not the result of interpolating such models.", _HINT)
    taken = {memory_of(value) for state in (a, b) for value in state.values() if value.numel()}
    shared, unlike = [], []
    for name, value in given.items():
        if value.numel() and memory_of(value) in taken:
            shared.append(name)
        taken.add(memory_of(value))
        if is_interpolable(value) != is_interpolable(b[name]):
            unlike.append(name)
    if shared:
        raise UsageError(
            f"{len(shared)} entries of out share memory with theta_a, theta_b or each other "
            f"({listed(shared)}), which would be overwritten. Give the result of an earlier call, "
            "or nothing."
        )
    if unlike:
        raise UsageError(
            f"{len(unlike)} entries of out are whole numbers where theta_b's are not, or the other "
            f"way round ({listed(unlike)}). Give the result of an earlier call on such models."
        )
    return {name: given[name] for name in b}


@torch.no_grad()
def write_interpolated(
    targets: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    weight_of: Mapping[str, float],
) -> None:
    """Overwrite each target with ``weight * a + (1 - weight) * b``, rounded once to its dtype.

    The one place where two weights become a third: ends are copied bitwise, integer and boolean
    entries come from ``b``. Memory is made only where dtypes or devices differ.

    Args:
        targets: tensors to overwrite, which share no memory with the inputs.
        a: original entries, at least those of ``targets``, of the same shapes.
        b: fine-tuned entries, likewise.
        weight_of: the weight of ``a`` for each entry, as :func:`weights_of` gives it.
    """
    alike: list[_Lerp] = []
    for name, target in targets.items():
        lam, x, y = weight_of[name], a[name], b[name]
        if lam == 0.0 or not is_interpolable(y):
            target.copy_(y)
        elif lam == 1.0:
            target.copy_(x)
        elif x.dtype == y.dtype == target.dtype and x.device == y.device == target.device:
            alike.append((target, x, y, lam))
        else:
            work = compute_dtype(common_dtype(x.dtype, y.dtype))
            x, y = x.to(target.device, work), y.to(target.device, work)
            wide = torch.empty_like(y)
            _lerp([(wide, x, y, lam)])
            target.copy_(wide)
    _lerp(alike)


_Lerp = tuple[Tensor, Tensor, Tensor, float]
"""``(out, a, b, lam)``, the tensors of one dtype, on one device."""


_PIECE = 2**19


def _in_pieces(job: _Lerp) -> list[_Lerp]:
    """The same in pieces of which a CPU has the result in its cache when it is looked at."""
    *tensors, lam = job
    out = tensors[0]
    if out.device.type != "cpu" or out.numel() <= _PIECE:
        return [job]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [job]
    parts = (tensor.view(-1).split(_PIECE) for tensor in tensors)
    return [(x, y, z, lam) for x, y, z in zip(*parts, strict=True)]


def _lerp(jobs: list[_Lerp]) -> None:
    """``out <- lam * a + (1 - lam) * b``, where equal entries stay bitwise what they are.

    ``torch.lerp`` has that property, needs no temporary and computes half precision in float32,
    but goes through ``a - b``: where that is not finite (the ``-inf`` of masks, a difference that
    overflows) the plain formula is taken. What tells is looked at together, so that a device is
    waited for once.
    """
    jobs = [piece for job in jobs for piece in _in_pieces(job)]
    witnesses = []
    for out, a, b, lam in jobs:
        torch.lerp(b, a, lam, out=out)
        witnesses.append(finite_probe(out))  # while out is in the cache
    if all_finite(witnesses):
        return
    for out, a, b, lam in jobs:
        broken = ~torch.isfinite(out)
        if bool(broken.any()):
            wide = compute_dtype(out.dtype)
            plain = lam * a[broken].to(wide) + (1.0 - lam) * b[broken].to(wide)
            out[broken] = plain.to(out.dtype)
