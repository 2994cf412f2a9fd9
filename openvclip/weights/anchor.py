"""The original weights that a regulariser interpolates with: taking, keeping, recognising them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from openvclip.errors import StateMismatchError, UsageError
from openvclip.weights.names import canonical_state, mismatches, named_parameters, named_state
from openvclip.weights.numerics import common_dtype, memory_of
from openvclip.weights.shards import (
    backend_device,
    is_sharded,
    local,
    local_like,
    mesh_groups,
    own_slices,
)

_SAMPLES = 64  # values of an entry that go into a fingerprint


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The live parameters that require gradients, under canonical names."""
    return {n: p for n, p in named_parameters(model).items() if p.requires_grad}


def take_anchor(
    model: nn.Module,
    anchor: Mapping[str, Tensor] | None,
    missing: str,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """The anchor of each trained parameter that has one, in the parameters' order.

    Of a sharded parameter it is the part that this process holds, as a plain tensor.

    Args:
        model: the model that is trained.
        anchor: the original weights by name; ``None`` takes the model's as they are.
        missing: ``"error"`` or ``"skip"``, for trained parameters that ``anchor`` lacks.
        device: where to keep it; ``None`` keeps each entry beside its parameter.

    Raises:
        UsageError: nothing requires gradients.
        StateMismatchError: the anchor does not fit.
    """
    trained = trained_parameters(model)
    if not trained:
        raise UsageError(
            "No parameter of the model requires gradients, so there is nothing to regularise. "
            "Make the regulariser after requires_grad has been set."
        )
    known = named_state(model)
    given = _fitting(known, trained, anchor, missing) if anchor is not None else known
    in_use = {memory_of(value) for value in known.values()}
    return {
        name: _anchored(given[name], parameter, in_use, device)
        for name, parameter in trained.items()
        if name in given
    }


def _fitting(
    known: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    anchor: Mapping[str, Tensor],
    missing: str,
) -> dict[str, Tensor]:
    given = canonical_state(anchor, "anchor", like=known)
    lacking = trained.keys() - given.keys()
    unexpected = given.keys() - known.keys()
    mismatched = [entry for entry in mismatches(known, given) if entry[0] in trained]
    refused = bool(lacking) and (missing == "error" or lacking == trained.keys())
    if unexpected or mismatched or refused:
        raise StateMismatchError(
            "The anchor does not fit the trained parameters of the model (which are expected).",
            missing=lacking,
            unexpected=unexpected,
            mismatched=mismatched,
            hint="Give the state dict of the original model under the trained model's names; "
            "missing='skip' trains parameters that the anchor lacks without regularisation.",
        )
    return given


def _anchored(
    value: Tensor,
    parameter: nn.Parameter,
    in_use: set[tuple[torch.device, int]],
    device: torch.device | None,
) -> Tensor:
    part = local_like(value, parameter)
    # model.state_dict() gives the live tensors: an anchor that shares their memory would move
    # along with the training and regularise nothing. A view of a whole tensor would keep it all.
    copied = memory_of(part) in in_use or (is_sharded(parameter) and not is_sharded(value))
    # An anchor that is wider than the parameter stays so, or theta~ would be rounded twice.
    dtype = common_dtype(part.dtype, parameter.dtype)
    return kept(part.to(dtype), device, local(parameter), copy=copied and part.dtype == dtype)


def kept(value: Tensor, device: torch.device | None, beside: Tensor, *, copy: bool) -> Tensor:
    """``value`` on ``device`` (where ``beside`` is, by default), page-locked for a GPU's copies."""
    there = value.to(beside.device if device is None else device, copy=copy)
    return there.pin_memory() if _pinned(there.device, beside) else there


def room_for(beside: Tensor, device: torch.device) -> Tensor:
    """Memory for a copy of ``beside``, on ``device`` as :func:`kept` has it."""
    return torch.empty_like(beside, device=device, pin_memory=_pinned(device, beside))


def _pinned(device: torch.device, beside: Tensor) -> bool:
    return device.type == "cpu" and beside.device.type == "cuda"


def fingerprint(anchor: dict[str, Tensor], model: nn.Module) -> str:
    """A digest of names, shapes and up to 64 evenly spaced values of each entry.

    Enough to tell the original weights from fine-tuned ones without reading all of them. It is
    the same for a sharded model and for a whole one: the processes exchange the values only.
    """
    parameters = named_parameters(model)
    names = sorted(anchor)
    samples = [_sample(anchor[name], parameters[name]).cpu().double() for name in names]
    values = torch.cat(samples)
    for group in mesh_groups(parameters.values()):
        values = values.to(backend_device(parameters.values()))
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group)
    counts = [len(sample) for sample in samples]
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in zip(names, values.cpu().split(counts), strict=True):
        digest.update(f"{name} {list(parameters[name].shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _sample(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """The values; -inf, which every other number is larger than, for those in other processes."""
    numel = parameter.numel()
    index = torch.arange(0, numel, max(1, numel // _SAMPLES), device=value.device)[:_SAMPLES]
    if not is_sharded(parameter):
        return value.reshape(-1)[index]
    along = torch.stack(torch.unravel_index(index, parameter.shape))
    start = along.new_tensor([part.start for part in own_slices(parameter)])
    place = along - start[:, None]
    size = place.new_tensor(value.shape)[:, None]
    own = ((place >= 0) & (place < size)).all(dim=0)
    sample = value.new_full(index.shape, -torch.inf)
    sample[own] = value[tuple(place[:, own])]
    return sample
