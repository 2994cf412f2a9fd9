"""How much of the copies between CPU and device ``anchor_device="cpu"`` hides behind arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from openvclip import InterpolatedWeightRegularizer
from tests.benchmarks.turns import milliseconds_in_turn
from tests.device.checks import Checks, Figure, Setup
from tests.device.steps import IN_TRAINING, Autocast
from tests.device.towers import MODELS, rounds_of, that_fits

CHECKS = Checks()


@CHECKS.add(*MODELS, small=1)
def hidden(setup: Setup, model: str) -> Iterator[Figure]:
    """1 - (step with the original CLIP on the CPU - step with it on the device) / bare copies.

    In a step, the original CLIP goes to the device, and the weights go to the CPU and back.
    """
    found, note = that_fits(setup, IN_TRAINING[model], lambda clips: _hidden(setup, model, clips))
    notes = [note, f"copies take {found['share']:.0%} of a step"]
    yield Figure("hidden", model, found["hidden"], ", ".join(filter(None, notes)))


def _hidden(setup: Setup, model: str, clips: int) -> dict[str, float]:
    run = Autocast(clips, setup, model)
    steps: dict[str, Callable[[], Any]] = {}
    for name, where in (("device", None), ("cpu", "cpu")):
        iwr = InterpolatedWeightRegularizer(
            run.tower, run.optimizer, anchor=run.clip, anchor_device=where
        )
        steps[name] = lambda iwr=iwr: iwr.step(run.loss)
    times = milliseconds_in_turn(
        {**steps, "copies": _bare_copies(run, setup)}, rounds_of(setup, 9), setup.device
    )
    device, cpu, bare = (statistics.median(times[name]) for name in ("device", "cpu", "copies"))
    return {"hidden": 1 - (cpu - device) / bare, "share": bare / device}


def _bare_copies(run: Autocast, setup: Setup) -> Callable[[], None]:
    """Return a function that copies the weights to page-locked memory, back, and back again."""
    pinned = setup.device == "cuda"
    parameters = [p.detach() for p in run.tower.parameters()]
    there = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for p in parameters]
    spare = [torch.empty_like(p) for p in parameters]

    def copies() -> None:
        for source, target in zip(parameters, there, strict=True):
            target.copy_(source, non_blocking=True)
        for _ in range(2):
            for source, target in zip(there, spare, strict=True):
                target.copy_(source, non_blocking=True)

    return copies
