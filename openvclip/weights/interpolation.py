"""Interpolation of weights: Equation 6 of Open-VCLIP (Weng et al., ICML 2023)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from openvclip.errors import ExtrapolationWarning, LambdaError, UsageError, listed
from openvclip.weights.averageable import require_combinable, require_separate_from
from openvclip.weights.kinds import require_values
from openvclip.weights.lerp import Lerp, lerp
from openvclip.weights.names import (
    canonical_model,
    live_model,
    require_live,
    require_match,
    set_extra_state,
)
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    dtype_of_result,
    has_kernels,
    is_interpolable,
    memory_of,
)
from openvclip.weights.relative import FineTuned, resolved
from openvclip.weights.shards import is_sharded, local, local_like, reshard

Lambda = SupportsFloat | Callable[[str], SupportsFloat]
"""An interpolation weight: a number, or a function from the name of an entry to its number.

A number is anything that ``float()`` accepts except text: an ``int``, a ``float``, a tensor of one
element. A function is called once for each entry, with the canonical name.
:func:`openvclip.merging.by_depth` and :func:`openvclip.merging.visual_only` return such functions.
"""

_MISMATCH = (
    "theta_a and theta_b do not fit together: theta_a defines the expected names and shapes."
)
_HINT = (
    "Both state dicts must come from the same architecture. Prefixes of wrappers (module., "
    "_orig_mod.) are already removed from the names."
)


def interpolate(
    theta_a: Mapping[str, Tensor],
    theta_b: FineTuned,
    lam: Lambda,
    *,
    dtype: torch.dtype | None = None,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return ``lam * theta_a + (1 - lam) * theta_b``, entry by entry.

    This is Equation 6, and the last step of Equation 10 and of Algorithm 2. ``theta_a`` is the
    original CLIP: **lam weighs the original CLIP**. ``lam=1`` gives the original CLIP, and
    ``lam=0`` gives the fine-tuned model. WiSE-FT and most merging tools weigh the *fine-tuned*
    model instead: their alpha is ``1 - lam``.

    Args:
        theta_a: state dict of the original model.
        theta_b: state dict of the fine-tuned model, with the same names and shapes. Names may have
            the prefixes of wrappers (``module.``, ``_orig_mod.``). The result has canonical names,
            without prefixes. Or the :class:`~openvclip.weights.Adapter` of a LoRA fine-tune of
            ``theta_a``.
        lam: a number, or a function from the canonical name of an entry to its number, for example
            ``lambda name: 0.5 if name.startswith("visual.") else 1.0``.
        dtype: dtype of the floating-point entries of the result. Complex entries stay complex.
            Default: the dtype of each entry; if the dtypes of the two inputs differ, the narrowest
            dtype that holds both.
        out: result of an earlier call, which is overwritten and returned. New memory costs several
            times as much as the arithmetic, so pass ``out`` in a loop over many pairs of models.
            The entries keep their dtypes and devices. They must not share memory with the inputs.
            If an error occurs during the arithmetic, some entries already hold the new result, and
            others still hold the old result.

    Returns:
        A new dict in the order of ``theta_b``. Each tensor is contiguous, on the device of
        ``theta_b``'s entry, without a graph, and shares no memory with the inputs. With ``out``,
        the tensors are those of ``out``. At ``lam=0`` and ``lam=1`` the entries equal those of
        ``theta_b`` and ``theta_a`` bitwise. Integer and boolean entries come from ``theta_b`` for
        every ``lam``. Half precision and float8 are computed in float32 and rounded once. Extra
        state of modules (``get_extra_state``) is copied from ``theta_b`` and comes last. Entries
        that are sharded in ``theta_b`` stay sharded.

    **NaN and infinity.** These are not refused: the result holds what the equation gives. Equal
    infinities, as in attention masks, stay the same. ``merging.method("interpolate")`` and
    :func:`openvclip.interpolate_files` raise an error for NaN and for other infinities.

    **Adapters.** For a LoRA fine-tune, pass its :class:`~openvclip.weights.Adapter` as
    ``theta_b``. In state dicts with factors of LoRA, the models may differ in one factor of each
    product only. The update ``B A`` is linear in ``B`` if ``A`` is the same in both models, so the
    result is then exact. For the original CLIP in this form, take the state dict of the tuned model
    with zeros for ``lora_B``.

    **Shared memory.** The two models may share the memory of some entries, for example of frozen
    weights. If they share the memory of all floating-point entries, an error is raised, because
    ``model.state_dict()`` does not copy. One tensor object that is passed in both models is
    accepted.

    Raises:
        StateMismatchError: names or shapes differ. The error lists all differences.
        WeightTypeError: an argument is not a mapping from names to tensors; or an entry is sparse,
            on the meta device, quantised (unless it is equal in both models), or a factor of an
            adapter that can't be interpolated by itself.
        LambdaError: a weight is not a finite number.
        UsageError: ``theta_a`` and ``theta_b`` share the memory of all their weights; both
            ``dtype`` and ``out`` are given; two entries of ``out`` share memory; an
            entry of ``out`` shares memory with an input; or an entry of ``out`` is an integer
            where ``theta_b`` has a floating-point number, or the reverse.

    Warns:
        ExtrapolationWarning: a weight lies outside [0, 1].

    Example:
        >>> import torch
        >>> clip, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> interpolate(clip, tuned, 0.25)["w"]
        tensor([0.7500, 0.7500])
    """
    a, _ = canonical_model(theta_a, "theta_a")
    b, extra_state = canonical_model(resolved(theta_b, theta_a), "theta_b")
    require_values(a, "theta_a")
    require_values(b, "theta_b")
    require_match(a, b, _MISMATCH, _HINT)
    require_combinable([a, b], ["theta_a", "theta_b"])
    weight_of = weights_of(lam, b)
    if out is None:
        result = {name: _empty_for(a[name], b[name], dtype) for name in b}
    else:
        result = _reusable(out, a, b, dtype)
    _write_parts(result, a, b, weight_of)
    return {**result, **copy.deepcopy(extra_state)}


