"""A training step of examples/finetune.py over a bare loop."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.trainer_overhead import over_bare_loop
from tests.device.checks import Checks, Figure, Setup
from tests.device.towers import MODELS, name_of, that_fits

CHECKS = Checks()


@CHECKS.add("ViT-B/16")
def steps_over_bare_loop(setup: Setup, model: str) -> Iterator[Figure]:
    """Both do regularised steps in bfloat16 on clips that are on the device."""
    steps, rounds = (2, 1) if setup.small else (12, 3)
    name = name_of(setup, model)
    assert model in MODELS
    value, note = that_fits(
        setup, 32, lambda clips: over_bare_loop(name, clips, steps, rounds, setup.device)
    )
    yield Figure("trainer", model, value, note)
