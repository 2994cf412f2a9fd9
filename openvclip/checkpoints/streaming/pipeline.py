"""Read, compute and write the parts of models at the same time, in buffers that are reused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.checkpoints.streaming.outputs import WeightOutput
from openvclip.commands.progress import progress_bar

Compute = Callable[[str, list[Tensor], list[Tensor]], None]
"""Computes one part of an entry: ``compute(name, values, results)``.

``values`` holds the part of each input, and ``results`` holds a tensor to fill for each output. All
tensors have one dimension and cover the same elements of the entry. After the call, the tensors are
reused for another part.
"""

_ALL_BUFFERS = 64 << 20  # bytes of all buffers together
_LARGEST_PART = 512 << 10  # bytes of one buffer; a larger part does not stay in the caches
_SMALLEST_PART = 64 << 10
_STAGES = 3  # one part is read, one part is computed and one part is written
_READERS = 8  # threads


@dataclass(frozen=True)
class _Part:
    """Consecutive elements of an entry: ``count`` elements from index ``start`` on."""

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
    """Compute every entry of the outputs from the same entry of the inputs, part by part.

    Args:
        inputs: the models to read.
        outputs: the models to write.
        sizes: the entries of each output, on the meta device, in the order in which they are
            written.
        compute: computes one part.
        whole: whether each entry is a single part. Default: ``False``.
        progress: whether to show a progress bar. Default: only on a terminal.
    """
    reader_count = min(len(inputs), _READERS)
    with (
        fewer_torch_threads(reader_count + 1),
        ThreadPoolExecutor(reader_count, "openvclip-read") as readers,
        ThreadPoolExecutor(1, "openvclip-write") as writer,
        weights_bar(sizes, progress) as bar,
    ):
        stages = [_Stage(inputs, outputs, sizes, readers, writer) for _ in range(_STAGES)]
        previous: _Stage | None = None
        for part, stage in zip(_parts(inputs, sizes, len(outputs), whole), cycle(stages)):
            stage.wait()  # until its last part is written
            if previous is not None:
                previous.wait()  # until its part is read, so that each file is read in order
            stage.read(part)
            if previous is not None:
                bar.update(previous.compute_and_write(compute))
            previous = stage
        if previous is not None:
            previous.wait()
            bar.update(previous.compute_and_write(compute))
        for stage in stages:
            stage.wait()


def weights_bar(sizes: Mapping[str, Tensor], progress: bool | None) -> Any:
    """Return a progress bar that counts elements."""
    return progress_bar(
        total=sum(size.numel() for size in sizes.values()),
        desc="weights",
        unit=" weights",
        unit_scale=True,
        disable=None if progress is None else not progress,
    )


@contextmanager
def fewer_torch_threads(busy: int) -> Iterator[None]:
    """Use ``busy`` fewer PyTorch threads, to keep cores free for other threads.

    PyTorch's threads spin after each operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - busy))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Stage:
    """The buffers of one part, which is first read, then computed, then written."""

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
        self._input_buffers = [Buffer() for _ in inputs]
        self._output_buffers = [Buffer() for _ in outputs]
        self._tasks: list[Future[None]] = []
        self._part = _Part("", 0, 0)
        self._values: list[Tensor] = []

    def wait(self) -> None:
        """Wait until the last tasks are done, and raise the error of a task that failed."""
        for task in self._tasks:
            task.result()

    def read(self, part: _Part) -> None:
        """Start to read a part of each input."""
        self._part = part
        self._values = [
            buffer.tensor(source.sizes[part.name].dtype, part.count)
            for source, buffer in zip(self._inputs, self._input_buffers, strict=True)
        ]
        self._tasks = [
            self._readers.submit(source.read, part.name, part.start, values)
            for source, values in zip(self._inputs, self._values, strict=True)
        ]

    def compute_and_write(self, compute: Compute) -> int:
        """Compute the part that was read, start to write it, and return its number of elements."""
        dtype = self._sizes[self._part.name].dtype
        results = [buffer.tensor(dtype, self._part.count) for buffer in self._output_buffers]
        compute(self._part.name, self._values, results)
        self._tasks = [
            self._writer.submit(output.write, result)
            for output, result in zip(self._outputs, results, strict=True)
        ]
        return self._part.count


class Buffer:
    """Memory that grows to the size of the largest tensor that it held."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, count: int) -> Tensor:
        """Return a tensor of ``count`` elements in this memory, with one dimension."""
        needed = count * dtype.itemsize
        if needed > self._memory.numel():
            self._memory = torch.empty(needed, dtype=torch.uint8)
        return self._memory[:needed].view(dtype)


def part_bytes(buffer_count: int) -> int:
    """Return the size of a part if this number of parts is in memory at a time."""
    return max(_SMALLEST_PART, min(_ALL_BUFFERS // buffer_count, _LARGEST_PART))


def _parts(
    inputs: Sequence[WeightInput], sizes: Mapping[str, Tensor], outputs: int, whole: bool
) -> Iterator[_Part]:
    size_of_part = part_bytes(_STAGES * (len(inputs) + outputs))
    for name, size in sizes.items():
        itemsize = max(size.itemsize, *(source.sizes[name].itemsize for source in inputs))
        step = max(1, size.numel()) if whole else size_of_part // itemsize
        for start in range(0, max(1, size.numel()), step):
            yield _Part(name, start, min(step, size.numel() - start))
