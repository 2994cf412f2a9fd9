"""The work of the worker processes in the tests of :mod:`examples.shapes.schedule`."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def square(number: int, report: Callable[[float], None]) -> tuple[int, int]:
    """Return the square and the number of threads; a number above 1000 ends the process."""
    if number > 1000:
        os._exit(9)
    report(float(number))
    return number**2, torch.get_num_threads()
