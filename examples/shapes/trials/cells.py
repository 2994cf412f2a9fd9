"""The cells of the comparison: which classes are trained, and which classes each question asks for.

A cell is a division of the actions together with a seed. All methods are compared on the same
cells, so their differences are paired.

The eight actions have three roles. Two actions, :data:`DEVELOPMENT_ACTIONS`, are used only to
choose settings. Of the other six actions, a cell trains three and asks for the other three. There
are 20 such divisions (:data:`DIVISIONS`). Cells 0 to 19 have one division each, cells 20 to 39 have
the same divisions with other seeds. Each even cell trains the actions that the next cell asks for.
So after an even number of cells every action was trained in half of them.

A cell asks three questions, each with its own list of clips. The classifier of a question knows the
24 class names of this question and no other names:

- ``trained``: new clips of the trained shapes with the trained actions;
- ``shapes``: the eight unseen shapes with the trained actions;
- ``actions``: the eight unseen shapes with the three actions that were not trained. As in
  Kinetics-600, all classes are new.

The cell :data:`TUNING` replaces the unseen shapes by the development shapes, and the actions that
were not trained by the development actions. All settings are chosen on its lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np

from examples.shapes.world import ACTIONS, DEVELOPMENT, SEEN, UNSEEN

__all__ = [
    "DEVELOPMENT_ACTIONS",
    "DIVISIONS",
    "QUESTIONS",
    "REPORTED_ACTIONS",
    "TUNING",
    "Cell",
    "ListName",
    "Question",
    "cell",
]

Question = Literal["trained", "shapes", "actions"]
QUESTIONS: tuple[Question, ...] = get_args(Question)

ListName = Literal["train", "trained", "shapes", "actions"]

#: The actions on which settings are chosen. No cell trains them, and no result asks for them.
DEVELOPMENT_ACTIONS: tuple[str, ...] = ("blinking", "climbing")

#: The actions that the cells divide into trained actions and actions to ask for.
REPORTED_ACTIONS: tuple[str, ...] = tuple(a for a in ACTIONS if a not in DEVELOPMENT_ACTIONS)


def _divisions() -> tuple[tuple[str, ...], ...]:
    """Return all choices of three trained actions; each choice is followed by its complement."""
    halves = [half for half in combinations(REPORTED_ACTIONS, 3) if REPORTED_ACTIONS[0] in half]
    order = np.random.default_rng(2026).permutation(len(halves))
    divisions = []
    for place in order:
        half = halves[int(place)]
        divisions += [half, tuple(a for a in REPORTED_ACTIONS if a not in half)]
    return tuple(divisions)


#: The trained actions of each division. The 20 divisions are all choices of three actions of six.
DIVISIONS: tuple[tuple[str, ...], ...] = _divisions()


@dataclass(frozen=True)
class Cell:
    """A division of the actions and a seed.

    Attributes:
        number: the number of the cell.
        trained_actions: the actions in the training clips.
        new_actions: the actions of the question ``"actions"``.
        new_shapes: the shapes of the questions ``"shapes"`` and ``"actions"``.
    """

    number: int
    trained_actions: tuple[str, ...]
    new_actions: tuple[str, ...]
    new_shapes: tuple[str, ...] = UNSEEN

    @property
    def name(self) -> str:
        """The name of the cell in files and messages."""
        return "tuning" if self.number == TUNING.number else f"cell-{self.number:02d}"

    @property
    def seed(self) -> int:
        """The seed of the clips and of the training.

        The seeds 0 to 3 were used in the trials that chose the number of frames and of cells. No
        cell has them.
        """
        return TUNING.number if self.number == TUNING.number else _FIRST_SEED + self.number

    def pairs(self, name: ListName) -> list[tuple[str, str]]:
        """Return shape and action of each class of a list. A class index is an index of this list.

        Args:
            name: ``"train"``, ``"trained"``, ``"shapes"`` or ``"actions"``.
        """
        shapes = SEEN if name in ("train", "trained") else self.new_shapes
        actions = self.new_actions if name == "actions" else self.trained_actions
        return [(shape, action) for shape in shapes for action in actions]

    def names(self, name: ListName) -> list[str]:
        """Return the class names of a list, such as ``"star sliding"``."""
        return [f"{shape} {action}" for shape, action in self.pairs(name)]


_FIRST_SEED = 2000

#: The cell on whose lists all settings are chosen.
TUNING = Cell(1000, DIVISIONS[0], DEVELOPMENT_ACTIONS, DEVELOPMENT)


def cell(number: int) -> Cell:
    """Return a cell of the results. After 20 cells the divisions begin again with other seeds.

    Raises:
        ValueError: ``number`` is negative, or it is the number of :data:`TUNING`.
    """
    if not 0 <= number < TUNING.number:
        raise ValueError(f"cell {number}: expected a number from 0 to {TUNING.number - 1}.")
    trained = DIVISIONS[number % len(DIVISIONS)]
    return Cell(number, trained, tuple(a for a in REPORTED_ACTIONS if a not in trained))