def interpolate_into(
    model: nn.Module, theta_a: Mapping[str, Tensor], theta_b: FineTuned, lam: Lambda
) -> None:
    """Set the weights of ``model`` to ``interpolate(theta_a, theta_b, lam)``, in place.

    Use this for sweeps over ``lam``. The result is written directly into the tensors of the model.
    No memory of the size of the model is allocated if dtypes and devices agree. The parameters
    stay the same objects. ``theta_a`` and ``theta_b`` must not share memory with the model, or the
    next interpolation would start from this result. Only entries that are equal in both may share
    memory, for example frozen weights. The modules get the extra state of ``theta_b``. A model
    under ``fully_shard`` takes whole and sharded state dicts, and every process must call this
    function.

    Args:
        model: the model whose parameters and buffers are overwritten.
        theta_a: state dict of the original model.
        theta_b: state dict of the fine-tuned model, with the same names and shapes, or an adapter,
            as in :func:`interpolate`.
        lam: weight of ``theta_a``, as in :func:`interpolate`.

    Raises:
        StateMismatchError: names or shapes of ``theta_a``, ``theta_b`` and the model differ.
        UsageError: an entry of ``theta_a`` or ``theta_b`` would be overwritten, or the state dict
            of the model holds copies of its weights.
        LambdaError, WeightTypeError: as in :func:`interpolate`.
    """
    reshard(model)
    live, _ = live_model(model)
    require_live(model, live)
    a, _ = canonical_model(theta_a, "theta_a", like=live)
    b, extra_state = canonical_model(resolved(theta_b, theta_a), "theta_b", like=live)
    for state, what in ((a, "theta_a"), (b, "theta_b"), (live, "The model")):
        require_values(state, what)
    require_match(a, b, _MISMATCH, _HINT)
    require_match(
        live,
        b,
        "The state dicts do not fit the model: the model defines the expected names and shapes.",
        _HINT,
    )
    require_combinable([a, b], ["theta_a", "theta_b"])
    _require_no_complex_loss(live, a, b, "the model")
    require_separate_from(live, a, b)
    weight_of = weights_of(lam, b)
    with torch.no_grad():
        _write_parts(live, a, b, weight_of)
        # Within autocast, PyTorch would go on with half-precision copies of the weights before.
        torch.clear_autocast_cache()
        set_extra_state(model, extra_state)


def _write_parts(
    targets: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    weight_of: Mapping[str, float],
) -> None:
    """Interpolate whole and sharded tensors: each process computes its own parts."""
    if any(is_sharded(value) for state in (targets, a, b) for value in state.values()):
        a = {name: local_like(a[name], target) for name, target in targets.items()}
        b = {name: local_like(b[name], target) for name, target in targets.items()}
        targets = {name: local(target) for name, target in targets.items()}
    write_interpolated(targets, a, b, weight_of)


