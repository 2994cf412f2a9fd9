"""Time variants in turn, each in its own process, or all in this one.

In one process, the state of the allocator that one variant leaves makes the next variant faster or
slower. Timing all rounds of one variant before the next would compare different states of the
machine. On a GPU the allocator keeps freed memory in any case, so one process is enough there.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch


def time_variants_in_turn(
    module: str, cases: Mapping[str, str], rounds: int, environment: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of each round of each variant, after one that does not count.

    Args:
        module: what to run with ``python -m``; given ``--serve`` and a case, it calls
            :func:`serve`.
        cases: the case of each variant.
        rounds: number of turns.
        environment: what the processes have beyond the environment of this one.
    """
    times: dict[str, list[float]] = {variant: [] for variant in cases}
    with ExitStack() as stack:
        processes = {}
        for variant, case in cases.items():
            started = subprocess.Popen(
                [sys.executable, "-m", module, "--serve", case],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | (environment or {}),
            )
            processes[variant] = stack.enter_context(started)
            _ask(started)  # warms up
        for _ in range(rounds):
            for variant, process in processes.items():
                times[variant].append(_ask(process))
    return times


def _ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return float(process.stdout.readline())


def serve(function: Callable[[], object]) -> None:
    """Time one call for each line of the standard input, until it ends."""
    for _ in sys.stdin:
        start = time.perf_counter()
        function()
        print(time.perf_counter() - start, flush=True)


def milliseconds_in_turn(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of each round of each variant, after one that does not count, in this process.

    On a GPU, the time between two events of its stream: arithmetic and the gaps between kernels.
    Every second round takes the variants in the opposite order.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            milliseconds = (
                _time_on_gpu(variants[name]) if device == "cuda" else _time(variants[name])
            )
            if number > 0:
                times[name].append(milliseconds)
    return times


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _time_on_gpu(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ratio(times: Mapping[str, list[float]], variant: str, over: str) -> float:
    """The median over the rounds of one variant's time over another's in the same round."""
    pairs = zip(times[variant], times[over], strict=True)
    return statistics.median(a / b for a, b in pairs)
