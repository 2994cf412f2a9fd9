"""Expanded over plain CLIP: time and memory, and the attention with and without copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from openvclip.towers import attention
from openvclip.towers.view import FrameView
from tests.benchmarks.machine import peak_bytes
from tests.benchmarks.models import TINY
from tests.benchmarks.temporal_attention import call, prepare
from tests.benchmarks.turns import milliseconds_in_turn, ratio
from tests.device.checks import Checks, Figure, Setup, Skip

CHECKS = Checks()
MODELS = {"ViT-B/16": "ViT-B-16", "ViT-L/14": "ViT-L-14"}
FRAMES, CLIPS = 8, 32
Result = TypeVar("Result")


def name_of(setup: Setup, model: str) -> str:
    """Return the name of a model for open_clip, or of a tiny model."""
    return TINY if setup.small else MODELS[model]


def rounds_of(setup: Setup, rounds: int) -> int:
    """Return the number of rounds."""
    return 1 if setup.small else rounds


def that_fits(setup: Setup, clips: int, measure: Callable[[int], Result]) -> tuple[Result, str]:
    """Measure with half of the clips if the memory is too small.

    Returns:
        The result, and a note if there are fewer clips than asked for.
    """
    asked = clips = 2 if setup.small else clips
    while True:
        try:
            result = measure(clips)
        except torch.OutOfMemoryError:
            if clips == 1:
                raise
        else:
            return result, "" if clips == asked else f"{clips} clips"
        clips //= 2
        torch.cuda.empty_cache()


@CHECKS.add(*MODELS, small=1)
def time_and_memory(setup: Setup, model: str) -> Iterator[Figure]:
    """Towers in bfloat16, 32 clips of 8 frames."""
    name = name_of(setup, model)
    value, note = that_fits(setup, CLIPS, lambda clips: _times(setup, name, clips, False, 15))
    yield Figure("forward", model, value, note)
    value, note = that_fits(setup, CLIPS, lambda clips: _times(setup, name, clips, True, 9))
    yield Figure("backward", model, value, note)
    value, note = that_fits(setup, CLIPS, lambda clips: _memory(setup, name, clips))
    yield Figure("memory", model, value, note)
    value, _ = that_fits(setup, 1, lambda clips: _times(setup, name, clips, False, 15))
    yield Figure("one_clip", model, value)


def _passes(setup: Setup, name: str, clips: int, backward: bool) -> dict[str, Callable[[], None]]:
    """Return a pass of the plain and of the expanded tower."""
    made = {v: prepare(name, v, FRAMES, setup.device, clips) for v in ("plain", "expanded")}

    def one_pass(function: Any, video: Tensor) -> Callable[[], None]:
        return lambda: call(function, video, backward)

    return {variant: one_pass(*parts) for variant, parts in made.items()}


def _times(setup: Setup, name: str, clips: int, backward: bool, rounds: int) -> float:
    passes = _passes(setup, name, clips, backward)
    times = milliseconds_in_turn(passes, rounds_of(setup, rounds), setup.device)
    return ratio(times, "expanded", "plain")


def _memory(setup: Setup, name: str, clips: int) -> float:
    peaks = {}
    for variant, one_pass in _passes(setup, name, clips, backward=True).items():
        one_pass()  # allocates the gradients and the buffers of the kernels
        peaks[variant] = max(1, peak_bytes(one_pass, setup.device))
    return peaks["expanded"] / peaks["plain"]


HEADS = {"ViT-B/16": (197, 12), "ViT-L/14": (257, 16)}


@CHECKS.add(*MODELS, small=1)
def views_over_copies(setup: Setup, model: str) -> Iterator[Figure]:
    """One attention in bfloat16: on views of keys and values, and on copies of them."""
    copies = getattr(attention, "attend_with_copies", None)
    if copies is None:
        raise Skip("this version has one implementation")
    tokens, heads = (5, 2) if setup.small else HEADS[model]
    dtype = torch.float32 if setup.small else torch.bfloat16
    clips = 2 if setup.small else CLIPS
    for boundary in ("zero",) if setup.small else ("zero", "mask", "replicate"):
        view = FrameView(1, boundary)  # type: ignore[arg-type]
        shape = (clips, FRAMES, tokens, heads, 64)
        q, k, v = (torch.randn(shape, device=setup.device, dtype=dtype, requires_grad=True)
                   for _ in range(3))  # fmt: skip

        def one_pass(function: Callable[..., Tensor], *parts: Any) -> Callable[[], None]:
            return lambda: function(*parts).square().mean().backward()

        variants = {
            "views": one_pass(attention.temporal_attention, q, k, v, view),
            "copies": one_pass(copies, q, k, v, view),
        }
        times = milliseconds_in_turn(variants, rounds_of(setup, 15), setup.device)
        peaks = {n: max(1, peak_bytes(f, setup.device)) for n, f in variants.items()}
        case = f"{model}, {boundary}"
        yield Figure("views_time", case, ratio(times, "views", "copies"))
        yield Figure("views_memory", case, peaks["views"] / peaks["copies"])
