"""Time the attention kernels on views of keys and values against attention on copies.

    python -m tests.benchmarks.attention_kernels            # on a GPU if there is one
    python -m tests.benchmarks.attention_kernels --clips 1  # all inner frames in one call

The candidates run in turn for a number of rounds. The table has the median of each candidate, in
milliseconds, and the peak memory of a forward and backward pass. The measurement decides the order
of the kernels in :func:`openvclip.towers.attention_kernels.choose_kernel`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openvclip.towers.attention import attend_with_copies
from openvclip.towers.attention_cpu import attend_frame_by_frame
from openvclip.towers.attention_cuda import attend_on_views
from openvclip.towers.attention_kernels import KERNELS, capability_of, choose_kernel
from openvclip.towers.view import FrameView

# Frames, tokens, heads, and the width of a head.
MODELS = {
    "ViT-B/16": (8, 197, 12, 64),
    "ViT-L/14": (8, 257, 16, 64),
    "SigLIP at 384": (8, 729, 16, 72),
}


def candidates(device: str, dtype: torch.dtype, view: FrameView) -> dict[str, Callable[..., Any]]:
    """Return the ways to compute the attention that this device has, beside that of plain CLIP."""
    found: dict[str, Callable[..., Any]] = {
        "plain": _plain,
        "copies": partial(attend_with_copies, view=view),
    }
    if device == "cpu":
        return found | {"views, cpu": partial(attend_frame_by_frame, view=view, scale=None)}
    for name in KERNELS:
        supported = choose_kernel(
            dtype=dtype,
            head_dim=64,
            capability=capability_of(torch.cuda.current_device()),
            flash=name == "flash",
            efficient=name == "efficient",
        )
        if supported:
            options: Any = {"view": view, "scale": None, "kernel": name}
            found[f"views, {name}"] = partial(attend_on_views, **options)
    return found


def measure(
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    *,
    window: int = 1,
    boundary: Any = "zero",
    rounds: int = 10,
) -> dict[str, dict[str, float]]:
    """Time all candidates in turn.

    Args:
        shape: numbers of clips, frames, tokens and heads, and the width of a head.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: dtype of queries, keys and values.
        window: number of frames in view on either side.
        boundary: how frames outside the clip are treated.
        rounds: number of timed calls of each candidate.

    Returns:
        For each candidate the median milliseconds ``"forward"`` and ``"forward + backward"``, and
        on a GPU ``"MiB"``, the peak memory of a forward and backward pass beside its input.
    """
    clips, frames, tokens, heads, d = shape
    packed = torch.randn(clips, frames, tokens, 3, heads, d, device=device, dtype=dtype)
    ways = candidates(device, dtype, FrameView(window, boundary))
    results: dict[str, dict[str, float]] = {name: {} for name in ways}
    for title, backward in (("forward", False), ("forward + backward", True)):
        calls = {name: partial(_call, way, packed, backward) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for function in calls.values():
            function()  # kernels are loaded, and memory is reserved
        for _ in range(rounds):
            for name, function in calls.items():
                times[name].append(_milliseconds(function, device))
        for name, values in times.items():
            results[name][title] = statistics.median(values)
    if device == "cuda":
        for name, way in ways.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _call(way, packed, backward=True)
            results[name]["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return results


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each frame alone, as in the original CLIP."""
    return functional.scaled_dot_product_attention(
        *(x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    )


def _call(way: Callable[..., Tensor], packed: Tensor, backward: bool) -> None:
    if backward:
        leaf = packed.detach().requires_grad_()
        out = way(*leaf.unbind(3))
        out.backward(torch.ones_like(out))
    else:
        with torch.no_grad():
            way(*packed.unbind(3))


def _milliseconds(function: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--boundary", default="zero", choices=("zero", "mask", "replicate"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    for model in args.models:
        shape = (args.clips, *MODELS[model])
        options: Any = {"window": args.window, "boundary": args.boundary, "rounds": args.rounds}
        rows = measure(shape, args.device, dtype, **options)
        columns = list(rows["plain"])
        print(f"\n{model}, {args.clips} clips, {args.dtype}, {args.boundary}, {args.device}\n")
        print("| attention of one layer | " + " | ".join(columns) + " |")
        print("| --- " + "| ---: " * len(columns) + "|")
        for name, values in rows.items():
            print(f"| {name} | " + " | ".join(f"{values[c]:.2f}" for c in columns) + " |")


if __name__ == "__main__":
    main()
