"""Measure time and memory of one regularised training step, as ratios to a plain step.

    python -m tests.benchmarks.regularization_step
    python -m tests.benchmarks.regularization_step --clips 2 --rounds 3

Each variant runs in its own process. The variants are timed in turn for a number of rounds, and the
median time of each variant is divided by that of the plain step. A variant that regularises every
fourth step is measured over four steps. A variant with a share gives the batch to ``step()``, which
draws a part of it for the interpolated pass. *Two passes* computes the gradient twice at the same
weights and does nothing else, which is the lower limit for a regularised step. Memory is the
largest resident size during the steps of a variant, minus that of the plain step, divided by the
size of the trained parameters.

A step with two passes holds the gradients of the first pass during the second one. A plain step
that keeps its gradients between steps (gradient accumulation, ``zero_grad(set_to_none=False)``)
holds as much. A plain step that frees its gradients does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import openvclip
from tests.benchmarks.machine import (
    EXACT_MALLOC,
    KEEPING_MALLOC,
    forget_peak,
    machine,
    resident_megabytes,
)
from tests.benchmarks.models import created, noise_for
from tests.benchmarks.turns import serve, time_variants_in_turn

MODULE = "tests.benchmarks.regularization_step"
MODEL = "ViT-B-32-quickgelu"


class Training:
    """The expanded image tower with its optimizer, a batch of clips and a loss."""

    def __init__(self, clips: int, model: str = MODEL, device: str = "cpu") -> None:
        self.tower: nn.Module = created(model, device).visual
        self.clip = {name: value.clone() for name, value in self.tower.state_dict().items()}
        openvclip.expand_temporal_attention(self.tower)
        self.optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-6)
        self.video = noise_for(self.tower, clips, 8, device)

    def loss(self, video: Tensor | None = None) -> Tensor:
        """A scalar of the features of all frames, of the batch or of a part of it."""
        features: Tensor = self.tower(self.video if video is None else video)
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


def two_passes(run: Training) -> Callable[[], Any]:
    """Two passes at the same weights and the optimizer's step."""

    def step() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        run.loss().backward()
        run.loss().backward()
        run.optimizer.step()

    return step


def regularised(every: int = 1, share: float = 1.0) -> Callable[[Training], Callable[[], Any]]:
    """The regulariser with CLIP's weights, which the caller holds anyway, as anchor."""

    def make(run: Training) -> Callable[[], Any]:
        iwr = openvclip.InterpolatedWeightRegularizer(
            run.tower, run.optimizer, anchor=run.clip, every=every, share=share
        )
        return lambda: iwr.step(run.loss, run.video)

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
    "two passes": (two_passes, 1),
    "IWR": (regularised(1), 1),
    "IWR, every=4": (regularised(every=4), 4),
    "IWR, share=0.25": (regularised(share=0.25), 1),
    "IWR, share=0.125": (regularised(share=0.125), 1),
    "IWR, every=2, share=0.5": (regularised(every=2, share=0.5), 2),
    "through state dicts": (through_state_dicts, 1),
}
"""How to make a step, and how many steps make one turn."""


def time_variants(clips: int, rounds: int, environment: dict[str, str]) -> dict[str, float]:
    """Median seconds of a step of each variant, the variants in turn."""
    cases = {title: json.dumps([title, clips]) for title in VARIANTS}
    times = time_variants_in_turn(MODULE, cases, rounds, environment)
    return {title: statistics.median(times[title]) / n for title, (_, n) in VARIANTS.items()}


def time_steps(title: str, clips: int) -> None:
    """One process of :func:`time_variants`."""
    make, n = VARIANTS[title]
    step = make(Training(clips))

    def turn() -> None:
        for _ in range(n):
            step()

    serve(turn)


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
    command = [sys.executable, "-m", MODULE, "--clips", str(clips), "--measure", title]
    environment = os.environ | EXACT_MALLOC
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    megabytes, trained = json.loads(done.stdout)
    return megabytes, trained


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=8, help="clips of 8 frames in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep-memory", action="store_true", help="no page is given back")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        time_steps(*json.loads(args.serve))
        return
    if args.measure:
        measure_peak(args.measure, args.clips)
        return
    print(f"{machine()}; {MODEL}, {args.clips} clips of 8 frames, {args.rounds} rounds\n")
    environment = KEEPING_MALLOC if args.keep_memory else {}
    seconds = time_variants(args.clips, args.rounds, environment)
    peaks = {title: peak(title, args.clips) for title in VARIANTS}
    print("| step | time over plain | extra peak memory over the trained parameters |")
    print("| --- | ---: | ---: |")
    for title in VARIANTS:
        extra = (peaks[title][0] - peaks["plain"][0]) / peaks["plain"][1]
        print(f"| {title} | {seconds[title] / seconds['plain']:.2f} | {extra:.2f} |")


if __name__ == "__main__":
    main()
