"""Time and memory of one regularised training step, as ratios to a plain step.

    python -m tests.benchmarks.regularization_step
    python -m tests.benchmarks.regularization_step --clips 2 --rounds 3

All variants are stepped in turn within one process, round after round, and the median of each
variant's times is divided by the plain step's; a variant that regularises every fourth step is
measured over four steps. The memory of a variant is the largest resident size during its steps,
in a process of its own, less that of the plain step, over the size of the trained parameters.
Any step of two passes holds the gradients of the first while it computes the second, as a step
does that keeps them (gradient accumulation, ``zero_grad(set_to_none=False)``); a plain step frees
them before its only pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

import openvclip
from tests.benchmarks.machine import EXACT_MALLOC, forget_peak, machine, resident_megabytes

MODEL = "ViT-B-32-quickgelu"


class Training:
    """The expanded image tower with its optimizer, a batch of clips and a loss."""

    def __init__(self, clips: int) -> None:
        torch.manual_seed(0)
        self.tower: nn.Module = open_clip.create_model(MODEL).visual
        self.clip = {name: value.clone() for name, value in self.tower.state_dict().items()}
        openvclip.expand_temporal_attention(self.tower)
        self.optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-6)
        self.video = torch.randn(clips, 8, 3, 224, 224)

    def loss(self) -> Tensor:
        """A scalar of the features of all frames."""
        features: Tensor = self.tower(self.video)
        return features.square().mean()


def plain(*, keep_gradients: bool) -> Callable[[Training], Callable[[], Any]]:
    """One pass and the optimizer's step."""

    def make(run: Training) -> Callable[[], Any]:
        def step() -> None:
            run.optimizer.zero_grad(set_to_none=not keep_gradients)
            run.loss().backward()
            run.optimizer.step()

        return step

    return make


def regularised(every: int) -> Callable[[Training], Callable[[], Any]]:
    """The regulariser with CLIP's weights, which the caller holds anyway, as anchor."""

    def make(run: Training) -> Callable[[], Any]:
        iwr = openvclip.InterpolatedWeightRegularizer(
            run.tower, run.optimizer, anchor=run.clip, every=every
        )
        return lambda: iwr.step(run.loss)

    return make


def through_state_dicts(run: Training) -> Callable[[], Any]:
    """The direct way: copies of the model's weights and gradients, state dicts loaded twice."""

    def step() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        run.loss().backward()
        gradients = [p.grad.clone() for p in run.tower.parameters() if p.grad is not None]
        own = deepcopy(run.tower.state_dict())
        alpha = float(torch.rand(())) * 0.6
        mixed = {name: alpha * run.clip[name] + (1 - alpha) * own[name] for name in own}
        run.tower.load_state_dict(mixed)
        run.optimizer.zero_grad(set_to_none=True)
        run.loss().backward()
        run.tower.load_state_dict(own)
        for parameter, gradient in zip(run.tower.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(0.5).add_(gradient)
        run.optimizer.step()

    return step


VARIANTS: dict[str, tuple[Callable[[Training], Callable[[], Any]], int]] = {
    "plain": (plain(keep_gradients=False), 1),
    "plain, gradients kept": (plain(keep_gradients=True), 1),
    "IWR": (regularised(1), 1),
    "IWR, every=4": (regularised(4), 4),
    "through state dicts": (through_state_dicts, 1),
}
"""How to make a step, and how many steps make one turn."""


def time_variants(clips: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each variant, the variants in turn."""
    made = {title: (make(Training(clips)), n) for title, (make, n) in VARIANTS.items()}
    times: dict[str, list[float]] = {title: [] for title in made}
    for round_number in range(rounds + 1):
        for title, (step, n) in made.items():
            start = time.perf_counter()
            for _ in range(n):
                step()
            if round_number:  # the first warms up
                times[title].append((time.perf_counter() - start) / n)
    return {title: statistics.median(values) for title, values in times.items()}


def measure_peak(title: str, clips: int) -> None:
    """Print the peak resident size of some steps, in megabytes, and the size of the weights."""
    run = Training(clips)
    make, n = VARIANTS[title]
    step = make(run)
    for _ in range(n):
        step()
    forget_peak()
    for _ in range(n):
        step()
    trained = sum(p.nbytes for p in run.tower.parameters())
    print(json.dumps([resident_megabytes("VmHWM"), trained / 2**20]))


def peak(title: str, clips: int) -> tuple[float, float]:
    """What :func:`measure_peak` prints, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.regularization_step"]
    command += ["--clips", str(clips), "--measure", title]
    environment = os.environ | EXACT_MALLOC
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    megabytes, trained = json.loads(done.stdout)
    return megabytes, trained


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=4, help="clips of 8 frames in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_peak(args.measure, args.clips)
        return
    print(f"{machine()}; {MODEL}, {args.clips} clips of 8 frames, {args.rounds} rounds\n")
    seconds = time_variants(args.clips, args.rounds)
    peaks = {title: peak(title, args.clips) for title in VARIANTS}
    print("| step | time over plain | extra peak memory over the trained parameters |")
    print("| --- | ---: | ---: |")
    for title in VARIANTS:
        extra = (peaks[title][0] - peaks["plain"][0]) / peaks["plain"][1]
        print(f"| {title} | {seconds[title] / seconds['plain']:.2f} | {extra:.2f} |")


if __name__ == "__main__":
    main()
