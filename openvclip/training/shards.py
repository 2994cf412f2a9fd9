r"""Micro-batches of videos that stream from WebDataset shards, on a disk or in object storage.

    python -m openvclip.training.shards "k400-{0000..0999}.tar" --out k400.json

A shard is a tar file with a video ``<key>.mp4`` and its class ``<key>.cls`` (an index or a name)
for each sample. The index that this command writes holds the labels of each shard, so that a run
knows its length and resumes without reading what was seen. Shards on a disk are looked through at
the start of a run that is given no index; those elsewhere need one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from openvclip.checkpoints import atomic_path
from openvclip.errors import AnnotationError, MissingDependencyError, UsageError, VideoError
from openvclip.processes import Processes
from openvclip.training.batches import (
    Batch,
    end_workers,
    micro_batches_of_a_step,
    outlive_the_signal,
    seed_of,
)
from openvclip.video import Sampling, read_clip
from openvclip.video.files import VIDEO_SUFFIXES
from openvclip.video.transforms import Transform
from openvclip.weights.names import listed

_LANES = 16  # streams that a process reads side by side, at most; workers share them
_SHUFFLED = 100  # encoded videos of a stream that are mixed
_BROKEN_IN_A_ROW = 20

_log = logging.getLogger(__name__)


def find_shards(pattern: str) -> list[str]:
    """The shards of a pattern such as ``"k400-{0000..0999}.tar"``, in its order.

    Raises:
        AnnotationError: files are missing, or a shard is there twice.
        MissingDependencyError: webdataset is not installed.
    """
    shards: list[str] = _webdataset().shardlists.expand_urls(pattern)
    missing = [name for name in shards if not _is_remote(name) and not Path(name).is_file()]
    if missing:
        raise AnnotationError(
            f"--shards {pattern!r} means {len(shards)} files, of which {len(missing)} don't exist "
            f"({listed(missing)}). Check the folder, and the numbers with their leading zeros, as "
            "in 'k400-{0000..0999}.tar'; quote the pattern."
        )
    if len(set(shards)) < len(shards):
        raise AnnotationError(f"--shards {pattern!r} names some shards more than once.")
    return shards


def read_index(shards: Sequence[str], path: Path | None) -> dict[str, list[str]]:
    """The labels of each shard, as texts, from an index or from the shards.

    Raises:
        AnnotationError: the index lacks shards or is none, or a shard can't be read, is empty or
            has videos without labels.
    """
    if path is None:
        remote = [name for name in shards if _is_remote(name)]
        if remote:
            raise AnnotationError(
                f"{listed(remote)}: shards that are not on a disk need --shard-index FILE; "
                "python -m openvclip.training.shards PATTERN --out FILE writes one."
            )
        return {name: _labels_of(name) for name in shards}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        index = {name: found[name] for name in shards if found.get(name)}
    except (OSError, ValueError, AttributeError) as error:
        raise AnnotationError(f"{path}: is no index of shards ({error}).") from error
    missing = [name for name in shards if name not in index]
    if missing:
        raise AnnotationError(
            f"{path}: lacks {len(missing)} of {len(shards)} shards ({listed(missing)}). Its names "
            "are like "
            + listed(sorted(found))
            + "; write it with the pattern that you give to --shards."
        )
    return index


def class_indices(index: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[int]]:
    """The labels of an index as numbers.

    Raises:
        AnnotationError: a label is neither the name of a class nor the index of one.
    """
    return {
        shard: [_class_of(label, names, shard) for label in labels]
        for shard, labels in index.items()
    }


class ShardBatches:
    """What one process reads of shards: all of a step's micro-batches, step after step.

    A process reads up to 16 streams side by side, each through shards of its own in an order that
    comes from seed and epoch alone; micro-batches are taken from the streams in turn. So the
    number of workers changes nothing. A stream that ends before the epoch does begins again. A
    video that can't be read is replaced by the next one that can.

    Args:
        index: number of videos of each shard.
        names: the class names.
        batch_size: videos of a step, in all processes together.
        micro_batch: videos at a time.
        transform: from 8-bit frames to pixels.
        sampling: which frames of a video to read.
        processes: the processes.
        seed: of everything random.
        num_workers: processes that read videos, for each process that trains.
        pin: read into page-locked memory, for a GPU.

    Attributes:
        steps: steps of an epoch.
        accumulate: micro-batches of a step.

    Raises:
        UsageError: there are fewer videos than a batch has or fewer shards than processes, or the
            workers can't share the streams.
    """

    def __init__(
        self,
        index: Mapping[str, int],
        names: Sequence[str],
        *,
        batch_size: int,
        micro_batch: int,
        transform: Transform,
        sampling: Sampling,
        processes: Processes | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin: bool = False,
    ) -> None:
        processes = processes or Processes()
        if len(index) < processes.world_size or sum(index.values()) < batch_size:
            raise UsageError(
                f"{len(index)} shards with {sum(index.values())} videos are too few for "
                f"{processes.world_size} processes and a batch of {batch_size}; give each process "
                "a shard at least."
            )
        self.batch_size = batch_size
        self.accumulate = micro_batches_of_a_step(batch_size, micro_batch, processes)
        self.steps = sum(index.values()) // batch_size
        share = batch_size // processes.world_size
        sizes = [min(micro_batch, share - i) for i in range(0, share, micro_batch)]
        lanes = _LANES
        while lanes * processes.world_size > len(index):
            lanes //= 2
        if num_workers and lanes % num_workers:
            allowed = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
            raise UsageError(
                f"--num-workers {num_workers}: {len(index)} shards and {processes.world_size} "
                f"processes make {lanes} streams a process; choose {', '.join(allowed)} workers, "
                "or more shards."
            )
        self._samples = _Samples(names, transform, sampling, seed)
        self._dataset = _Lanes(dict(index), self._samples, sizes, self.steps, lanes, processes)
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,  # they come as batches
            num_workers=num_workers,
            pin_memory=pin,
            worker_init_fn=outlive_the_signal,
            generator=torch.Generator().manual_seed(seed),
        )
        self._iterator: Iterator[Batch] = iter(())

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Say which epoch comes, and how many of its steps were done before."""
        self._dataset.epoch, self._dataset.first_step = epoch, first_step

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = iter(self._loader)
        return self._iterator

    def close(self) -> None:
        """End the workers; the batches can't be iterated any more."""
        end_workers(self._iterator)


