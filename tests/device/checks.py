"""What a check of a device is: a function of a :class:`Setup`, in a group of such functions.

This module imports no PyTorch, so that the program that starts the groups is quick.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORRECTNESS, RATIOS = "correctness", "ratios"


class Skip(Exception):  # noqa: N818 - no error
    """A check can't run on this machine; the text says why."""


@dataclass(frozen=True)
class Setup:
    """Where and how large the checks of a run are.

    Attributes:
        device: the device, ``"cuda"`` or ``"cpu"``.
        folder: a folder for files, shared by all groups of a run.
        small: use tiny models and few rounds.
    """

    device: str
    folder: Path
    small: bool = False


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        row: the row of the table, a key of ``targets.ROWS``.
        case: what was measured, for example the name of a model.
        value: the number.
        note: how it was measured, if a reader needs to know.
    """

    row: str
    case: str
    value: float
    note: str = ""


Function = Callable[..., "Iterable[Figure] | None"]


@dataclass(frozen=True)
class Check:
    """A named call of a function, which returns figures or None.

    Attributes:
        name: the name in the results.
        function: the function.
        arguments: its arguments after the :class:`Setup`.
        small: whether a small setup runs the check.
    """

    name: str
    function: Function
    arguments: tuple[Any, ...] = ()
    small: bool = True

    def __call__(self, setup: Setup) -> Iterator[Figure]:
        """Run the check; give its figures as soon as they are measured."""
        yield from self.function(setup, *self.arguments) or []


@dataclass
class Checks:
    """The checks of a module, in the order in which they were added."""

    all: list[Check] = field(default_factory=list)

    def add(self, *cases: Any, small: int = 1000) -> Callable[[Function], Function]:
        """Add a function, once for each case, which is its second argument.

        A small setup runs the first ``small`` cases.
        """

        def decorate(function: Function) -> Function:
            for number, case in enumerate(cases):
                name = f"{function.__name__}[{case}]"
                self.all.append(Check(name, function, (case,), small=number < small))
            if not cases:
                self.all.append(Check(function.__name__, function, small=small > 0))
            return function

        return decorate


@dataclass(frozen=True)
class Group:
    """Checks that run in one process.

    Attributes:
        name: the name for ``--only``.
        kind: ``"correctness"`` or ``"ratios"``. Groups of correctness run side by side, groups of
            ratios one after the other.
        seconds: the time limit on a device.
        about: one line for ``--list``.
        module: a module with ``CHECKS``. Default: the module of this folder with the group's name.
        check_seconds: the time limit of one check. A check that hangs then ends alone.
    """

    name: str
    kind: str
    seconds: float
    about: str
    module: str = ""
    check_seconds: float = math.inf

    def checks(self, *, small: bool = False) -> list[Check]:
        """Import the module and return its checks, or those of a small setup."""
        module = importlib.import_module(self.module or f"tests.device.{self.name}")
        checks: Checks = module.CHECKS
        return [check for check in checks.all if check.small or not small]


_A_CHECK = 45.0  # seconds; the import of a new process is a part of them
GROUPS = (
    Group(
        "golden",
        CORRECTNESS,
        110,
        "numbers of the released implementations",
        check_seconds=_A_CHECK,
    ),
    Group(
        "kernels",
        CORRECTNESS,
        110,
        "attention and its gradients beside float64 on the CPU",
        check_seconds=_A_CHECK,
    ),
    Group("core_golden", CORRECTNESS, 110, "core tests beside released and slow code, by pytest"),
    Group("core_towers", CORRECTNESS, 110, "core tests of towers and prompts, by pytest"),
    Group("core_weights", CORRECTNESS, 110, "core tests of weights and merges, by pytest"),
    Group(
        "training",
        CORRECTNESS,
        110,
        "optimizers, mixed precision, recomputing, repeated runs",
        check_seconds=_A_CHECK,
    ),
    Group(
        "processes",
        CORRECTNESS,
        110,
        "DistributedDataParallel and fully_shard, one process",
        check_seconds=_A_CHECK,
    ),
    Group("compiled", CORRECTNESS, 110, "the modes of torch.compile"),
    Group("compile_base", CORRECTNESS, 110, "ViT-B/16 under torch.compile"),
    Group("compile_large", CORRECTNESS, 110, "ViT-L/14 under torch.compile"),
    Group(
        "predictions",
        CORRECTNESS,
        110,
        "predictions, search and merges of files",
        check_seconds=_A_CHECK,
    ),
    Group("towers", RATIOS, 60, "expanded over plain CLIP: time and memory"),
    Group("compiled_towers", RATIOS, 75, "expanded over plain CLIP, compiled"),
    Group("steps", RATIOS, 75, "regularised steps, averages and sweeps"),
    Group("copies", RATIOS, 30, "copies of the original CLIP from the CPU"),
    Group("trainer", RATIOS, 40, "a training step of examples/finetune.py"),
    Group("loader", RATIOS, 45, "clips a second from a loader with 12 processes"),
)
"""All groups, in the order in which they run."""
