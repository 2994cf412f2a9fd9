"""Processes that work on one job: their ranks, their shares of the work, synchronisation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from openvclip.errors import UsageError

T = TypeVar("T")

# A process that finishes early waits for the others, which may need hours for their videos.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes that share a job.

    Attributes:
        rank: rank of this process, from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0. Only the first process prints and writes files."""
        return self.rank == 0

    def share(self, work: list[T]) -> list[T]:
        """Return the items of ``work`` for this process: every ``world_size``-th item."""
        return work[self.rank :: self.world_size]

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.world_size > 1:
            distributed.barrier()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Yield the processes of the current process group.

    If ``torchrun`` started several processes and no process group exists, a ``gloo`` group is
    created, and destroyed after the block. If there is neither a process group nor ``torchrun``,
    the result has rank 0 and world size 1.
    """
    if not distributed.is_available():
        yield Processes()
        return
    creates_group = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if creates_group:
        distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        if distributed.is_initialized():
            yield Processes(distributed.get_rank(), distributed.get_world_size())
        else:
            yield Processes()
    finally:
        if creates_group:
            distributed.destroy_process_group()


def started_processes() -> Processes:
    """Return the rank of this process and the number of processes, without a process group.

    ``torchrun`` sets the environment variables ``RANK`` and ``WORLD_SIZE``, and ``srun`` of SLURM
    sets ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS``. Without them the result has rank 0 and world
    size 1. Processes that need nothing from each other use this function: a process that ends then
    does not stop the others.

    Raises:
        UsageError: the variables are no numbers, or the rank is not below the number of processes.
    """
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        rank, world_size = (os.environ.get(name) for name in names)
        if rank is None or world_size is None:
            continue
        if rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
            return Processes(int(rank), int(world_size))
        raise UsageError(
            f"{names[0]}={rank} and {names[1]}={world_size}: expected a number of processes, and a "
            "rank from 0 to this number less 1."
        )
    return Processes()


def local_rank() -> int:
    """Return the rank of this process on its machine, as set by ``torchrun`` or ``srun``.

    Default: 0.
    """
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