def weights_of(lam: Lambda, names: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the weight of each entry as a finite float. Warn once for weights outside [0, 1]."""
    if callable(lam):
        weights = {name: as_number(lam(name), f"lam({name!r})") for name in names}
    else:
        weights = dict.fromkeys(names, as_number(lam, "lam"))
    outside = {weight for weight in weights.values() if not 0.0 <= weight <= 1.0}
    if outside:
        warnings.warn(
            f"lam = {min(outside):g} lies outside [0, 1], so the result is an extrapolation beyond "
            "the two models. lam weighs theta_a (the original CLIP). Pass a number in [0, 1] to "
            "interpolate.",
            ExtrapolationWarning,
            stacklevel=3,
        )
    return weights


def as_number(value: SupportsFloat, what: str) -> float:
    """Return the weight as a finite float. ``what`` is its name in the error text."""
    try:
        if isinstance(value, str):
            raise TypeError("text is not accepted as a number")
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LambdaError(
            f"{what}: expected a number or a function from a name to a number, got {value!r}."
        ) from error
    if not math.isfinite(number):
        raise LambdaError(f"{what} = {number}: expected a finite number, usually in [0, 1].")
    return number


def _empty_for(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not is_interpolable(b):
        dtype = b.dtype
    else:
        dtype = dtype_of_result(common_dtype(a.dtype, b.dtype), dtype)
    if is_sharded(b):
        return torch.empty_like(b, dtype=dtype, requires_grad=False)
    return torch.empty(b.shape, dtype=dtype, device=b.device)


def _reusable(
    out: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return the tensors of ``out`` in the order of ``b``."""
    if dtype is not None:
        raise UsageError(
            f"dtype={dtype} and out were both given, but the entries of out keep their dtypes. "
            "Pass only one of the two."
        )
    entries, _ = canonical_model(out, "out")
    require_match(
        b,
        entries,
        "out does not fit theta_b: theta_b defines the expected names and shapes.",
        _HINT,
    )
    _require_own_memory(entries, a, b)
    other_kind = [name for name in b if is_interpolable(entries[name]) != is_interpolable(b[name])]
    if other_kind:
        raise UsageError(
            f"{len(other_kind)} entries of out are whole numbers but those of theta_b are not, or "
            f"the reverse ({listed(other_kind)}). Pass the result of an earlier call for models "
            "of this architecture."
        )
    _require_no_complex_loss(entries, a, b, "out")
    return {name: entries[name] for name in b}


def _require_no_complex_loss(
    targets: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str
) -> None:
    lost = [
        name
        for name, target in targets.items()
        if (a[name].is_complex() or b[name].is_complex()) and not target.is_complex()
    ]
    if lost:
        raise UsageError(
            f"{len(lost)} entries of {what} are real, but complex in theta_a or theta_b "
            f"({listed(lost)}). Pass models of one architecture: a real entry can't hold the "
            "imaginary part."
        )


def _require_own_memory(
    entries: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> None:
    in_use = {memory_of(value) for state in (a, b) for value in state.values() if value.numel()}
    shared = []
    for name, value in entries.items():
        if value.numel() and memory_of(value) in in_use:
            shared.append(name)
        in_use.add(memory_of(value))
    if shared:
        raise UsageError(
            f"{len(shared)} entries of out share memory with theta_a, theta_b or each other "
            f"({listed(shared)}) and would be overwritten. Pass the result of an earlier call, or "
            "omit out."
        )


@torch.no_grad()
def write_interpolated(
    targets: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    weight_of: Mapping[str, float],
) -> None:
    """Overwrite each target with ``weight * a + (1 - weight) * b``, rounded once to its dtype.

    All interpolation in openvclip uses this function. At the weights 0 and 1 entries are copied
    bitwise. Integer and boolean entries come from ``b``. Memory is allocated only if dtypes or
    devices differ.

    Args:
        targets: tensors to overwrite. They share no memory with the inputs.
        a: original entries with at least the names of ``targets``, of the same shapes.
        b: fine-tuned entries with at least the names of ``targets``, of the same shapes.
        weight_of: weight of ``a`` for each entry, from :func:`weights_of`.
    """
    same_kind: list[Lerp] = []
    for name, target in targets.items():
        lam, x, y = weight_of[name], a[name], b[name]
        if lam == 0.0 or not is_interpolable(y):
            target.copy_(y)
        elif lam == 1.0:
            target.copy_(x)
        elif _can_write_directly(target, x, y):
            same_kind.append((target, x, y, lam))
        else:
            wide_dtype = compute_dtype(common_dtype(x.dtype, y.dtype))
            x, y = x.to(target.device, wide_dtype), y.to(target.device, wide_dtype)
            wide = torch.empty_like(y)
            lerp([(wide, x, y, lam)])
            target.copy_(wide)
    lerp(same_kind)


def _can_write_directly(target: Tensor, x: Tensor, y: Tensor) -> bool:
    same = x.dtype == y.dtype == target.dtype and x.device == y.device == target.device
    return same and has_kernels(target.dtype)
