"""Time and error of the weight-space functions, as ratios to PyTorch's own.

    python -m tests.benchmarks.weight_space

``SWATracker.update`` beside ``AveragedModel.update_parameters`` with its foreach average (and with
its default, which on a CPU takes each parameter by itself), and
``interpolate`` beside bare ``torch.lerp`` calls on tensors that are there already. All variants of
a row run in turn within one process, round after round; times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import open_clip
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

from openvclip import EMATracker, SWATracker, interpolate, interpolate_into
from openvclip.weights.numerics import finite_probe, foreach
from tests.benchmarks.machine import machine
from tests.benchmarks.turns import milliseconds_in_turn

PIECE = 2**18
"""Values of a piece of both tensors, which fits the cache of a core."""


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each variant, after one round that does not count."""
    times = milliseconds_in_turn(variants, rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def print_rows(title: str, rows: dict[str, float], over: str, notes: dict[str, str]) -> None:
    """A table of times, of their ratios to the variant ``over`` and of a note on each."""
    print(f"\n| {title} | ms | ratio | |\n| --- | ---: | ---: | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value:.1f} | {value / rows[over]:.2f} | {notes.get(name, '')} |")


def averages(name: str, dtype: torch.dtype, rounds: int) -> None:
    """Updates of both averages with the same weights, and how far each is from the exact mean."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).to(dtype)
    swa, unchecked = SWATracker(model), SWATracker(model, check_finite=False)
    ema = EMATracker(model)
    live = [parameter.detach() for parameter in model.parameters()]
    sums = [value.to(torch.float32, copy=True) for value in live]

    pieces = [
        pair
        for total, value in zip(sums, live, strict=True)
        for pair in zip(total.view(-1).split(PIECE), value.view(-1).split(PIECE), strict=True)
    ]

    def look() -> None:
        for value in live:
            finite_probe(value)

    def bare() -> None:
        look()
        foreach._foreach_add_(sums, live)

    def in_pieces() -> None:
        for total, value in pieces:
            finite_probe(value).item()
            total.add_(value)

    peer = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    default = AveragedModel(model)
    variants: dict[str, Callable[[], object]] = {
        "AveragedModel, default": lambda: default.update_parameters(model),
        "AveragedModel": lambda: peer.update_parameters(model),
        "SWATracker": lambda: swa.update(model),
        "SWATracker, check_finite=False": lambda: unchecked.update(model),
        "EMATracker": lambda: ema.update(model),
        "foreach add alone": lambda: foreach._foreach_add_(sums, live),
        "a look alone": look,
        "foreach add and a look": bare,
        "add and look, in pieces": in_pieces,
    }
    times = medians(variants, rounds)
    notes = {name: f"error {e:.1e}" for name, e in errors(dtype).items()}
    print_rows(f"{name}, {str(dtype).removeprefix('torch.')}", times, "AveragedModel", notes)


def errors(dtype: torch.dtype, updates: int = 100) -> dict[str, float]:
    """The largest error of each average of one layer's weights, which all move at every step."""
    model = nn.Linear(512, 512, bias=False).to(dtype)
    start = model.weight.detach().float().clone()
    swa, peer = SWATracker(model), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    total = torch.zeros(512, 512, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        noise = 0.01 * torch.randn(512, 512, generator=generator)
        model.weight.data.copy_(start + noise)
        total += model.weight.detach().double()
        swa.update(model)
        peer.update_parameters(model)
    results = {
        "AveragedModel": next(iter(peer.module.parameters())).detach(),
        "SWATracker": swa.averaged_state_dict()["weight"],
    }
    return {
        name: float((value.double() - total / updates).abs().max())
        for name, value in results.items()
    }


def interpolations(name: str, dtype: torch.dtype, rounds: int) -> None:
    """interpolate and interpolate_into beside torch.lerp on the same tensors."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).to(dtype)
    a = {n: v.clone() for n, v in model.state_dict().items()}
    b = {n: v + 0.01 for n, v in a.items()}
    ready = {n: torch.empty_like(v) for n, v in b.items()}
    result = interpolate(a, b, 0.3)

    def bare() -> None:
        for n, out in ready.items():
            torch.lerp(b[n], a[n], 0.3, out=out)

    variants: dict[str, Callable[[], object]] = {
        "torch.lerp": bare,
        "interpolate": lambda: interpolate(a, b, 0.3),
        "interpolate, out=": lambda: interpolate(a, b, 0.3, out=result),
        "interpolate_into": lambda: interpolate_into(model, a, b, 0.3),
    }
    times = medians(variants, rounds)
    notes = {n: f"allocates {allocated(f) / 2**20:.2f} MiB" for n, f in variants.items()}
    print_rows(f"{name}, {str(dtype).removeprefix('torch.')}", times, "torch.lerp", notes)


def allocated(function: Callable[[], object]) -> int:
    """Bytes of all allocations during one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = function()
    del kept
    return sum(max(0, event.self_cpu_memory_usage) for event in prof.events() or [])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["averages", "interpolations"])
    args = parser.parse_args()
    print(machine())
    for dtype in (torch.float32, torch.bfloat16):
        if args.only != "interpolations":
            averages(args.model, dtype, args.rounds)
        if args.only != "averages":
            interpolations(args.model, dtype, args.rounds)


if __name__ == "__main__":
    main()
