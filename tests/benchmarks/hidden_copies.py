"""Measure on a GPU how much of the copies to the GPU is hidden behind arithmetic.

    python -m tests.benchmarks.hidden_copies
    python -m tests.benchmarks.hidden_copies --model ViT-L-14-quickgelu --clips 32

The regulariser keeps its anchor on the CPU (``anchor_device="cpu"``). A profile of some steps gives
the times of all copies from the CPU to the GPU and of all kernels. A moment of a copy is hidden if
a kernel runs at the same moment. The same steps are also timed with the anchor on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor

import openvclip

Interval = tuple[float, float]


def hidden_share(copies: Sequence[Interval], kernels: Sequence[Interval]) -> float:
    """Return the share of the time of the copies in which a kernel runs.

    Args:
        copies: start and end of each copy.
        kernels: start and end of each kernel.
    """
    busy: list[list[float]] = []
    for start, end in sorted(kernels):
        if busy and start <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([start, end])
    total = sum(end - start for start, end in copies)
    hidden = sum(
        max(0.0, min(end, later) - max(start, earlier))
        for start, end in copies
        for earlier, later in busy
        if earlier < end and later > start
    )
    return hidden / total if total else 1.0


def intervals(profile: Any) -> tuple[list[Interval], list[Interval]]:
    """Return the copies from the CPU to the GPU and the kernels of a profile.

    Args:
        profile: a ``torch.profiler.profile`` with the activity of a GPU.
    """
    copies: list[Interval] = []
    kernels: list[Interval] = []
    for event in profile.events():
        # A name that PyTorch gives to a span, such as Optimizer.step, is no kernel.
        if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
            continue
        times = (event.time_range.start, event.time_range.end)
        if event.name.startswith("Memcpy HtoD"):
            copies.append(times)
        elif not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(times)
    return copies, kernels


class Training:
    """Steps of a regularised image tower on a GPU, in bfloat16.

    Args:
        model: name of a model of open_clip.
        clips: clips of 8 frames in a batch.
        anchor_device: see ``InterpolatedWeightRegularizer``.
    """

    def __init__(self, model: str, clips: int, anchor_device: str | None) -> None:
        torch.manual_seed(0)
        tower = openvclip.expand_temporal_attention(open_clip.create_model(model).visual).cuda()
        self.tower: Any = tower
        self.video = torch.randn(clips, 8, 3, 224, 224, device="cuda")
        optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-6, fused=True)
        self.iwr = openvclip.InterpolatedWeightRegularizer(
            tower, optimizer, anchor_device=anchor_device
        )

    def loss(self) -> Tensor:
        """A scalar of the features of all frames."""
        with torch.autocast("cuda", torch.bfloat16):
            features: Tensor = self.tower(self.video)
        return features.float().square().mean()

    def seconds(self, steps: int) -> float:
        """Return the median time of a step."""
        times = []
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.iwr.step(self.loss)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def measure(model: str, clips: int, steps: int = 5) -> dict[str, float]:
    """Return the hidden share, the ratio of the times of a step, and the ratio of the peaks.

    Args:
        model: name of a model of open_clip.
        clips: clips of 8 frames in a batch.
        steps: number of steps that are timed and profiled, after three others.
    """
    found: dict[str, Any] = {}
    for anchor_device in (None, "cpu"):
        run = Training(model, clips, anchor_device)
        run.seconds(3)
        torch.cuda.reset_peak_memory_stats()
        seconds = run.seconds(steps)
        found[str(anchor_device)] = (seconds, torch.cuda.max_memory_allocated())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):  # without a wait between two steps, as in training
            run.iwr.step(run.loss)
        torch.cuda.synchronize()
    (time_gpu, peak_gpu), (time_cpu, peak_cpu) = found["None"], found["cpu"]
    return {
        "copies hidden": hidden_share(*intervals(profile)),
        "time over an anchor on the GPU": time_cpu / time_gpu,
        "peak memory over an anchor on the GPU": peak_cpu / peak_gpu,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--clips", type=int, default=32, help="clips of 8 frames in a batch")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed")
    print(f"{torch.cuda.get_device_name()}; {args.model}, {args.clips} clips of 8 frames\n")
    for name, value in measure(args.model, args.clips).items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