class _Samples:
    """Labelled clips from the bytes of samples."""

    def __init__(
        self, names: Sequence[str], transform: Transform, sampling: Sampling, seed: int
    ) -> None:
        self.names, self.transform, self.sampling, self.seed = names, transform, sampling, seed

    def shuffled(self, shard: str, *where: int) -> Iterator[dict[str, Any]]:
        """The encoded samples of a shard, in an order from the seed and ``where`` alone."""
        wds = _webdataset()
        order = random.Random(seed_of(self.seed, shard, *where))
        with wds.gopen(shard) as stream:  # webdataset's own pipeline leaves its files open
            opened = [{"url": shard, "stream": stream}]
            files = wds.tariterators.tar_file_expander(opened, select_files=_is_wanted)
            samples = wds.tariterators.group_by_keys(files)
            yield from wds.shuffle(_SHUFFLED, initial=_SHUFFLED, rng=order)(samples)

    def decode(self, sample: Mapping[str, Any], *where: int) -> tuple[Tensor, int, str]:
        """Clip ``[T, C, H, W]``, label, and the name of the sample."""
        name = f"{sample['__url__']}/{sample['__key__']}"
        generator = torch.Generator().manual_seed(seed_of(self.seed, name, *where))
        label = _class_of(_label_text(sample, name), self.names, name)
        ending = next((key for key in sample if f".{key}" in VIDEO_SUFFIXES), None)
        if ending is None:
            raise VideoError(f"{name}: there is no video in this sample.")
        with tempfile.NamedTemporaryFile(suffix=f".{ending}") as file:  # FFmpeg seeks in files
            file.write(sample[ending])
            file.flush()
            try:
                clip = read_clip(file.name, generator=generator, **vars(self.sampling))[0]
            except VideoError as error:
                raise VideoError(str(error).replace(file.name, name)) from error
        return self.transform(clip, generator), label, name


