"""Micro-batches of video files: one order for any number of processes and loader workers."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from openvclip.errors import UsageError
from openvclip.processes import Processes
from openvclip.video import VideoDataset

Batch = tuple[Tensor, Tensor, list[str]]
"""Videos ``[B, T, C, H, W]``, labels ``[B]``, and the names of the videos."""


def seed_of(*parts: object) -> int:
    """A seed from some values, unlike for unlike values."""
    text = "/".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def micro_batches_of_a_step(batch_size: int, micro_batch: int, processes: Processes) -> int:
    """How many micro-batches each process adds up.

    Raises:
        UsageError: the processes can't share the batch evenly.
    """
    for name, value in (("--batch-size", batch_size), ("--per-device-batch", micro_batch)):
        if value < 1:
            raise UsageError(f"{name} {value}: expected at least 1.")
    if batch_size % processes.world_size:
        raise UsageError(
            f"--batch-size {batch_size} can't be shared evenly by {processes.world_size} "
            f"processes; choose a multiple of {processes.world_size}, or another number of "
            "processes."
        )
    return -(-batch_size // processes.world_size // micro_batch)


class VideoBatches:
    """What one process reads of a data set: all of a step's micro-batches, step after step.

    The order comes from seed and epoch alone, and so does all that is random in a video, so that
    neither the number of processes nor that of workers changes what a step sees.

    Args:
        dataset: the videos.
        batch_size: videos of a step, in all processes together.
        micro_batch: videos at a time.
        processes: the processes.
        seed: of the order.
        num_workers: processes that read videos, for each process that trains.
        pin: read into page-locked memory, for a GPU.

    Attributes:
        batch_size: videos of a step, all of them where there are fewer than were asked for.
        steps: steps of an epoch; the videos that are left over are not seen in it.
        accumulate: micro-batches of a step.

    Raises:
        UsageError: the processes can't share the batch evenly.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        batch_size: int,
        micro_batch: int,
        processes: Processes | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin: bool = False,
    ) -> None:
        processes = processes or Processes()
        if processes.world_size > 1 and len(dataset) < batch_size:
            raise UsageError(
                f"{len(dataset)} videos don't fill one batch of {batch_size} for "
                f"{processes.world_size} processes; use one process, or a smaller --batch-size."
            )
        self.batch_size = batch_size = min(batch_size, len(dataset))
        self.accumulate = micro_batches_of_a_step(batch_size, micro_batch, processes)
        self.steps = len(dataset) // batch_size
        self.dataset = dataset
        self._order = _Order(len(dataset), batch_size, micro_batch, processes, seed)
        self._loader = DataLoader(
            _Named(dataset),
            batch_sampler=self._order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin,
            worker_init_fn=outlive_the_signal,
            generator=torch.Generator().manual_seed(seed),  # leaves the global one alone
        )
        self._iterator: Iterator[Batch] = iter(())

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Say which epoch comes, and how many of its steps were done before."""
        self.dataset.set_epoch(epoch)
        self._order.epoch, self._order.first_step = epoch, first_step

    def __iter__(self) -> Iterator[Batch]:
        self._iterator = iter(self._loader)
        return self._iterator

    def close(self) -> None:
        """End the workers; the batches can't be iterated any more."""
        end_workers(self._iterator)


class _Order(Sampler[list[int]]):
    """The indices of one process's micro-batches."""

    def __init__(
        self, n: int, batch_size: int, micro_batch: int, processes: Processes, seed: int
    ) -> None:
        self.n, self.batch_size, self.micro_batch = n, batch_size, micro_batch
        self.processes, self.seed = processes, seed
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator).tolist()
        for step in range(self.first_step, self.n // self.batch_size):
            own = self.processes.share(order[step * self.batch_size : (step + 1) * self.batch_size])
            for start in range(0, len(own), self.micro_batch):
                yield own[start : start + self.micro_batch]


class _Named(Dataset[tuple[Tensor, int, str]]):
    """A data set whose items bring the paths of their videos."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        video, label = self.dataset[index][:2]
        return video, label, self.dataset.path(index)


def steps_of_run(
    loader: Iterable[Sequence[Any]], per_epoch: int, accumulate: int, first: int, total: int
) -> Iterator[tuple[int, list[Sequence[Any]]]]:
    """The number of each step of a run, and its batches.

    Args:
        loader: iterated once an epoch.
        per_epoch: steps of an epoch.
        accumulate: batches of a step.
        first: the steps that were done before.
        total: of the run, which can end within an epoch.

    Raises:
        UsageError: the loader gives another number of batches, or can't begin within an epoch.
    """
    if first >= total:  # a finished run, which can have ended within an epoch
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


def _begin_epoch(loader: Any, epoch: int, skip: int) -> None:
    """Fresh random starts and crops, without the steps that were done before."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)
        return
    if skip:
        raise UsageError("This loader can't begin within an epoch; it has no set_epoch().")
    set_epoch = getattr(getattr(loader, "dataset", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


def outlive_the_signal(_: int) -> None:
    """For workers: a signal to the whole job must not end them before the run has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers(iterator: Iterator[Any]) -> None:
    """End a loader's workers, which would outlive the signal that Python ends them by at its exit.

    A loader does so itself when it is collected, which an exception's traceback can put off.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)  # a loader without workers has none
    if shut_down is not None:
        shut_down()


def class_warnings(
    labels: Sequence[int], names: Sequence[str], zero_shot: Sequence[str] = ()
) -> list[str]:
    """What to look at in the classes before a run: those without videos, those not unseen.

    Args:
        labels: class indices of the training videos.
        names: the training classes.
        zero_shot: class names that the model is to be tested on without having seen them.
    """
    found = []
    empty = [name for index, name in enumerate(names) if index not in set(labels)]
    if empty:
        found.append(f"{len(empty)} of {len(names)} classes have no videos: {', '.join(empty)}.")
    unseen = {_plain(name): name for name in zero_shot}
    both = [unseen[_plain(name)] for name in names if _plain(name) in unseen]
    if both:
        found.append(
            f"{len(both)} of {len(zero_shot)} zero-shot classes are trained on, so accuracy on "
            f"them is not zero-shot: {', '.join(both)}."
        )
    return found


def _plain(name: str) -> str:
    """The letters and digits, so that ``Baby_Crawling`` and ``baby crawling`` are one class."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())
