"""Micro-batches of video files, in an order that does not depend on processes or workers."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from openvclip.errors import UsageError
from openvclip.processes import Processes
from openvclip.video import VideoDataset

if TYPE_CHECKING:
    from openvclip.training.captions import CaptionedVideos

Batch = tuple[Tensor, Tensor, list[str]]
"""Videos ``[B, T, C, H, W]``, class indices ``[B]``, and the paths or names of the videos.

A batch of captioned videos has a list of B captions in place of the class indices.
"""


def seed_of(*parts: object) -> int:
    """Return a seed that is computed from the values. Different values give different seeds."""
    text = "/".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Batching:
    """Options for grouping and reading videos in :class:`VideoBatches` and ``ShardBatches``.

    Attributes:
        batch_size: number of videos in a step, in all processes together.
        micro_batch: number of videos that a process reads and trains on at a time.
        processes: the processes that train together. Default: this process alone.
        seed: seed of the order of the videos.
        num_workers: number of processes that read videos, for each process that trains.
        pin: read into page-locked memory, for a GPU.
    """

    batch_size: int
    micro_batch: int
    processes: Processes = field(default_factory=Processes)
    seed: int = 0
    num_workers: int = 0
    pin: bool = False

    def micro_batches_per_step(self) -> int:
        """Return the number of micro-batches of each process in a step.

        Raises:
            UsageError: a size is below 1, or the processes can't share the batch evenly.
        """
        sizes = (("--batch-size", self.batch_size), ("--per-device-batch", self.micro_batch))
        for name, value in sizes:
            if value < 1:
                raise UsageError(f"{name} {value}: expected at least 1.")
        world_size = self.processes.world_size
        if self.batch_size % world_size:
            raise UsageError(
                f"--batch-size {self.batch_size} can't be shared evenly by {world_size} "
                f"processes; choose a multiple of {world_size}, or another number of processes."
            )
        return -(-self.batch_size // world_size // self.micro_batch)


class VideoBatches:
    """The micro-batches that one process reads from a data set, step after step.

    The order of the videos depends on the seed and the epoch alone, and so does the augmentation.
    The number of processes and the number of workers do not change the videos of a step.

    Args:
        dataset: the videos, with class indices or with captions.
        batching: how the videos are grouped and read.

    Attributes:
        batch_size: number of videos in a step; all videos if there are fewer than
            ``batching.batch_size``.
        steps: number of steps in an epoch. The videos that do not fill a step are left out.
        accumulate: number of micro-batches in a step.

    Raises:
        UsageError: the processes can't share the batch evenly.
    """

    def __init__(self, dataset: VideoDataset | CaptionedVideos, batching: Batching) -> None:
        processes = batching.processes
        if processes.world_size > 1 and len(dataset) < batching.batch_size:
            raise UsageError(
                f"{len(dataset)} videos don't fill one batch of {batching.batch_size} for "
                f"{processes.world_size} processes; use one process, or a smaller --batch-size."
            )
        self.batch_size = min(batching.batch_size, len(dataset))
        self.accumulate = replace(batching, batch_size=self.batch_size).micro_batches_per_step()
        self.steps = len(dataset) // self.batch_size
        self.dataset = dataset
        self._order = _Order(len(dataset), self.batch_size, batching)
        self._loader = DataLoader(
            _NamedVideos(dataset),
            batch_sampler=self._order,
            num_workers=batching.num_workers,
            persistent_workers=batching.num_workers > 0,
            pin_memory=batching.pin,
            worker_init_fn=ignore_sigterm,
            # The loader draws its seeds from this generator, not from PyTorch's global generator.
            generator=torch.Generator().manual_seed(batching.seed),
        )
        self._iterator: Iterator[Batch] = iter(())

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the next epoch.

        Args:
            epoch: the number of the epoch, from 0.
            first_step: the number of its steps that were done in an earlier run.
        """
        self.dataset.set_epoch(epoch)
        self._order.epoch, self._order.first_step = epoch, first_step

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = start_workers(self._loader)
        return self._iterator

    def close(self) -> None:
        """End the worker processes. The batches can't be iterated afterwards."""
        end_workers(self._iterator)


class _Order(Sampler[list[int]]):
    """The indices of the videos in each micro-batch of one process."""

    def __init__(self, n_videos: int, batch_size: int, batching: Batching) -> None:
        self.n_videos, self.batch_size, self.batching = n_videos, batch_size, batching
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        size, batching = self.batch_size, self.batching
        generator = torch.Generator().manual_seed(seed_of(batching.seed, self.epoch))
        order = torch.randperm(self.n_videos, generator=generator).tolist()
        for step in range(self.first_step, self.n_videos // size):
            share = batching.processes.share(order[step * size : (step + 1) * size])
            for start in range(0, len(share), batching.micro_batch):
                yield share[start : start + batching.micro_batch]


class _NamedVideos(Dataset[tuple[Tensor, Any, str]]):
    """A data set whose items hold the path of the video, too."""

    def __init__(self, dataset: VideoDataset | CaptionedVideos) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, Any, str]:
        item: Any = self.dataset[index]
        return item if len(item) == 3 else (*item[:2], self.dataset.path(index))


