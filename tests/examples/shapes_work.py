"""What the workers of :mod:`examples.shapes.schedule` do in its tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def square(number: int, report: Callable[[float], None]) -> tuple[int, int]:
    """The square, and the number of threads; a huge number ends the process."""
    if number > 1000:
        os._exit(9)
    report(float(number))
    return number**2, torch.get_num_threads()
