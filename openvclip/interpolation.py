"""Interpolation of weights: Equation 6 of Open-VCLIP (Weng et al., ICML 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from openvclip.errors import ExtrapolationWarning, LambdaError
from openvclip.state import (
    canonical_state,
    common_dtype,
    compute_dtype,
    is_interpolable,
    named_state,
    require_match,
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

    Returns:
        A new dict in the order of ``theta_b``, each tensor on the device of ``theta_b``'s entry,
        contiguous memory of its own (nothing is shared with the inputs), without a graph. At
        ``lam=0`` and ``lam=1`` the entries are bitwise those of that end. Integer and boolean
        entries come from ``theta_b`` at every ``lam``. Half precision is computed in float32 and
        rounded once.

    Raises:
        StateMismatchError: names or shapes differ; the error lists all of them.
        WeightTypeError: an argument is not a mapping from names to tensors.
        LambdaError: a weight is not a finite number.

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
    weight_of = _checked(lam, b)
    return {
        name: _interpolated(a[name].detach(), b[name].detach(), weight_of[name], dtype)
        for name in b
    }


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
    weight_of = _checked(lam, b)
    for name, target in live.items():
        _interpolate_to(target, a[name], b[name], weight_of[name])


def _checked(lam: Lambda, names: Mapping[str, Tensor]) -> dict[str, float]:
    """The weight of each entry as a finite float; one warning for those outside [0, 1]."""
    if callable(lam):
        weights = {name: _as_float(lam(name), f"lam({name!r})") for name in names}
    else:
        weights = dict.fromkeys(names, _as_float(lam, "lam"))
    outside = {weight for weight in weights.values() if not 0.0 <= weight <= 1.0}
    if outside:
        warnings.warn(
            f"lam = {min(outside):g} lies outside [0, 1]: this extrapolates beyond the two models "
            "instead of interpolating between them. lam weighs theta_a (the original CLIP).",
            ExtrapolationWarning,
            stacklevel=3,
        )
    return weights


def _as_float(value: SupportsFloat, what: str) -> float:
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


def _interpolated(a: Tensor, b: Tensor, lam: float, dtype: torch.dtype | None) -> Tensor:
    if not is_interpolable(b):
        return _own(b, b.dtype)
    out_dtype = dtype if dtype is not None else common_dtype(a.dtype, b.dtype)
    if lam in (0.0, 1.0):
        return _own((b if lam == 0.0 else a).to(b.device), out_dtype)
    work = compute_dtype(common_dtype(a.dtype, b.dtype))
    return _lerp(b.to(work), a.to(b.device, work), lam).to(out_dtype).contiguous()


def _lerp(b: Tensor, a: Tensor, lam: float, out: Tensor | None = None) -> Tensor:
    """``lam * a + (1 - lam) * b``, where equal entries stay bitwise what they are.

    ``torch.lerp`` has that property and needs no temporary, but goes through ``a - b``: entries
    such as the ``-inf`` of a mask, or a difference that overflows, take the plain formula.
    """
    out = torch.lerp(b, a, lam, out=out)
    if not bool(torch.isfinite(out.sum())):
        broken = ~torch.isfinite(out)
        out[broken] = lam * a[broken] + (1.0 - lam) * b[broken]
    return out


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # `to(copy=True)` keeps the strides of an expanded view, whose elements share memory.
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _interpolate_to(target: Tensor, a: Tensor, b: Tensor, lam: float) -> None:
    live = target.detach()
    alike = all((t.dtype, t.device) == (live.dtype, live.device) for t in (a, b))
    if lam == 0.0 or not is_interpolable(b):
        live.copy_(b)
    elif lam == 1.0:
        live.copy_(a)
    elif alike and compute_dtype(live.dtype) == live.dtype:
        _lerp(b, a, lam, out=live)
    else:
        live.copy_(_interpolated(a, b, lam, None))
