"""Regularised steps, averages and sweeps beside plain steps and evaluation passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from openvclip import (
    EMATracker,
    SWATracker,
    encode_video,
    expand_temporal_attention,
    interpolate_into,
)
from tests.benchmarks.machine import peak_bytes
from tests.benchmarks.models import created, noise_for
from tests.benchmarks.regularization_step import VARIANTS, Training
from tests.benchmarks.turns import milliseconds_in_turn, ratio
from tests.device.checks import Checks, Figure, Setup
from tests.device.towers import CLIPS, FRAMES, MODELS, name_of, rounds_of, that_fits

CHECKS = Checks()
IN_TRAINING = {"ViT-B/16": CLIPS, "ViT-L/14": CLIPS // 2}  # clips; gradients need more memory
EVALUATED = 8  # batches of an evaluation pass


FIGURES = {
    "iwr": ("IWR", "two passes"),
    "every": ("IWR, every=4", "plain"),
    "share": ("IWR, share=0.25", "plain"),
}
"""Rows of the table: a variant of ``regularization_step`` over another."""


class Autocast(Training):
    """Training with weights in float32 and arithmetic in bfloat16, as the trainer does."""

    def __init__(self, clips: int, setup: Setup, model: str) -> None:
        super().__init__(clips, name_of(setup, model), setup.device)
        self.setup = setup

    def loss(self, *batch: Tensor) -> Tensor:
        """The loss under autocast."""
        with torch.autocast(self.setup.device, torch.bfloat16, enabled=not self.setup.small):
            return super().loss(*batch).float()


def turns(run: Training) -> dict[str, Callable[[], None]]:
    """Return one turn of each variant of a step. All variants train the same model."""

    def turn(step: Callable[[], Any], n: int) -> Callable[[], None]:
        def several() -> None:
            for _ in range(n):
                step()

        return several

    names = {name for pair in FIGURES.values() for name in pair}
    return {title: turn(make(run), n) for title, (make, n) in VARIANTS.items() if title in names}


@CHECKS.add(*MODELS, small=1)
def regularised_steps(setup: Setup, model: str) -> Iterator[Figure]:
    """Time and memory of a step, and the time of an update of both averages."""
    found, note = that_fits(setup, IN_TRAINING[model], lambda clips: _steps(setup, model, clips))
    for row, value in found.items():
        yield Figure(row, model, value, note if row != "averages" else "")


def _steps(setup: Setup, model: str, clips: int) -> dict[str, float]:
    run = Autocast(clips, setup, model)
    steps = turns(run)
    swa, ema = SWATracker(run.tower), EMATracker(run.tower, decay=0.999)

    def update() -> None:
        swa.update(run.tower)
        ema.update(run.tower)

    times = milliseconds_in_turn({**steps, "averages": update}, rounds_of(setup, 5), setup.device)
    for title, (_, n) in VARIANTS.items():
        if title in times:
            times[title] = [value / n for value in times[title]]
    found = {row: ratio(times, *pair) for row, pair in FIGURES.items()}
    found["averages"] = ratio(times, "averages", "plain")
    found["step_rate"] = 1000 * clips / sorted(times["IWR"])[len(times["IWR"]) // 2]
    run.optimizer.zero_grad(set_to_none=True)
    peaks = {}
    for title in ("plain", "IWR"):
        peaks[title] = peak_bytes(steps[title], setup.device)
        run.optimizer.zero_grad(set_to_none=True)
    trained = sum(p.nbytes for p in run.tower.parameters())
    found["iwr_memory"] = (peaks["IWR"] - peaks["plain"]) / trained
    return found


@CHECKS.add(*MODELS, small=1)
def sweep(setup: Setup, model: str) -> Iterator[Figure]:
    """A λ of a sweep: set the weights and encode some batches, over encoding alone."""
    clip = expand_temporal_attention(created(name_of(setup, model), setup.device)).eval()
    original = {name: value.clone() for name, value in clip.state_dict().items()}
    tuned = {
        name: value + 0.01 if value.is_floating_point() else value.clone()
        for name, value in original.items()
    }
    clips = 2 if setup.small else CLIPS
    video = noise_for(clip, clips, FRAMES, setup.device)
    batches = 1 if setup.small else EVALUATED

    def evaluate() -> None:
        autocast = torch.autocast(setup.device, torch.bfloat16, enabled=not setup.small)
        with torch.no_grad(), autocast:
            for _ in range(batches):
                encode_video(clip, video)

    def one_lambda() -> None:
        interpolate_into(clip, original, tuned, 0.3)
        evaluate()

    variants = {"λ": one_lambda, "evaluation": evaluate}
    times = milliseconds_in_turn(variants, rounds_of(setup, 3), setup.device)
    yield Figure("sweep", model, ratio(times, "λ", "evaluation"), f"{clips * batches} clips")
