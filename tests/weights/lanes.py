"""Streams of a device, imitated on the CPU: every unordered access to the same memory is an error.

Operations run at once, so the results are right in any case. What is checked is the order that
events and waits guarantee, with a vector clock for each stream, as a race detector for threads does
it. A GPU may run unordered operations in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


class RaceError(AssertionError):
    """Two streams use the same memory in no certain order."""


@dataclass
class Use:
    """When a memory was last written and since then read: a stream and the time of it."""

    written: tuple[str, int] | None = None
    read: dict[str, int] = field(default_factory=dict)


class Stream:
    """A stream with the methods of ``torch.cuda.Stream`` that are used."""

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, {name: 0}

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        for name, time in event.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def has_seen(self, name: str, time: int) -> bool:
        return self.clock.get(name, 0) >= time


class Lanes(TorchDispatchMode):
    """The streams of a device, which look at each operation in a ``with`` block.

    Args:
        room: the memory that PyTorch holds for later use, at each question.
    """

    device = torch.device("cpu")

    def __init__(self, room: int = 2**40) -> None:
        super().__init__()
        self.compute, self.to_device, self.to_host = map(Stream, ("compute", "h2d", "d2h"))
        self.present = self.compute
        self.room = room
        self.uses: dict[int, Use] = {}
        self.kept: dict[int, set[str]] = {}
        self.log: list[tuple[str, str]] = []  # the stream and the name of each operation
        self.early: list[str] = []  # memory that was freed too early

    def main(self) -> Stream:
        return self.compute

    @contextmanager
    def on(self, lane: Stream) -> Iterator[None]:
        before, self.present = self.present, lane
        try:
            yield
        finally:
            self.present = before

    def keep(self, tensor: Tensor, lane: Stream) -> None:
        self.kept.setdefault(address(tensor), set()).add(lane.name)

    def free_bytes(self) -> int:
        return self.room

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        lane, schema = self.present, func._schema
        lane.clock[lane.name] += 1
        self.log.append((lane.name, func._overloadpacket.__name__))
        allocates = schema.name.startswith("aten::empty")  # and reads no values
        for position, argument in enumerate([] if allocates else schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value):
                self._check(tensor, lane, writes, str(func))
        for tensor in tensors_in(result):
            if not any(tensor is other for other in tensors_in([args, kwargs])):
                self._made(tensor, lane)
        return result

    def _check(self, tensor: Tensor, lane: Stream, writes: bool, what: str) -> None:
        use = self.uses.setdefault(address(tensor), Use())
        earlier = [use.written] if use.written else []
        earlier += list(use.read.items()) if writes else []
        for name, time in earlier:
            if not lane.has_seen(name, time):
                raise RaceError(f"{what} in {lane.name} does not wait for {name}")
        now = lane.clock[lane.name]
        if writes:
            use.written, use.read = (lane.name, now), {}
        else:
            use.read[lane.name] = now

    def _made(self, tensor: Tensor, lane: Stream) -> None:
        place = address(tensor)
        use = self.uses[place] = Use(written=(lane.name, lane.clock[lane.name]))
        self.kept.pop(place, None)
        weakref.finalize(tensor, self._freed, place, use, lane)

    def _freed(self, place: int, use: Use, lane: Stream) -> None:
        """Note memory that its stream could use again before another stream is done with it."""
        if self.uses.get(place) is not use:
            return
        ends = [*use.read.items(), *([use.written] if use.written else [])]
        kept = self.kept.get(place, set())
        self.early += [
            name for name, time in ends if name not in kept and not lane.has_seen(name, time)
        ]
        del self.uses[place]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
