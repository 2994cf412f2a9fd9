"""Processes that train one model together: shards, reduction of gradients, agreement.

Under ``fully_shard`` (FSDP2) each parameter is a ``DTensor``, and each process holds a part of it.
openvclip copies only the local shard of each parameter. :func:`whole` and :func:`full_state` gather
whole tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from openvclip.errors import UsageError


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a ``DTensor``.

    ``torch.distributed.tensor`` is slow to import, so this function never imports it. If the module
    is not loaded, no tensor can be a ``DTensor``.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, detached, in the same memory.

    The part of a plain tensor is the whole tensor.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    detached: Any = tensor.detach()
    with torch.no_grad():
        part: Tensor = detached.to_local()
    return part


def versions(tensor: Tensor) -> tuple[int, int]:
    """Return the version counters of a tensor and of the part that this process holds.

    PyTorch increases a counter at operations in place, except those of fused optimizers and those
    through ``.data``.
    """
    part: Any = getattr(tensor, "_local_tensor", tensor)  # local() gives a part with a new counter
    return tensor._version, part._version


def own_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return the position of this process's part in the whole tensor, one slice per dimension."""
    sharded: Any = tensor
    (chunk,) = sharded.__create_chunk_list__()  # torch.distributed.checkpoint uses this method
    return tuple(
        slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )


@torch.no_grad()
def local_like(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of ``value`` that corresponds to this process's part of ``like``.

    Args:
        value: a whole tensor on any device, or a tensor with any sharding.
        like: a tensor of the same shape, plain or sharded.

    Returns:
        The part as a plain tensor. For a whole ``value`` it is a view and needs no communication. A
        sharded ``value`` is redistributed, so every process must call this function.
    """
    if not is_sharded(like):
        return whole(value)
    if not is_sharded(value):
        return value.detach()[own_slices(like)]
    target: Any = like
    source: Any = value
    return local(source.redistribute(target.device_mesh, target.placements))


@torch.no_grad()
def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor with the sharding of ``like``, or unchanged if ``like`` is plain."""
    if not is_sharded(like):
        return value
    sharded = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    local(sharded).copy_(value[own_slices(like)])
    return sharded


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that ``fully_shard`` keeps between two passes.

    The root module keeps its gathered parameters after a forward pass without a backward pass.
    After ``set_reshard_after_backward(False)``, all modules keep them. Gathered parameters do not
    see later changes of the shards, and they hide the shards from ``named_parameters()``.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


@contextmanager
def no_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Accumulate gradients without reduction in each ``DistributedDataParallel`` of ``modules``.

    This does not apply to wrappers with ``static_graph=True``, whose first backward pass must
    reduce the gradients.
    """
    with ExitStack() as stack:
        for wrapper in _data_parallel(modules):
            if not wrapper.static_graph:
                stack.enter_context(wrapper.no_sync())
        yield


def _data_parallel(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    parts = {id(part): part for module in modules for part in module.modules()}
    return [part for part in parts.values() if isinstance(part, DistributedDataParallel)]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients by one factor, so that their joint norm is at most ``max_norm``.

    The result is that of ``torch.nn.utils.clip_grad_norm_``. For sharded gradients the norm is
    reduced over the processes first. PyTorch 2.7 and 2.8 add the epsilon of the factor to the norm
    of each process instead.

    Returns:
        The joint norm before the scaling, the same in all processes.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Any = nn.utils.get_total_norm(gradients)
    if is_sharded(norm):
        from torch.distributed.tensor import Replicate

        norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole(norm)


def process_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the process groups that train the modules, in the same order in each process."""
    modules = list(modules)
    groups: list[Any] = [part.process_group for part in _data_parallel(modules)]
    return _unique(groups + mesh_groups(p for module in modules for p in module.parameters()))


def mesh_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """Return the process groups that hold the shards of the tensors, or none without shards."""
    sharded: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    return _unique([g for tensor in sharded for g in tensor.device_mesh.get_all_groups()])


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """Return the process groups whose processes hold different shards of a tensor.

    The groups of replicas (hybrid sharding) are not returned. A plain tensor has no groups.
    """
    if not is_sharded(tensor):
        return ()
    part: Any = tensor
    mesh = part.device_mesh
    return tuple(mesh.get_group(i) for i, p in enumerate(part.placements) if p.is_shard())


def _unique(groups: list[Any]) -> list[Any]:
    return list({id(group): group for group in groups}.values())


def backend_device(tensors: Iterable[Tensor]) -> torch.device:
    """Return the device on which the process group of the tensors communicates.

    It can differ from the device of the shards, which may be offloaded to the CPU.
    """
    tensors = list(tensors)
    first: Any = next((tensor for tensor in tensors if is_sharded(tensor)), tensors[0])
    return torch.device(first.device_mesh.device_type) if is_sharded(first) else first.device


def any_process(flags: list[bool], tensors: Iterable[Tensor]) -> list[bool]:
    """Return for each flag whether it is set in any process that holds shards of the tensors.

    Without sharded tensors, the flags are returned without communication. With sharded tensors,
    every process must call this function with the same number of flags.
    """
    tensors = list(tensors)
    groups = mesh_groups(tensors)
    if not groups:
        return flags
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    reduced = torch.tensor(flags, dtype=torch.int32, device=backend_device(sharded))
    for group in groups:
        distributed.all_reduce(reduced, distributed.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in reduced.tolist()]


def require_agreement(
    groups: Iterable[Any], facts: Mapping[str, bytes], device: torch.device, hint: str
) -> None:
    """Raise an error in every process of a group if any fact differs between the processes.

    Args:
        groups: process groups from :func:`process_groups`. Every process must call this function.
        facts: values to compare, by the name that the error text uses.
        device: device from :func:`backend_device`.
        hint: last sentence of the error text.

    Raises:
        UsageError: a fact differs between processes.
    """
    digests = b"".join(hashlib.blake2b(fact, digest_size=16).digest() for fact in facts.values())
    mine = torch.tensor(list(digests), dtype=torch.uint8, device=device).reshape(len(facts), 16)
    for group in groups:
        gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, mine, group=group)
        same = torch.stack([(row == gathered[0]).all(dim=1) for row in gathered]).all(dim=0)
        if not bool(same.all()):
            different = [
                name for name, is_same in zip(facts, same.tolist(), strict=True) if not is_same
            ]
            raise UsageError(
                "The processes that train the model together differ in "
                f"{' and '.join(different)}. {hint}"
            )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the gathered tensor in every process. A plain tensor is returned detached."""
    entry: Any = tensor.detach()
    gathered: Tensor = entry.full_tensor() if is_sharded(tensor) else entry
    return gathered


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose sharded entries (``DTensor``) are gathered on the CPU.

    Entries are gathered one after the other, so the device holds at most one whole entry at a time.
    Every process must call this function, and every process gets the result. Use
    :func:`openvclip.save_checkpoint` to gather the entries in one process only.

    Args:
        state: mapping from names to tensors, for example the average of a model under
            ``fully_shard``.

    Returns:
        The same names in the same order. Entries that are not sharded are the tensors of ``state``.
    """
    return {
        name: whole(value).cpu() if is_sharded(value) else value for name, value in state.items()
    }
