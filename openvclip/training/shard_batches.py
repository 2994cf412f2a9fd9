"""Micro-batches of videos that are read from WebDataset shards, on a disk or in object storage."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openvclip.errors import UsageError, VideoError
from openvclip.processes import Processes
from openvclip.training.batches import (
    Batch,
    Batching,
    end_workers,
    ignore_sigterm,
    seed_of,
    start_workers,
)
from openvclip.training.shards import (
    class_of,
    is_video_or_label,
    label_of,
    require_webdataset,
)
from openvclip.video.decoding import read_clip
from openvclip.video.files import VIDEO_SUFFIXES
from openvclip.video.sampling import Sampling
from openvclip.video.transforms import Transform

_MAX_STREAMS = 16  # streams of a process; the workers share the streams
_SHUFFLE_BUFFER = 100  # encoded videos of a stream that are shuffled together
_MAX_BROKEN_IN_A_ROW = 20

_log = logging.getLogger(__name__)


class ShardBatches:
    """The micro-batches that one process reads from shards, step after step.

    A process reads up to 16 streams side by side. Each stream has its own shards, in an order that
    depends on the seed and the epoch alone. The streams give one micro-batch each in turn, so the
    number of workers does not change the videos of a step. If the shards of a stream end
    before the epoch does, the stream reads its shards again. A video that can't be read is replaced
    by the next video of the stream.

    Args:
        index: number of videos in each shard, by path or address.
        names: names of the classes.
        transform: transform from 8-bit frames to model input.
        sampling: the frames that are read from each video.
        batching: how the videos are grouped and read.

    Attributes:
        batch_size: number of videos in a step.
        steps: number of steps in an epoch.
        accumulate: number of micro-batches in a step.

    Raises:
        UsageError: there are fewer videos than ``batching.batch_size`` or fewer shards than
            processes, or the number of workers does not divide the number of streams.
    """

    def __init__(
        self,
        index: Mapping[str, int],
        names: Sequence[str],
        transform: Transform,
        sampling: Sampling,
        batching: Batching,
    ) -> None:
        world_size, n_videos = batching.processes.world_size, sum(index.values())
        if len(index) < world_size or n_videos < batching.batch_size:
            raise UsageError(
                f"{len(index)} shards with {n_videos} videos are too few for {world_size} "
                f"processes and a batch of {batching.batch_size}; expected at least a shard for "
                "each process and as many videos as a batch has."
            )
        self.batch_size = batching.batch_size
        self.accumulate = batching.micro_batches_per_step()
        self.steps = n_videos // batching.batch_size
        samples = _Samples(names, transform, sampling, batching.seed)
        schedule = _Schedule(_micro_batch_sizes(batching), self.steps, _streams(index, batching))
        self._dataset = _Streams(dict(index), samples, schedule, batching.processes)
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,  # the data set gives batches
            num_workers=batching.num_workers,
            pin_memory=batching.pin,
            worker_init_fn=ignore_sigterm,
            generator=torch.Generator().manual_seed(batching.seed),
        )
        self._iterator: Iterator[Batch] = iter(())

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the next epoch, and the number of its steps that were done in an earlier run."""
        self._dataset.epoch, self._dataset.first_step = epoch, first_step

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = start_workers(self._loader)
        return self._iterator

    def close(self) -> None:
        """End the worker processes. The batches can't be iterated afterwards."""
        end_workers(self._iterator)


def _micro_batch_sizes(batching: Batching) -> list[int]:
    """The number of videos in each micro-batch of a step."""
    share = batching.batch_size // batching.processes.world_size
    return [min(batching.micro_batch, share - i) for i in range(0, share, batching.micro_batch)]


def _streams(index: Mapping[str, int], batching: Batching) -> int:
    """The number of streams of a process, which the workers have to share evenly."""
    world_size, num_workers = batching.processes.world_size, batching.num_workers
    streams = _MAX_STREAMS
    while streams * world_size > len(index):
        streams //= 2
    if num_workers and streams % num_workers:
        divisors = [str(n) for n in range(1, streams + 1) if streams % n == 0]
        raise UsageError(
            f"--num-workers {num_workers}: {len(index)} shards and {world_size} processes make "
            f"{streams} streams a process; choose {', '.join(divisors)} workers, or more shards."
        )
    return streams


