"""The anchor of a regulariser: the original weights of the trained parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from openvclip.errors import StateMismatchError, UsageError, listed
from openvclip.weights.adapters import factors_by_layer, mixed_factors, refuse_factors
from openvclip.weights.factor_gradients import unscaled_factors
from openvclip.weights.kinds import require_averageable, require_values
from openvclip.weights.memory import require_no_overlap, without_ties
from openvclip.weights.names import (
    canonical_model,
    live_model,
    mismatches,
    named_parameters,
    state_names,
)
from openvclip.weights.numerics import common_dtype, memory_of
from openvclip.weights.shards import is_sharded, local, local_like, whole


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the live parameters that require gradients, under canonical names."""
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad}


def take_anchor(
    model: nn.Module,
    anchor: Mapping[str, Tensor] | None,
    missing: str,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Return the anchor of each trained parameter, in the order of the parameters.

    The anchor of a sharded parameter is the part that this process holds, as a plain tensor.

    Args:
        model: the model that is trained.
        anchor: original weights by name. ``None`` takes the current weights of the model.
        missing: ``"error"`` or ``"skip"``, for trained parameters that ``anchor`` lacks.
        device: device of the result. ``None`` uses the device of each parameter.

    Raises:
        UsageError: no parameter requires gradients.
        StateMismatchError: the names or shapes of the anchor do not match the model.
    """
    trained = trained_parameters(model)
    if not trained:
        raise UsageError(
            "No parameter of the model requires gradients, so there is nothing to regularise. "
            "Set requires_grad before you create the regulariser."
        )
    require_values(trained, "The trained parameters")
    live = live_model(model)[0]
    own = {**trained, **{name: value for name, value in live.items() if name not in trained}}
    require_no_overlap(without_ties(own), trained)
    originals = own if anchor is None else _matching_anchor(live, trained, anchor, missing)
    anchored = [name for name in trained if name in originals]
    _require_exact_factors(own, trained, originals)
    in_use = {memory_of(value) for value in own.values()}
    return {name: _anchor_of(trained[name], originals[name], in_use, device) for name in anchored}


def _matching_anchor(
    live: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    anchor: Mapping[str, Tensor],
    missing: str,
) -> dict[str, Tensor]:
    originals, _ = canonical_model(anchor, "anchor", like=live)
    names = state_names(trained, live)
    for name, other in names.items():  # a state-dict hook can give parameters other names
        if name not in originals and other is not None and other in originals:
            originals[name] = originals[other]
    # The product of a factor that has an anchor is scaled by this factor alone.
    by_partner = unscaled_factors(trained, originals.keys() & trained.keys())
    missing_names = trained.keys() - originals.keys() - set(by_partner)
    unexpected = originals.keys() - live.keys() - trained.keys()
    mismatched = list(mismatches(trained, originals))
    refuses_missing = missing == "error" or not originals.keys() & trained.keys()
    if unexpected or mismatched or (missing_names and refuses_missing):
        hidden = [name for name in missing_names if names[name] is None]
        raise StateMismatchError(
            "The anchor does not match the model: the trained parameters define the expected "
            "names and shapes.",
            missing=missing_names,
            unexpected=unexpected,
            mismatched=mismatched,
            hint="Pass the state dict of the original model under the names of the trained model. "
            "missing='skip' trains the missing parameters without regularisation."
            + (_HIDDEN.format(listed(sorted(hidden))) if hidden else ""),
        )
    used = {name: originals[name] for name in trained if name in originals}
    require_averageable(used, "anchor")
    lost = [n for n, v in used.items() if v.is_complex() and not trained[n].is_complex()]
    if lost:
        raise UsageError(
            f"The anchor is complex in {len(lost)} entries ({listed(lost)}), but the parameters "
            "are real. Pass the state dict of the original model."
        )
    return originals


_HIDDEN = (
    " The state dict of the model does not hold {}: a state-dict hook hides or copies them. Pass "
    "their original values under the names of model.named_parameters()."
)

_ZEROS_FOR_B = (
    "Pass zeros for lora_B as the only anchor of each adapter: "
    "anchor=openvclip.weights.lora_anchor(model). Alpha then scales the product of both factors, "
    "which is exact. Or merge the adapter into the base model first (merge_and_unload() in peft), "
    "and train the merged weights."
)


def _require_exact_factors(
    own: Mapping[str, Tensor], trained: Mapping[str, Tensor], originals: Mapping[str, Tensor]
) -> None:
    """Raise an error if the interpolation of factors is not an interpolation of the weights.

    The update of LoRA is ``B A``. If only ``B`` has an anchor, the interpolated update is
    ``(alpha B0 + (1 - alpha) B) A``, which is linear in alpha. At ``alpha = 1`` the update is
    ``B0 A``. This is the update of the original model if ``A`` is frozen, or if ``B0`` is zero.
    """
    anchored = {name for name in trained if name in originals}
    refused = mixed_factors(own, anchored.__contains__)
    for parts in factors_by_layer(own).values():
        moving = [name for name in parts if name in trained]
        for name in anchored.intersection(parts):
            if len(moving) > 1 and bool(whole(originals[name]).any()):
                refused.append(name)
    refuse_factors(dict.fromkeys(refused), "The anchor", advice=_ZEROS_FOR_B)


def _anchor_of(
    parameter: nn.Parameter,
    original: Tensor,
    in_use: set[tuple[torch.device, int]],
    device: torch.device | None,
) -> Tensor:
    part = local_like(original, parameter)
    # model.state_dict() returns the live tensors. An anchor in their memory would change with the
    # training. A view of a whole tensor would keep the memory of the whole tensor.
    needs_copy = memory_of(part) in in_use or (is_sharded(parameter) and not is_sharded(original))
    # Keep the anchor's dtype if it is wider than the parameter's. Casting it would round twice: the
    # anchor, then theta~.
    dtype = common_dtype(part.dtype, parameter.dtype)
    return to_anchor_device(
        part.to(dtype), device, local(parameter), copy=needs_copy and part.dtype == dtype
    )


def to_anchor_device(
    anchor: Tensor, device: torch.device | None, parameter: Tensor, *, copy: bool
) -> Tensor:
    """Return ``anchor`` on ``device``. Default: the device of the parameter.

    The result is in page-locked memory if it is on the CPU and the parameter is on a GPU.
    """
    moved = anchor.to(parameter.device if device is None else device, copy=copy)
    return moved.pin_memory() if _needs_pinning(moved.device, parameter) else moved


def follow_devices(
    anchor: dict[str, Tensor], live: Mapping[str, nn.Parameter], device: torch.device | None
) -> None:
    """Move each anchor to its device, because the model may be on another device by now.

    Args:
        anchor: from :func:`take_anchor`. Its tensors are replaced.
        live: the parameters that have an anchor.
        device: device of the anchor. ``None`` uses the device of each parameter.

    Raises:
        UsageError: a parameter was sharded after the anchor was taken.
    """
    for name, parameter in live.items():
        part = local(parameter)
        if anchor[name].shape != part.shape:
            raise UsageError(
                f"This process holds {name} with shape {list(part.shape)}, but its anchor with "
                f"shape {list(anchor[name].shape)}. Create the regulariser after fully_shard()."
            )
        anchor[name] = to_anchor_device(anchor[name], device, part, copy=False)


def empty_stash(parameter: Tensor, device: torch.device) -> Tensor:
    """Return an uninitialised tensor like ``parameter`` on ``device``.

    The tensor is in page-locked memory if it is on the CPU and the parameter is on a GPU.
    """
    return torch.empty_like(parameter, device=device, pin_memory=_needs_pinning(device, parameter))


def stash_for(
    live: Mapping[str, nn.Parameter], device: torch.device | None, kept: dict[str, Tensor]
) -> list[Tensor]:
    """Return tensors for a copy of the weights, on ``device`` if it is set.

    Page-locked memory is slow to allocate, so tensors on ``device`` are kept for the next block.
    Without ``device``, the tensors are allocated on the device of the weights and freed after the
    block, because the second pass needs the memory.

    Args:
        live: the parameters to copy.
        device: the device of the anchor, or ``None``.
        kept: tensors of earlier calls by name. New tensors on ``device`` are added.
    """
    if device is None:
        return [torch.empty_like(local(parameter)) for parameter in live.values()]
    for name, parameter in live.items():
        if name not in kept or kept[name].dtype != parameter.dtype:
            kept[name] = empty_stash(local(parameter), device)
    return [kept[name] for name in live]


def _needs_pinning(device: torch.device, parameter: Tensor) -> bool:
    return device.type == "cpu" and parameter.device.type == "cuda"
