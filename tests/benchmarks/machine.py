"""The machine's name and the resident memory of a process (Linux), for all benchmarks."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    return f"{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


LIBRARIES = ("open_clip_torch", "timm", "transformers", "peft", "triton", "numpy", "av")


def facts(device: str) -> dict[str, Any]:
    """Return the machine and the versions, for a file of results. Never initialises the device."""
    card, driver = _card_and_driver() if device == "cuda" else ("", "")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "card": card,
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _card_and_driver() -> tuple[str, str]:
    if shutil.which("nvidia-smi") is None:
        return "GPU", "unknown"
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name, _, driver = done.stdout.partition("\n")[0].partition(", ")
    return name or "GPU", driver or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def resident_megabytes(field: str) -> float:
    """``VmRSS``, the resident size now, or ``VmHWM``, the largest one since the process began."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) / 1024 for x in status.splitlines() if x.startswith(field))


def forget_peak() -> None:
    """Let ``VmHWM`` begin anew; memory that was freed but kept is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Largest memory during a call, minus the memory before: of the GPU, or resident memory."""
    if device == "cuda":
        gc.collect()  # earlier models, which would lower the peak if they were freed meanwhile
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    megabytes = resident_megabytes("VmRSS")
    function()
    return round(2**20 * (resident_megabytes("VmHWM") - megabytes))
