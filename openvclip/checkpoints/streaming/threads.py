"""Several threads, each of which reads, computes and writes parts of models by itself.

A part stays in the caches of one core from the first read to the write, and no thread waits for
another one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.checkpoints.streaming.outputs import WeightOutput
from openvclip.checkpoints.streaming.pipeline import (
    Buffer,
    Compute,
    fewer_torch_threads,
    part_bytes,
    weights_bar,
)

_RUN = 16 << 20  # bytes of an entry that one thread takes; the parts of a run are read in order
_MOST_THREADS = 8


class _Run(NamedTuple):
    """Consecutive elements of an entry, from ``start`` to ``end``."""

    name: str
    start: int
    end: int


def stream_in_threads(
    inputs: Sequence[WeightInput],
    outputs: Sequence[WeightOutput],
    sizes: Mapping[str, Tensor],
    compute: Compute,
    *,
    progress: bool | None = None,
) -> None:
    """Compute every entry of the outputs from the same entry of the inputs, part by part.

    This is :func:`openvclip.checkpoints.streaming.pipeline.stream` for inputs that several threads
    can read. The parts are computed in any order.

    Args:
        inputs: the models to read. Each has ``threads_can_read``.
        outputs: the models to write.
        sizes: the entries of each output, on the meta device, in the order of the files.
        compute: computes one part. Called in several threads at the same time.
        progress: whether to show a progress bar. Default: only on a terminal.
    """
    count = min(_MOST_THREADS, max(2, torch.get_num_threads()))
    with (
        fewer_torch_threads(torch.get_num_threads()),
        weights_bar(sizes, progress) as bar,
    ):
        work = _Work(inputs, outputs, sizes, compute, bar, count)
        threads = [
            threading.Thread(target=work.run, name=f"openvclip-merge-{k}") for k in range(count)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            for thread in started:
                thread.join()
        finally:  # after Ctrl-C, no thread writes to a file that is closed
            work.stop()
            for thread in started:
                thread.join()
    if work.error is not None:
        raise work.error


class _Work:
    """The runs of all entries, which several threads take one after the other."""

    def __init__(
        self,
        inputs: Sequence[WeightInput],
        outputs: Sequence[WeightOutput],
        sizes: Mapping[str, Tensor],
        compute: Compute,
        bar: Any,
        thread_count: int,
    ) -> None:
        self._inputs, self._outputs, self._sizes = inputs, outputs, sizes
        self._compute, self._bar, self._lock = compute, bar, threading.Lock()
        self._part_bytes = part_bytes(thread_count * (len(inputs) + len(outputs)))
        self._left = deque(self._runs())
        self._stopped = False
        self.error: BaseException | None = None

    def _runs(self) -> Iterator[_Run]:
        for name, size in self._sizes.items():
            step = self._step(name) * max(1, _RUN // self._part_bytes)
            for start in range(0, max(1, size.numel()), step):
                yield _Run(name, start, min(start + step, size.numel()))

    def _step(self, name: str) -> int:
        """Return the number of elements of a part of the entry."""
        itemsizes = (source.sizes[name].itemsize for source in self._inputs)
        return self._part_bytes // max(self._sizes[name].itemsize, *itemsizes)

    def run(self) -> None:
        """Compute runs until none is left, and keep the error of this thread."""
        try:
            if torch.get_num_threads() > 1:
                torch.set_num_threads(1)
            input_buffers = [Buffer() for _ in self._inputs]
            output_buffers = [Buffer() for _ in self._outputs]
            while not self._stopped:
                try:
                    run = self._left.popleft()
                except IndexError:
                    return
                self._compute_run(run, input_buffers, output_buffers)
                with self._lock:
                    self._bar.update(run.end - run.start)
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop()

    def stop(self) -> None:
        """Let all threads end after their parts."""
        self._stopped = True

    def _compute_run(
        self, run: _Run, input_buffers: list[Buffer], output_buffers: list[Buffer]
    ) -> None:
        name, step = run.name, self._step(run.name)
        checksums = [0 for _ in self._inputs]
        for start in range(run.start, max(run.start + 1, run.end), step):
            if self._stopped:
                return
            count = min(step, run.end - start)
            values = []
            for k, source in enumerate(self._inputs):
                value = input_buffers[k].tensor(source.sizes[name].dtype, count)
                checksums[k] = source.read_part(name, start, value, checksums[k])
                values.append(value)
            results = [b.tensor(self._sizes[name].dtype, count) for b in output_buffers]
            self._compute(name, values, results)
            for output, result in zip(self._outputs, results, strict=True):
                output.write_part(name, start, result)
        for source, checksum in zip(self._inputs, checksums, strict=True):
            source.add_checksum(name, run.start, run.end - run.start, checksum)
