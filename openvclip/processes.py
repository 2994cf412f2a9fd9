"""Processes that evaluate together: who does what, and waiting for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")

# The first process to be done waits for the last one, which may have hours of videos before it.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """One process among those that work on the same thing.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, work: list[T]) -> list[T]:
        """This process's part of a list: every ``world_size``-th entry."""
        return work[self.rank :: self.world_size]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            distributed.barrier()

    def gather(self, value: T) -> list[T]:
        """What each process gives, in the order of their numbers, in every process."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, value)
        return found


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes of ``torchrun``, or of a process group that is there already; else this one.

    A group that is made here is taken apart at the end.
    """
    if not distributed.is_available():
        yield Processes()
        return
    made = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if made:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        there = distributed.is_initialized()
        yield (
            Processes(distributed.get_rank(), distributed.get_world_size())
            if there
            else Processes()
        )
    finally:
        if made:
            distributed.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, as ``torchrun`` gives it; 0 alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))
