"""The anchor of a regulariser: the original weights of the trained parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from openvclip.errors import StateMismatchError, UsageError
from openvclip.weights.names import canonical_state, mismatches, named_parameters, named_state
from openvclip.weights.numerics import common_dtype, memory_of
from openvclip.weights.shards import is_sharded, local, local_like


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
    live = named_state(model)
    originals = live if anchor is None else _matching_anchor(live, trained, anchor, missing)
    in_use = {memory_of(value) for value in live.values()}
    return {
        name: _anchor_of(parameter, originals[name], in_use, device)
        for name, parameter in trained.items()
        if name in originals
    }


def _matching_anchor(
    live: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    anchor: Mapping[str, Tensor],
    missing: str,
) -> dict[str, Tensor]:
    originals = canonical_state(anchor, "anchor", like=live)
    missing_names = trained.keys() - originals.keys()
    unexpected = originals.keys() - live.keys()
    mismatched = [entry for entry in mismatches(live, originals) if entry[0] in trained]
    refuses_missing = missing == "error" or missing_names == trained.keys()
    if unexpected or mismatched or (missing_names and refuses_missing):
        raise StateMismatchError(
            "The anchor does not match the model: the trained parameters define the expected "
            "names and shapes.",
            missing=missing_names,
            unexpected=unexpected,
            mismatched=mismatched,
            hint="Pass the state dict of the original model under the names of the trained model. "
            "missing='skip' trains the missing parameters without regularisation.",
        )
    return originals


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


def empty_stash(parameter: Tensor, device: torch.device) -> Tensor:
    """Return an uninitialised tensor like ``parameter`` on ``device``.

    The tensor is in page-locked memory if it is on the CPU and the parameter is on a GPU.
    """
    return torch.empty_like(parameter, device=device, pin_memory=_needs_pinning(device, parameter))


def _needs_pinning(device: torch.device, parameter: Tensor) -> bool:
    return device.type == "cpu" and parameter.device.type == "cuda"
