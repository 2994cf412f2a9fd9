"""Time variants in turn, each in its own process.

In one process, the state of the allocator that one variant leaves makes the next variant faster or
slower. Timing all rounds of one variant before the next would compare different states of the
machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack


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
