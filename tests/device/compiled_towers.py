"""Expanded over plain CLIP, both compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.temporal_attention import prepare
from tests.benchmarks.turns import milliseconds_in_turn, ratio
from tests.device.checks import Checks, Figure, Setup
from tests.device.towers import CLIPS, FRAMES, MODELS, name_of, rounds_of

CHECKS = Checks()
VARIANTS = ("plain", "expanded")


def compiled(setup: Setup, model: str, variant: str) -> tuple[Any, Any, Tensor]:
    """Return the function of a variant, the compiled one, and clips for both."""
    clips = 2 if setup.small else CLIPS
    function, video = prepare(name_of(setup, model), variant, FRAMES, setup.device, clips)
    backend = "eager" if setup.small else "inductor"
    return function, torch.compile(function, backend=backend), video


def compare(setup: Setup, model: str, variant: str) -> None:
    """Compare a compiled tower with the tower; leaves compiled code in the cache of the run."""
    torch._dynamo.reset()
    function, fast, video = compiled(setup, model, variant)
    with torch.no_grad():
        got, expected = fast(video).float(), function(video).float()
    error = float((got - expected).norm() / expected.norm())
    assert error < 0.05, f"the compiled tower differs by {error:.1%}"


@CHECKS.add(*MODELS, small=1)
def forward(setup: Setup, model: str) -> Iterator[Figure]:
    """The default mode of torch.compile, without gradients."""
    torch._dynamo.reset()
    passes = {}
    for variant in VARIANTS:
        _, fast, video = compiled(setup, model, variant)

        def one_pass(fast: Any = fast, video: Tensor = video) -> None:
            with torch.no_grad():
                fast(video)

        one_pass()  # compiles
        passes[variant] = one_pass
    times = milliseconds_in_turn(passes, rounds_of(setup, 15), setup.device)
    yield Figure("compiled", model, ratio(times, "expanded", "plain"))
