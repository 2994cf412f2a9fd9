"""The machine's name and the resident memory of a process (Linux), for all benchmarks."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Environment of a process whose memory is measured: glibc returns freed memory to the system.

Without it, the resident size includes freed memory that glibc keeps.
"""

KEEPING_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment of a process that keeps freed memory, as caching allocators do.

The times then measure arithmetic, without the allocation of new pages.
"""


def machine() -> str:
    """Processor, threads and versions, for the line above a table."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def resident_megabytes(field: str) -> float:
    """``VmRSS``, the resident size now, or ``VmHWM``, the largest one since the process began."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) / 1024 for x in status.splitlines() if x.startswith(field))


def forget_peak() -> None:
    """Let ``VmHWM`` begin anew; memory that was freed but kept is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