class _Lanes(IterableDataset[Batch]):
    """The micro-batches of this process, or those of them that are this worker's."""

    def __init__(
        self,
        index: dict[str, int],
        samples: _Samples,
        sizes: list[int],
        steps: int,
        lanes: int,
        processes: Processes,
    ) -> None:
        self.index, self.samples, self.processes = index, samples, processes
        self.sizes, self.steps, self.lanes = sizes, steps, lanes
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        begin, per_step = self.first_step * len(self.sizes), len(self.sizes)
        seen = [0] * self.lanes
        for number in range(begin):
            seen[number % self.lanes] += self.sizes[number % per_step]
        streams: dict[int, Iterator[tuple[Tensor, int, str]]] = {}
        for number in range(begin + worker, self.steps * per_step, workers):
            # The loader takes batches from the workers in turn, beginning with the first one.
            lane = number % self.lanes
            if lane not in streams:
                streams[lane] = self._stream(lane, seen[lane])
            videos, labels, names = zip(
                *(next(streams[lane]) for _ in range(self.sizes[number % per_step])), strict=True
            )
            yield torch.stack(videos), torch.tensor(labels), list(names)

    def _stream(self, lane: int, skip: int) -> Iterator[tuple[Tensor, int, str]]:
        """Decoded samples of a lane without the first ones; goes on without end."""
        replaced = 0
        for sample, *where in self._encoded(lane, skip):
            try:
                decoded = self.samples.decode(sample, *where)
            except VideoError as error:
                _log.warning("%s The next video takes its place.", error)
                replaced += 1
                if replaced == _BROKEN_IN_A_ROW:
                    raise
                continue
            for _ in range(1 + replaced):
                yield decoded
            replaced = 0

    def _encoded(self, lane: int, skip: int) -> Iterator[tuple[Any, ...]]:
        shards = list(self.index)
        random.Random(seed_of(self.samples.seed, self.epoch)).shuffle(shards)
        world = self.processes.world_size
        own = shards[self.processes.rank + lane * world :: self.lanes * world]
        turn = 0
        while True:
            for shard in own:
                if skip >= self.index[shard]:
                    skip -= self.index[shard]
                    continue
                for sample in self.samples.shuffled(shard, self.epoch, turn):
                    if skip:
                        skip -= 1
                    else:
                        yield sample, self.epoch, turn
            turn += 1


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise MissingDependencyError(
            'Reading shards needs webdataset: pip install "openvclip[examples]"'
        ) from error
    return webdataset


def _is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a file in a shard; WebDataset's endings begin at the first dot."""
    folder, name = os.path.split(name)
    key, dot, ending = name.partition(".")
    return os.path.join(folder, key), (dot + ending).lower()


def _is_wanted(name: str) -> bool:
    return _split(name)[1] in {".cls", *VIDEO_SUFFIXES}


def _labels_of(shard: str) -> list[str]:
    """The label of each video in a shard, whose other content is passed over."""
    labels: dict[str, str] = {}
    videos: list[str] = []
    try:
        with _webdataset().gopen(shard) as file:
            mode: Any = "r|*" if _is_remote(shard) else "r:*"
            with tarfile.open(fileobj=file, mode=mode) as archive:
                for member in archive:
                    key, ending = _split(member.name)
                    content = archive.extractfile(member) if ending == ".cls" else None
                    if content is not None:
                        labels[key] = content.read().decode().strip()
                    elif ending in VIDEO_SUFFIXES:
                        videos.append(key)
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{shard}: can't be read as a shard ({error}).") from error
    bare = [key for key in videos if key not in labels]
    if bare or not videos:
        raise AnnotationError(
            f"{shard}: "
            + (f"{len(bare)} videos have no label ({listed(bare)})" if bare else "holds no videos")
            + "; expected <key>.mp4 and <key>.cls for each sample."
        )
    return [labels[key] for key in videos]


def _label_text(sample: Mapping[str, Any], name: str) -> str:
    if "cls" not in sample:
        raise AnnotationError(f"{name}: has no label; expected a file <key>.cls beside the video.")
    return str(sample["cls"].decode().strip())


def _class_of(label: str, names: Sequence[str], where: str) -> int:
    if label in names:
        return list(names).index(label)
    if label.isascii() and label.isdigit() and int(label) < len(names):
        return int(label)
    raise AnnotationError(
        f"{where}: unknown class {label!r}; it is none of the {len(names)} class names, nor the "
        "index of one."
    )


def main(arguments: list[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Write the index of some shards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="a pattern; braces name several shards")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    index = {name: _labels_of(name) for name in find_shards(args.shards)}
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(index) + "\n", encoding="utf-8")
    tell(f"{len(index)} shards with {sum(map(len, index.values()))} videos in {args.out}.")


if __name__ == "__main__":
    main()