class _Samples:
    """Reads samples from shards, and decodes them to clips with labels."""

    def __init__(
        self, names: Sequence[str], transform: Transform, sampling: Sampling, seed: int
    ) -> None:
        self.names, self.transform, self.sampling, self.seed = names, transform, sampling, seed

    def shuffled(self, shard: str, *position: int) -> Iterator[dict[str, Any]]:
        """Yield the encoded samples of a shard, in an order that seed and position determine."""
        wds = require_webdataset()
        order = random.Random(seed_of(self.seed, shard, *position))
        with wds.gopen(shard) as stream:  # the pipeline of webdataset leaves its files open
            opened = [{"url": shard, "stream": stream}]
            files = wds.tariterators.tar_file_expander(opened, select_files=is_video_or_label)
            samples = wds.tariterators.group_by_keys(files)
            shuffle = wds.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER, rng=order)
            yield from shuffle(samples)

    def decode(self, sample: Mapping[str, Any], *position: int) -> tuple[Tensor, int, str]:
        """Return the input of the model ``[T, C, H, W]``, the class index and the name."""
        name = f"{sample['__url__']}/{sample['__key__']}"
        generator = torch.Generator().manual_seed(seed_of(self.seed, name, *position))
        label = class_of(label_of(sample, name), self.names, name)
        ending = next((key for key in sample if f".{key}" in VIDEO_SUFFIXES), None)
        if ending is None:
            raise VideoError(f"{name}: has no video; expected a file <key>.mp4 in the sample.")
        with tempfile.NamedTemporaryFile(suffix=f".{ending}") as file:  # FFmpeg seeks in files
            file.write(sample[ending])
            file.flush()
            try:
                options = {**vars(self.sampling), "transform": self.transform}
                clip = read_clip(file.name, generator=generator, **options)[0]
            except VideoError as error:
                raise VideoError(str(error).replace(file.name, name)) from error
        return clip, label, name


@dataclass(frozen=True)
class _Schedule:
    """Which stream gives which micro-batch of an epoch.

    Attributes:
        sizes: number of videos in each micro-batch of a step.
        steps: number of steps in an epoch.
        streams: number of streams of the process.
    """

    sizes: list[int]
    steps: int
    streams: int

    def size(self, number: int) -> int:
        """Return the number of videos in a micro-batch of the epoch."""
        return self.sizes[number % len(self.sizes)]

    def videos_before(self, number: int) -> list[int]:
        """Return how many videos each stream gives before a micro-batch of the epoch."""
        videos = [0] * self.streams
        for earlier in range(number):
            videos[earlier % self.streams] += self.size(earlier)
        return videos


class _Streams(IterableDataset[Batch]):
    """The micro-batches of this process, or of this worker of the process."""

    def __init__(
        self,
        index: dict[str, int],
        samples: _Samples,
        schedule: _Schedule,
        processes: Processes,
    ) -> None:
        self.index, self.samples = index, samples
        self.schedule, self.processes = schedule, processes
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        schedule, per_step = self.schedule, len(self.schedule.sizes)
        first = self.first_step * per_step
        skipped = schedule.videos_before(first)
        streams: dict[int, Iterator[tuple[Tensor, int, str]]] = {}
        for number in range(first + worker, schedule.steps * per_step, workers):
            # A loader takes one batch from each worker in turn, and starts with the first worker.
            stream = number % schedule.streams
            if stream not in streams:
                streams[stream] = self._decoded(stream, skipped[stream])
            videos, labels, names = zip(
                *(next(streams[stream]) for _ in range(schedule.size(number))), strict=True
            )
            yield torch.stack(videos), torch.tensor(labels), list(names)

    def _decoded(self, stream: int, skip: int) -> Iterator[tuple[Tensor, int, str]]:
        """Skip ``skip`` samples of a stream, then yield decoded samples endlessly."""
        broken = 0
        for sample, *position in self._encoded(stream, skip):
            try:
                decoded = self.samples.decode(sample, *position)
            except VideoError as error:
                _log.warning("%s The next video of the stream replaces this video.", error)
                broken += 1
                if broken == _MAX_BROKEN_IN_A_ROW:
                    raise
                continue
            for _ in range(1 + broken):
                yield decoded
            broken = 0

    def _encoded(self, stream: int, skip: int) -> Iterator[tuple[Any, ...]]:
        shards = list(self.index)
        random.Random(seed_of(self.samples.seed, self.epoch)).shuffle(shards)
        world_size = self.processes.world_size
        first = self.processes.rank + stream * world_size
        shards_of_stream = shards[first :: self.schedule.streams * world_size]
        turn = 0
        while True:
            for shard in shards_of_stream:
                if skip >= self.index[shard]:
                    skip -= self.index[shard]
                    continue
                for sample in self.samples.shuffled(shard, self.epoch, turn):
                    if skip:
                        skip -= 1
                    else:
                        yield sample, self.epoch, turn
            turn += 1
