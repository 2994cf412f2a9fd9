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
from torch.nn import functional

import openvclip
from examples.finetune import train
from openvclip.training.log import RunLog, Step
from openvclip.training.methods import choose_trained, text_made_once
from openvclip.training.recipe import Recipe, Run
from tests.benchmarks.machine import machine
from tests.benchmarks.models import TINY, created, noise_for
from tests.helpers import tiny_tokenizer

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


Batch = tuple[Tensor, Tensor]


def classifier_and_batch(
    name: str, videos: int, device: str = "cpu"
) -> tuple[openvclip.ZeroShotClassifier, Batch]:
    """Return the classifier of an expanded CLIP, and a batch of noise with labels."""
    model = openvclip.expand_temporal_attention(created(name, device))
    names = [f"class {number}" for number in range(8)]
    tokenizer = tiny_tokenizer if name == TINY else open_clip.get_tokenizer(name)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, names, ["{}"])
    labels = torch.arange(videos, device=device) % len(names)
    return classifier, (noise_for(model, videos, 8, device), labels)


def shares(videos: int, steps: int) -> list[float]:
    """Return the overhead of the trainer in each step of one epoch, without the first step."""
    classifier, batch = classifier_and_batch(MODEL, videos)
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


def over_bare_loop(name: str, videos: int, steps: int, rounds: int, device: str) -> float:
    """Return the time of the trainer's steps over that of a loop of :func:`bare_steps`.

    Both do ``steps`` steps a round, and the first one of each round does not count.
    """
    classifier, batch = classifier_and_batch(name, videos, device)
    ratios = []
    for _ in range(rounds):
        both = [of(classifier, batch, steps, device) for of in (trainer_seconds, bare_seconds)]
        ratios.append(both[0] / both[1])
    return statistics.median(ratios)


def amp_of(device: str) -> torch.dtype | None:
    """Return the dtype of autocast: bfloat16 on a GPU."""
    return torch.bfloat16 if device == "cuda" else None


def trainer_seconds(
    classifier: openvclip.ZeroShotClassifier, batch: Batch, steps: int, device: str
) -> float:
    """Return the seconds of the trainer's steps without the first one."""
    ends: list[float] = []

    def note(step: Step) -> None:
        if step.number in (1, steps):
            ends.append(now(device))

    recipe = Recipe(epochs=1, warmup_epochs=0, method="iwr")
    train(classifier, [batch] * steps, steps, recipe, run=Run(amp=amp_of(device)), on_step=note)
    return ends[1] - ends[0]


def bare_seconds(
    classifier: openvclip.ZeroShotClassifier, batch: Batch, steps: int, device: str
) -> float:
    """Return the seconds of the same steps in a loop without a log, without the first one."""
    model, (video, labels) = classifier.model, batch
    choose_trained(model, "iwr")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3.33e-6, weight_decay=0.01)
    iwr = openvclip.InterpolatedWeightRegularizer(model, optimizer)
    autocast = torch.autocast(device, torch.bfloat16, enabled=amp_of(device) is not None)

    def closure() -> Tensor:
        with autocast:
            return functional.cross_entropy(classifier(video).float(), labels)

    model.train()
    start = 0.0
    with text_made_once(classifier):
        for step in range(steps):
            iwr.step(closure, max_grad_norm=1.0)
            if step == 0:
                start = now(device)
    return now(device) - start


def now(device: str) -> float:
    """Return the time at which the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
