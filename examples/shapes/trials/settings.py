"""The sizes of the comparison."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "SMOKE", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The size of a comparison.

    Attributes:
        train: number of training clips of a cell.
        test: number of clips of each question.
        development: number of clips of each question in the cell for tuning.
        stills: number of held-out stills.
        steps: number of optimizer steps of a run.
        batch_size: number of clips of a step.
        cells: number of cells.
    """

    train: int = 512
    test: int = 2048
    development: int = 512
    stills: int = 1024
    steps: int = 200
    batch_size: int = 16
    cells: int = 24


FULL = Sizes()
QUICK = Sizes(test=1024, cells=1)
SMOKE = Sizes(train=48, test=24, development=24, stills=16, steps=3, batch_size=4, cells=2)
