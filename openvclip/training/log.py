"""The log of a run: ``metrics.jsonl``, TensorBoard, and lines with the time that is left."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path


@dataclass(frozen=True)
class Step:
    """The numbers of one optimizer step.

    Attributes:
        number: number of the step, from 1.
        loss: loss at the weights themselves, the mean over the batch of all processes.
        lr: learning rate.
        alpha: alpha of the regulariser; ``None`` in a step without the regulariser.
        waiting: seconds in which this process waited for videos.
        seconds: seconds of the whole step.
    """

    number: int
    loss: float
    lr: float
    alpha: float | None
    waiting: float
    seconds: float


class LoaderWatch:
    """Warns once if training waits for videos.

    Args:
        steps: number of steps over which the waiting time is summed up.
        share: share of the time, in [0, 1]. Waiting for a larger share gives a warning.
    """

    def __init__(self, steps: int = 50, share: float = 0.2) -> None:
        self.steps, self.share = steps, share
        self._waiting = self._seconds = 0.0
        self._n_steps, self._has_warned = 0, False

    def add(self, step: Step) -> str | None:
        """Take a step into account, and return a warning if training waits for videos."""
        self._waiting += step.waiting
        self._seconds += step.seconds
        self._n_steps += 1
        if self._has_warned or self._n_steps % self.steps:
            return None
        share = self._waiting / self._seconds if self._seconds else 0.0
        self._waiting = self._seconds = 0.0
        if share <= self.share:
            return None
        self._has_warned = True
        return (
            f"The loader is the bottleneck: {share:.0%} of the last {self.steps} steps was waiting "
            "for videos. Increase --num-workers, or use smaller videos or a faster disk."
        )


class RunLog:
    """Writes the numbers of a run to ``metrics.jsonl`` and to TensorBoard, and prints them.

    Args:
        folder: folder of ``metrics.jsonl`` and ``tensorboard/``. ``None``: write and print
            nothing, as in all processes except the first.
        total: number of steps of the run.
        first: number of steps that were done in an earlier run. Lines of later steps are removed.
        every: number of steps between two lines.
    """

    def __init__(self, folder: Path | None, total: int, *, first: int = 0, every: int = 10) -> None:
        self.total, self.every = total, every
        self._path, self._board = None, None
        self._watch = LoaderWatch()
        self._seconds_per_step: float | None = None
        if folder is not None:
            self._path = folder / "metrics.jsonl"
            _remove_lines_after(first, self._path)
            self._board = _tensorboard(folder / "tensorboard", first)

    def step(self, step: Step) -> None:
        """Write a step, if its line is due, and print the time that is left."""
        if self._path is None:
            return
        mean = step.seconds if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = 0.95 * mean + 0.05 * step.seconds
        warning = self._watch.add(step)
        if warning is not None:
            print(warning, file=sys.stderr, flush=True)
        if step.number % self.every and step.number != self.total:
            return
        numbers = {"loss": step.loss, "lr": step.lr, "alpha": step.alpha}
        times = {"seconds": round(step.seconds, 4), "waiting": round(step.waiting, 4)}
        self.write(step.number, **numbers, **times)
        if not sys.stderr.isatty():  # on a terminal the progress bar shows this
            left = timedelta(seconds=round(self._seconds_per_step * (self.total - step.number)))
            print(
                f"step {step.number}/{self.total}, loss {step.loss:.4f}, lr {step.lr:.3g}, "
                f"{step.seconds:.2f} s a step, {left} left",
                flush=True,
            )

    def write(self, step: int, **values: Any) -> None:
        """Append a line of numbers, if there are any, and give the numbers to TensorBoard.

        Args:
            step: the number of steps that are done.
            values: numbers by name.
        """
        if self._path is None or not values:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def has(self, step: int, name: str) -> bool:
        """Return whether the log has a number of this name for a step; false without a folder."""
        if self._path is None:
            return False
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return any(line["step"] == step and name in line for line in lines)

    def close(self) -> None:
        """Write the numbers that TensorBoard still holds, and close its file."""
        if self._board is not None:
            self._board.close()


def _remove_lines_after(step: int, path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:  # the line is cut off: a process was killed while it wrote the line
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _tensorboard(folder: Path, first: int) -> Any:
    """Return a writer, or ``None`` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)
