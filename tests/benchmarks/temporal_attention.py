"""Measure time and memory of the expanded attention, as ratios to plain frame-by-frame CLIP.

    python -m tests.benchmarks.temporal_attention  # all tables of docs/benchmarks.md
    python -m tests.benchmarks.temporal_attention --only main --models ViT-B-32-quickgelu

Each variant runs in its own process, because the state of the memory allocator that one variant
leaves changes the speed of the next. The variants are timed in turn for a number of rounds. Their
median times are divided by the median time of plain CLIP. ``--keep-memory`` uses an allocator that
keeps freed memory: the default allocator returns large tensors to the system, so that a large part
of each pass is spent on new pages. Memory is the largest resident size during one call, minus the
resident size before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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

MODULE = "tests.benchmarks.temporal_attention"
MODELS = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu")


class ConcatenatedAttention(nn.Module):
    """The direct way to write Equation 3, as a peer: shift, concatenate, softmax, multiply."""

    def __init__(self, attention: nn.MultiheadAttention, frames: int) -> None:
        super().__init__()
        self.inner, self.frames = attention, frames

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Tokens ``[B * T, N, D]``; zero keys and values outside the clip."""
        inner, heads = self.inner, self.inner.num_heads
        qkv = functional.linear(x, inner.in_proj_weight, inner.in_proj_bias)
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2).unflatten(0, (-1, self.frames))
            for part in qkv.chunk(3, dim=-1)
        )
        k, v = (self._with_neighbours(part) for part in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        y = (scores.softmax(dim=-1) @ v).flatten(0, 1).transpose(1, 2).flatten(2)
        return functional.linear(y, inner.out_proj.weight, inner.out_proj.bias), None

    @staticmethod
    def _with_neighbours(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x[:, :1])
        before, after = torch.cat([zero, x[:, :-1]], 1), torch.cat([x[:, 1:], zero], 1)
        return torch.cat([before, x, after], dim=3)


def plain(tower: nn.Module, frames: int) -> Callable[[Tensor], Tensor]:
    """CLIP on each frame alone."""
    return lambda video: tower(video.flatten(0, 1))


def expanded(**settings: Any) -> Callable[[nn.Module, int], Callable[[Tensor], Tensor]]:
    """The tower after ``expand_temporal_attention``."""

    def make(tower: nn.Module, frames: int) -> Callable[[Tensor], Tensor]:
        return openvclip.expand_temporal_attention(tower, **settings)

    return make


def concatenated(tower: Any, frames: int) -> Callable[[Tensor], Tensor]:
    """The tower with its attentions replaced by the direct one."""
    for block in tower.transformer.resblocks:
        block.attn = ConcatenatedAttention(block.attn, frames)
    return plain(tower, frames)


VARIANTS: dict[str, Callable[[nn.Module, int], Callable[[Tensor], Tensor]]] = {
    "plain": plain,
    "expanded": expanded(),
    "direct": concatenated,
    "mask": expanded(boundary="mask"),
    "replicate": expanded(boundary="replicate"),
    "window 2": expanded(window=2),
    "window 3": expanded(window=3),
}


def prepare(name: str, variant: str, frames: int, device: str, clips: int) -> tuple[Any, Tensor]:
    """A function from video to features, and a video, in the dtype of the device."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tower = created(name, device).visual.to(dtype)
    video = noise_for(tower, clips, frames, device).to(dtype)
    return VARIANTS[variant](tower, frames), video


def call(function: Any, video: Tensor, backward: bool) -> None:
    """One forward pass, or one forward and backward pass."""
    if backward:
        function(video).square().mean().backward()
    else:
        with torch.no_grad():
            function(video)
    if video.is_cuda:
        torch.cuda.synchronize()


def time_variants(
    name: str, variants: tuple[str, ...], frames: int, backward: bool, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each round of each variant, the variants in turn."""
    cases = {v: json.dumps([name, v, frames, backward, args.device, args.clips]) for v in variants}
    return time_variants_in_turn(
        MODULE, cases, args.rounds, KEEPING_MALLOC if args.keep_memory else None
    )


def time_calls(
    name: str, variant: str, frames: int, backward: bool, device: str, clips: int
) -> None:
    """One process of :func:`time_variants`."""
    function, video = prepare(name, variant, frames, device, clips)
    serve(lambda: call(function, video, backward))


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Median over median of the first variant."""
    base = statistics.median(next(iter(times.values())))
    return {variant: statistics.median(values) / base for variant, values in times.items()}


def peak_megabytes(name: str, variant: str, frames: int, backward: bool, clips: int) -> float:
    """Growth of the largest resident size during one call, in a process of its own."""
    case = json.dumps([name, variant, frames, backward, clips])
    command = [sys.executable, "-m", MODULE, "--measure", case]
    environment = os.environ | EXACT_MALLOC
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def measure(name: str, variant: str, frames: int, backward: bool, clips: int) -> None:
    """Print what :func:`peak_megabytes` reads."""
    function, video = prepare(name, variant, frames, "cpu", clips)
    call(function, video[:1], backward)  # kernels and their buffers
    forget_peak()
    before = resident_megabytes("VmRSS")
    call(function, video, backward)
    print(resident_megabytes("VmHWM") - before)


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table: a row for each case, a column for each variant."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n\n| case | " + " | ".join(columns) + " |")
    print("| --- " + "| ---: " * len(columns) + "|")
    for case, values in rows.items():
        print(f"| {case} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("main", "memory", "settings", "frames"))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-memory", action="store_true", help="no page is given back")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        time_calls(*json.loads(args.serve))
        return
    if args.measure:
        measure(*json.loads(args.measure))
        return
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{machine()}, on {device}; {args.clips} clips, median of {args.rounds} rounds")
    passes = {"forward": False, "forward + backward": True}
    for name in args.models:
        if args.only in (None, "main"):
            variants = ("plain", "expanded", "direct")
            rows = {p: ratios(time_variants(name, variants, 8, b, args)) for p, b in passes.items()}
            table(f"{name}, 8 frames: time over plain", rows)
        if args.only in (None, "memory"):
            rows = {}
            for title, backward in passes.items():
                found = {
                    v: peak_megabytes(name, v, 8, backward, args.clips)
                    for v in ("plain", "expanded", "direct")
                }
                rows[title] = {v: value / found["plain"] for v, value in found.items()}
            table(f"{name}, 8 frames: peak memory of a call over plain", rows)
        if args.only in (None, "settings"):
            variants = ("plain", "expanded", "mask", "replicate", "window 2", "window 3")
            rows = {p: ratios(time_variants(name, variants, 8, b, args)) for p, b in passes.items()}
            table(f"{name}, 8 frames: boundary modes and windows, time over plain", rows)
        if args.only in (None, "frames"):
            base: dict[str, float] = {}
            rows = {}
            for frames in (8, 16, 32):
                row = {}
                for title, backward in passes.items():
                    times = time_variants(name, ("expanded",), frames, backward, args)
                    seconds = statistics.median(times["expanded"]) / frames
                    row[title] = seconds / base.setdefault(title, seconds)
                rows[f"T = {frames}"] = row
            table(f"{name}: time per frame of the expanded tower over that at T = 8", rows)


if __name__ == "__main__":
    main()
