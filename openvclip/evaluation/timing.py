"""Measure where the time of an evaluation goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Timing:
    """The time that an evaluation spent, in seconds.

    For several processes, ``wall`` is the longest time of a process. The other times are sums over
    the processes.

    Attributes:
        clips: number of videos that were encoded in this run. Videos of earlier runs and videos
            that could not be read are not counted.
        wall: duration of the loop over the batches, including the start of the workers.
        decode: time in which the encoder waited for videos. The workers decode while the encoder
            computes, so this is the time that decoding adds.
        copy: time of the copies from the CPU to the device of the model.
        encode: time of the model, including the copies of its features to the CPU.
        total: sum of the durations of the loops of all processes. Time that is in neither
            ``decode``, ``copy`` nor ``encode`` was spent on weights and records.
    """

    clips: int = 0
    wall: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    total: float = 0.0

    @property
    def clips_per_second(self) -> float:
        """Throughput of all processes together. NaN if no time was measured."""
        return self.clips / self.wall if self.wall else float("nan")

    @property
    def other(self) -> float:
        """Seconds that were spent neither on decoding nor on copying nor on encoding."""
        return max(self.total - self.decode - self.copy - self.encode, 0.0)

    def shares(self) -> dict[str, float]:
        """Return ``decode``, ``copy``, ``encode`` and ``other`` as fractions that sum to 1."""
        total = self.total or float("nan")
        names = ("decode", "copy", "encode", "other")
        return {name: getattr(self, name) / total for name in names}


class Clock:
    """Measure the seconds between calls of :meth:`lap` and sum them by name."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._seconds = {"decode": 0.0, "copy": 0.0, "encode": 0.0, "other": 0.0}

    def lap(self, name: str) -> None:
        """Add the seconds since the last call to ``name``.

        Args:
            name: ``"decode"``, ``"copy"``, ``"encode"`` or ``"other"``.
        """
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now

    def timing(self, clips: int) -> Timing:
        """Return the times up to the last call of :meth:`lap`.

        Args:
            clips: number of videos that were encoded.
        """
        wall = self._last - self._start
        seconds = {name: self._seconds[name] for name in ("decode", "copy", "encode")}
        return Timing(clips=clips, wall=wall, total=wall, **seconds)


def joined_timing(parts: Sequence[Timing]) -> Timing:
    """Return the timing of processes that ran at the same time."""
    sums = {
        entry.name: sum(getattr(part, entry.name) for part in parts) for entry in fields(Timing)
    }
    return Timing(**{**sums, "wall": max(part.wall for part in parts)})