def steps_of_run(
    loader: Iterable[Sequence[Any]], per_epoch: int, accumulate: int, first: int, total: int
) -> Iterator[tuple[int, list[Sequence[Any]]]]:
    """Yield the number of each step of a run, from 0, with the micro-batches of the step.

    Args:
        loader: gives micro-batches; iterated once in each epoch. Its ``set_epoch(epoch,
            first_step)`` is called before each epoch. Without that method the ``set_epoch(epoch)``
            of its data set is called.
        per_epoch: number of steps in an epoch.
        accumulate: number of micro-batches in a step.
        first: number of steps that were done in an earlier run.
        total: number of steps of the run. The run can end within an epoch.

    Raises:
        UsageError: the loader does not give ``per_epoch`` steps in an epoch; or the run resumes
            within an epoch, and the loader has no ``set_epoch(epoch, first_step)``.
    """
    if first >= total:  # the run is finished; it can have ended within an epoch
        return
    for epoch in range(first // per_epoch, -(-total // per_epoch)):
        step, end = max(first, epoch * per_epoch), (epoch + 1) * per_epoch
        _begin_epoch(loader, epoch, step - epoch * per_epoch)
        batches = iter(loader)
        while group := list(islice(batches, accumulate)):
            yield step, group
            step += 1
            if step == total < end:
                return
        if step != end:
            raise UsageError(
                f"The loader gave {step - epoch * per_epoch} steps in an epoch, with {accumulate} "
                f"batches in a step; expected steps_per_epoch={per_epoch}."
            )


def videos_of_step(
    batches: Sequence[Sequence[Any]], chosen: Sequence[int], device: torch.device
) -> list[Sequence[Any]]:
    """Return the chosen videos of a step, in as few micro-batches as possible.

    No micro-batch is larger than the largest of the step. Their sizes differ by at most one. If all
    videos are chosen, the micro-batches of the step are returned as they are.

    Args:
        batches: the micro-batches of a process in a step. The entries of a micro-batch are tensors
            or lists, with an item for each video.
        chosen: numbers of videos, counted over all micro-batches of the step.
        device: device of the tensors in the result.
    """
    places = [(batch, position) for batch in batches for position in range(len(batch[0]))]
    if len(chosen) == len(places):
        return list(batches)
    number = -(-len(chosen) // max(len(batch[0]) for batch in batches))
    ends = [len(chosen) * i // number for i in range(number + 1)]
    parts = [chosen[start:end] for start, end in pairwise(ends)]
    return [_joined([places[video] for video in part], device) for part in parts]


def _joined(places: list[tuple[Sequence[Any], int]], device: torch.device) -> Sequence[Any]:
    """Return one micro-batch of videos, given the micro-batch and the position of each."""
    joined: list[Any] = []
    for entry in range(len(places[0][0])):
        items = [batch[entry][position] for batch, position in places]
        if isinstance(items[0], Tensor):
            # A video in page-locked memory is copied from there, so the copy does not wait.
            joined.append(torch.stack([item.to(device, non_blocking=True) for item in items]))
        else:
            joined.append(items)
    return joined


def _begin_epoch(loader: Any, epoch: int, first_step: int) -> None:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, first_step)
        return
    if first_step:
        raise UsageError(
            f"The run resumes at step {first_step} of an epoch, and the loader has no method "
            "set_epoch(epoch, first_step); give the loader this method."
        )
    set_epoch = getattr(getattr(loader, "dataset", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


def ignore_sigterm(_worker: int) -> None:
    """Ignore SIGTERM in a worker, so that the run can save before its workers end.

    Schedulers send SIGTERM to all processes of a job. Pass this function to a ``DataLoader`` as
    ``worker_init_fn``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator of a loader, and start its workers while SIGTERM is blocked.

    A worker inherits the block, so a signal can't end it before :func:`ignore_sigterm` runs.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_workers(iterator: Iterator[Any]) -> None:
    """End the workers of a ``DataLoader``, given the iterator of the loader.

    Call this before Python exits. Python sends SIGTERM to the workers at its exit, but these
    workers ignore SIGTERM. The garbage collection of a loader also ends its workers, but the
    traceback of an exception can keep a reference to the loader and delay the collection.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)  # absent in a loader without workers
    if shut_down is not None:
        shut_down()


def class_warnings(
    labels: Sequence[int], names: Sequence[str], zero_shot: Sequence[str] = ()
) -> list[str]:
    """Return warnings about classes without videos, and about zero-shot classes in the training.

    Args:
        labels: class indices of the training videos.
        names: names of the training classes.
        zero_shot: names of the classes for zero-shot tests. A warning lists the names
            that are also training classes.
    """
    warnings = []
    seen = set(labels)
    empty = [name for index, name in enumerate(names) if index not in seen]
    if empty:
        warnings.append(f"{len(empty)} of {len(names)} classes have no videos: {', '.join(empty)}.")
    tested = {_letters(name): name for name in zero_shot}
    trained = [tested[_letters(name)] for name in names if _letters(name) in tested]
    if trained:
        warnings.append(
            f"{len(trained)} of {len(zero_shot)} zero-shot classes are trained on, so accuracy on "
            f"them is not zero-shot: {', '.join(trained)}."
        )
    return warnings


def _letters(name: str) -> str:
    """Letters and digits in lower case: ``Baby_Crawling`` and ``baby crawling`` are one class."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
