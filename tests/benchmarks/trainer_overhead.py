"""Measure what the trainer adds to a step, without the passes, the optimizer and the loader.

    python -m tests.benchmarks.trainer_overhead
    python -m tests.benchmarks.trainer_overhead --videos 8 --steps 5

The loop of ``examples/finetune.py`` runs on clips of noise, without checkpoints. The times inside
the classifier, ``backward``, ``optimizer.step`` and the loader are subtracted from the time of each
step. The rest contains setting and restoring the interpolated weights, clipping the gradient and
writing the log. In the last step of an epoch it also contains averaging the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from torch import Tensor

import openvclip
from examples.finetune import train
from openvclip.training.log import RunLog, Step
from openvclip.training.recipe import Recipe
from tests.benchmarks.machine import machine

MODEL = "ViT-B-32-quickgelu"


class Clock:
    """Adds up the seconds within some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return call


def shares(videos: int, steps: int) -> list[float]:
    """Return the overhead of the trainer in each step of one epoch, without the first step."""
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    openvclip.expand_temporal_attention(model)
    names = [f"class {number}" for number in range(8)]
    tokenizer = open_clip.get_tokenizer(MODEL)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, names, ["{}"])
    batch = (torch.randn(videos, 8, 3, 224, 224), torch.arange(videos) % len(names))
    recipe = Recipe(epochs=1, warmup_epochs=0, average_after=0)
    clock, overheads, ends = Clock(), list[float](), list[float]()

    def note(step: Step) -> None:
        log.step(step)
        ends.append(time.perf_counter())
        if step.number > 1:  # the first makes the optimizer's state
            overheads.append(1 - (clock.seconds + step.waiting) / (ends[-1] - ends[-2]))
        clock.seconds = 0.0

    optimizer = torch.optim.AdamW
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(classifier, "forward", clock.timed(classifier.forward)),
        patch.object(Tensor, "backward", clock.timed(Tensor.backward)),
        patch.object(optimizer, "step", clock.timed(optimizer.step)),
    ):
        log = RunLog(Path(folder), steps, every=1)
        train(classifier, [batch] * steps, steps, recipe, on_step=note)
        log.close()
    return overheads


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=4, help="clips of 8 frames in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps of the epoch, at least 3")
    args = parser.parse_args()
    *overheads, last = shares(args.videos, args.steps)
    print(f"{machine()}; {MODEL}, {args.videos} clips of 8 frames a step\n")
    print(f"overhead of the trainer in a step: {statistics.median(overheads):.1%} (of ", end="")
    print(", ".join(f"{share:.1%}" for share in overheads) + f"), at an epoch's end {last:.1%}")


if __name__ == "__main__":
    main()
