"""Buffers that a forward pass updates: the pass at the interpolated weights leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from openvclip.weights.numerics import copy_all
from openvclip.weights.shards import local

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def keeping_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore all buffers bitwise after the block, also after an exception.

    A forward pass can update buffers: running statistics of batch norm, vectors of spectral norm,
    observers of quantisation, codebooks. A buffer that was changed in place gets its old values. A
    buffer that was replaced is put back, together with the numbers and flags of its module, which
    often describe the buffer (such as the length of a cache).

    ``DistributedDataParallel`` sends the buffers of the first process before each pass that follows
    a reduction of gradients. The next pass after the block sends the buffers again.

    Args:
        modules: modules whose buffers are kept, with all submodules.
    """
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    owners = [_Owner(part) for part in parts if part._buffers]
    wrappers = [part for part in parts if isinstance(part, DistributedDataParallel)]
    sends = [wrapper.require_forward_param_sync for wrapper in wrappers]
    live = _writable(tensor for owner in owners for tensor in owner.buffers.values())
    with torch.no_grad():
        values = [local(tensor) for tensor in live]
        stash = [torch.empty_like(value) for value in values]
        copy_all(stash, values)
        del values
    try:
        yield
    finally:
        for owner in owners:
            owner.restore()
        _write_back(live, stash)
        for wrapper, send in zip(wrappers, sends, strict=True):
            wrapper.require_forward_param_sync = send


class _Owner:
    """A module with buffers, and its entries before the block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        self.plain = _plain_attributes(module)

    def restore(self) -> None:
        """Put replaced buffers back, and with them the numbers and flags of the module."""
        now = self.module._buffers
        if now.keys() == self.buffers.keys() and all(
            now[name] is buffer for name, buffer in self.buffers.items()
        ):
            return
        for name in now.keys() - self.buffers.keys():
            delattr(self.module, name)
        now.update(self.buffers)
        attributes = self.module.__dict__
        for name in _plain_attributes(self.module).keys() - self.plain.keys():
            del attributes[name]
        attributes.update(self.plain)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, flags and texts of a module, except whether the module is trained."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN) and name != "training"
    }


def _writable(buffers: Iterable[Tensor | None]) -> list[Tensor]:
    """Return each buffer once, without buffers that nothing can change in place."""
    unique = {id(buffer): buffer for buffer in buffers if buffer is not None}
    return [
        buffer
        for buffer in unique.values()
        if buffer.layout == torch.strided and not (buffer.is_inference() or _is_expanded(buffer))
    ]


def _is_expanded(tensor: Tensor) -> bool:
    """Return whether several elements have the same memory, as after ``expand()``."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


@torch.no_grad()
def _write_back(live: list[Tensor], stash: list[Tensor]) -> None:
    targets, sources = [], []
    for tensor, kept in zip(live, stash, strict=True):
        part = local(tensor)
        if (part.shape, part.dtype, part.device) == (kept.shape, kept.dtype, kept.device):
            targets.append(part)
            sources.append(kept)
        else:  # an observer resized its buffer
            tensor.data = kept
    copy_all(targets, sources)
