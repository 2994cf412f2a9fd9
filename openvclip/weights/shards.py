"""Processes that train one model together: shards, gradient reduction, agreement.

Under ``fully_shard`` (FSDP2) a parameter is a ``DTensor``, of which each process holds a part.
Everything in openvclip that keeps copies of weights keeps such parts; only :func:`full_state`
puts entries together.
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
    """Whether it is a ``DTensor``. None exists before its module, slow to import, is there."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, detached, in the same memory; all of a plain tensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    detached: Any = tensor.detach()
    with torch.no_grad():
        part: Tensor = detached.to_local()
    return part


def own_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor the part of a sharded one is that this process holds."""
    sharded: Any = tensor
    (chunk,) = sharded.__create_chunk_list__()  # what distributed checkpoints ask for
    return tuple(
        slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )


@torch.no_grad()
def local_like(value: Tensor, like: Tensor) -> Tensor:
    """The part of ``value`` that belongs to this process's part of ``like``.

    Args:
        value: the whole tensor, on any device, or one that is sharded in any way.
        like: a tensor of the same shape, plain or sharded.

    Returns:
        A view of ``value`` where that is a whole tensor; that takes no communication.
    """
    if not is_sharded(like):
        return whole(value)
    if not is_sharded(value):
        return value.detach()[own_slices(like)]
    there: Any = like
    moved: Any = value
    return local(moved.redistribute(there.device_mesh, there.placements))


def reshard(model: nn.Module) -> None:
    """Free the copies of whole parameters that ``fully_shard`` keeps between two passes.

    The root module keeps its own after a forward pass without a backward one, and every module
    does after ``set_reshard_after_backward(False)``. They would go on serving the old weights
    after the shards were written to, and hide the shards from ``named_parameters()``.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


@contextmanager
def no_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block ``DistributedDataParallel``, wherever it is, only adds gradients up.

    One with ``static_graph=True`` is left alone: its first backward pass has to reduce.
    """
    with ExitStack() as stack:
        for part in _data_parallel(modules):
            if not part.static_graph:
                stack.enter_context(part.no_sync())
        yield


def _data_parallel(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    parts = {id(part): part for module in modules for part in module.modules()}
    return [part for part in parts.values() if isinstance(part, DistributedDataParallel)]


def process_groups(modules: Iterable[nn.Module]) -> list[Any]:
    """The groups of processes that train the modules together, in the same order in each."""
    modules = list(modules)
    groups: list[Any] = [part.process_group for part in _data_parallel(modules)]
    return _each_once(groups + mesh_groups(p for module in modules for p in module.parameters()))


def mesh_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """The groups of processes that hold parts of the tensors; none where none is sharded."""
    sharded: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    return _each_once([g for tensor in sharded for g in tensor.device_mesh.get_all_groups()])


def _each_once(groups: list[Any]) -> list[Any]:
    return list({id(group): group for group in groups}.values())


def backend_device(tensors: Iterable[Tensor]) -> torch.device:
    """Where the backend of their processes wants its tensors; shards may be offloaded."""
    tensors = list(tensors)
    first: Any = next((tensor for tensor in tensors if is_sharded(tensor)), tensors[0])
    return torch.device(first.device_mesh.device_type) if is_sharded(first) else first.device


def any_process(flags: list[bool], tensors: Iterable[Tensor]) -> list[bool]:
    """Each flag, set where any of the processes set it that hold parts of the sharded tensors.

    Without sharded tensors nothing is sent. Else every process calls this with as many flags.
    """
    tensors = list(tensors)
    groups = mesh_groups(tensors)
    if not groups:
        return flags
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    own = torch.tensor(flags, dtype=torch.int32, device=backend_device(sharded))
    for group in groups:
        distributed.all_reduce(own, distributed.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in own.tolist()]


def require_agreement(
    groups: Iterable[Any], facts: Mapping[str, bytes], device: torch.device, hint: str
) -> None:
    """Raise in every process of a group unless each of the facts is the same in all of them.

    Args:
        groups: from :func:`process_groups`; every process calls this.
        facts: what is compared, by the name that the error gives it.
        device: from :func:`backend_device`.
        hint: the end of the error's text.

    Raises:
        UsageError: a fact differs between processes.
    """
    digests = b"".join(hashlib.blake2b(fact, digest_size=16).digest() for fact in facts.values())
    own = torch.tensor(list(digests), dtype=torch.uint8, device=device).reshape(len(facts), 16)
    for group in groups:
        others = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(others, own, group=group)
        same = torch.stack([(other == others[0]).all(dim=1) for other in others]).all(dim=0)
        if not bool(same.all()):
            unlike = [name for name, alike in zip(facts, same.tolist(), strict=True) if not alike]
            raise UsageError(
                f"The processes that train the model together differ in {' and '.join(unlike)}. "
                + hint
            )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all its parts, in every process; a plain one as it is."""
    entry: Any = tensor.detach()
    full: Tensor = entry.full_tensor() if is_sharded(tensor) else entry
    return full


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with its sharded entries (``DTensor``) put together, on the CPU.

    One entry at a time is whole on the device. Every process calls this, and every one gets the
    result; :func:`openvclip.save_checkpoint` keeps it in one process only.

    Args:
        state: names to tensors, for example the average of a model under ``fully_shard``.

    Returns:
        The same names in the same order. Entries that are not sharded are the given tensors.
    """
    return {
        name: whole(value).cpu() if is_sharded(value) else value for name, value in state.items()
    }
