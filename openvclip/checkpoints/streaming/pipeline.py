"""Reading, arithmetic and writing at the same time, in buffers that are used again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.checkpoints.streaming.outputs import WeightOutput

Compute = Callable[[str, list[Tensor], list[Tensor]], None]
"""Gets the name of an entry, its elements of each input, and where to write those of each output.

The tensors have one dimension and hold the same stretch of the entry; they are used again for the
next stretch when the call is over.
"""

_BUFFERS = 64 << 20  # bytes of all buffers together
_LARGEST_PART = 512 << 10  # bytes of one buffer; more leaves the caches
_SMALLEST_PART = 64 << 10
_SLOTS = 3  # one part is read, one computed and one written
_READERS = 8  # threads


@dataclass(frozen=True)
class _Part:
    name: str
    start: int
    count: int


def stream(
    inputs: Sequence[WeightInput],
    outputs: Sequence[WeightOutput],
    sizes: Mapping[str, Tensor],
    compute: Compute,
    *,
    whole: bool = False,
    progress: bool | None = None,
) -> None:
    """Compute every entry of the outputs from those of the inputs, part by part.

    Args:
        inputs: where to read.
        outputs: where to write.
        sizes: the entries of each output, on the meta device, in the order to write them in.
        compute: what to do with a part.
        whole: take each entry as one part.
        progress: show a progress bar; by default only on a terminal.
    """
    from tqdm import tqdm

    busy = min(len(inputs), _READERS)
    with (
        _fewer_threads(busy + 1),
        ThreadPoolExecutor(busy, "openvclip-read") as readers,
        ThreadPoolExecutor(1, "openvclip-write") as writer,
        tqdm(
            total=sum(size.numel() for size in sizes.values()),
            unit=" weights",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        slots = [_Slot(inputs, outputs, sizes, readers, writer) for _ in range(_SLOTS)]
        before: _Slot | None = None
        for part, slot in zip(_parts(inputs, sizes, len(outputs), whole), cycle(slots)):
            slot.wait()  # until what it held is written
            if before is not None:
                before.wait()  # until it is read, so that each file is read in its order
            slot.read(part)
            if before is not None:
                bar.update(before.finish(compute))
            before = slot
        if before is not None:
            before.wait()
            bar.update(before.finish(compute))
        for slot in slots:
            slot.wait()


@contextmanager
def _fewer_threads(busy: int) -> Iterator[None]:
    """PyTorch leaves ``busy`` cores alone: its threads spin for a while after each operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - busy))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Slot:
    """The buffers for one part: what is read of each input, what is written to each output."""

    def __init__(
        self,
        inputs: Sequence[WeightInput],
        outputs: Sequence[WeightOutput],
        sizes: Mapping[str, Tensor],
        readers: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
    ) -> None:
        self._inputs, self._outputs, self._sizes = inputs, outputs, sizes
        self._readers, self._writer = readers, writer
        self._rooms = [_Room() for _ in (*inputs, *outputs)]
        self._tasks: list[Future[None]] = []
        self._part = _Part("", 0, 0)
        self._given: list[Tensor] = []

    def wait(self) -> None:
        """Until the last tasks are done; raise what they raised."""
        for task in self._tasks:
            task.result()

    def read(self, part: _Part) -> None:
        """Begin to read a part."""
        self._part = part
        self._given = [
            room.of(given.sizes[part.name].dtype, part.count)
            for given, room in zip(self._inputs, self._rooms, strict=False)
        ]
        self._tasks = [
            self._readers.submit(given.read, part.name, part.start, into)
            for given, into in zip(self._inputs, self._given, strict=True)
        ]

    def finish(self, compute: Compute) -> int:
        """Compute the results of the part that was read, and begin to write them."""
        dtype = self._sizes[self._part.name].dtype
        results = [room.of(dtype, self._part.count) for room in self._rooms[len(self._inputs) :]]
        compute(self._part.name, self._given, results)
        self._tasks = [
            self._writer.submit(output.write, result)
            for output, result in zip(self._outputs, results, strict=True)
        ]
        return self._part.count


class _Room:
    """Memory that grows to the largest tensor it had to hold."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, dtype: torch.dtype, count: int) -> Tensor:
        """A tensor of one dimension in it."""
        needed = count * dtype.itemsize
        if needed > self._memory.numel():
            self._memory = torch.empty(needed, dtype=torch.uint8)
        return self._memory[:needed].view(dtype)


def _parts(
    inputs: Sequence[WeightInput], sizes: Mapping[str, Tensor], outputs: int, whole: bool
) -> Iterator[_Part]:
    room = _BUFFERS // (_SLOTS * (len(inputs) + outputs))
    room = max(_SMALLEST_PART, min(room, _LARGEST_PART))
    for name, size in sizes.items():
        widest = max(size.itemsize, *(given.sizes[name].itemsize for given in inputs))
        step = max(1, size.numel()) if whole else room // widest
        for start in range(0, max(1, size.numel()), step):
            yield _Part(name, start, min(step, size.numel() - start))
