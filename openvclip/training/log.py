"""What a run says of itself: ``metrics.jsonl``, TensorBoard, lines with the time that is left."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from openvclip.checkpoints import atomic_path


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        number: from 1.
        loss: mean over the batch of all processes, at the weights themselves.
        lr: learning rate.
        alpha: of the regulariser, or ``None`` where the second pass was left out.
        waiting: seconds in which this process waited for videos.
        seconds: the whole step.
    """

    number: int
    loss: float
    lr: float
    alpha: float | None
    waiting: float
    seconds: float


class LoaderWatch:
    """Tells, once, that training waits for videos.

    Args:
        steps: looked at together.
        share: of the time in which waiting is worth a warning.
    """

    def __init__(self, steps: int = 50, share: float = 0.2) -> None:
        self.steps, self.share = steps, share
        self._waiting = self._seconds = 0.0
        self._seen, self._said = 0, False

    def add(self, step: Step) -> str | None:
        """Take a step into account; a warning where it is due."""
        self._waiting += step.waiting
        self._seconds += step.seconds
        self._seen += 1
        if self._said or self._seen % self.steps:
            return None
        part = self._waiting / self._seconds if self._seconds else 0.0
        self._waiting = self._seconds = 0.0
        if part <= self.share:
            return None
        self._said = True
        return (
            f"The loader is the bottleneck: {part:.0%} of the last {self.steps} steps was waiting "
            "for videos. More --num-workers help, or videos that are smaller or on a faster disk."
        )


class RunLog:
    """Writes what happens in a run.

    Args:
        folder: for ``metrics.jsonl`` and ``tensorboard/``; ``None`` in processes that only train.
        total: steps of the run.
        first: steps that were done before; later lines of an earlier run are dropped.
        every: steps between two lines.
    """

    def __init__(self, folder: Path | None, total: int, *, first: int = 0, every: int = 10) -> None:
        self.total, self.every = total, every
        self._path, self._board = None, None
        self._watch = LoaderWatch()
        self._pace: float | None = None
        if folder is not None:
            self._path = folder / "metrics.jsonl"
            _drop_lines_after(first, self._path)
            self._board = _tensorboard(folder / "tensorboard", first)

    def step(self, step: Step) -> None:
        """Take note of a step."""
        if self._path is None:
            return
        self._pace = step.seconds if self._pace is None else 0.95 * self._pace + 0.05 * step.seconds
        warning = self._watch.add(step)
        if warning is not None:
            print(warning, file=sys.stderr, flush=True)
        if step.number % self.every and step.number != self.total:
            return
        numbers = {"loss": step.loss, "lr": step.lr, "alpha": step.alpha}
        times = {"seconds": round(step.seconds, 4), "waiting": round(step.waiting, 4)}
        self.write(step.number, **numbers, **times)
        if not sys.stderr.isatty():  # there the progress bar says this
            left = timedelta(seconds=round(self._pace * (self.total - step.number)))
            print(
                f"step {step.number}/{self.total}, loss {step.loss:.4f}, lr {step.lr:.3g}, "
                f"{step.seconds:.2f} s a step, {left} left",
                flush=True,
            )

    def write(self, step: int, **values: Any) -> None:
        """Append a line of numbers, and give them to TensorBoard."""
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def tells(self, step: int, name: str) -> bool:
        """Whether there is a number of this name for a step; no in processes that only train."""
        if self._path is None:
            return False
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return any(line["step"] == step and name in line for line in lines)

    def close(self) -> None:
        """Let TensorBoard write what it holds."""
        if self._board is not None:
            self._board.close()


def _drop_lines_after(first: int, path: Path) -> None:
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = []
    for line in old.splitlines():
        try:
            if json.loads(line)["step"] <= first:
                kept.append(line + "\n")
        except ValueError:  # a process was killed while it wrote
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path, first: int) -> Any:
    """A writer, or ``None`` where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)
