"""The studies: their runs, their numbers of seeds, and the order of the runs.

A run is trained once for each seed, even if several studies use it. The settings that all studies
share are in :mod:`examples.shapes.settings`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

import openvclip
from examples.shapes.model import Backbone
from openvclip.training.recipe import Run

LAST, AVERAGE = "last", "average"
"""Weights of a run: the weights after the last step, and the average of the trainer."""

_RELATIVE_COSTS: dict[Backbone, float] = {"tiny": 0.4, "small": 1.0, "wider": 1.6}


@dataclass(frozen=True)
class FineTune:
    """A run of the trainer.

    Attributes:
        name: name in the results file.
        method: method of :mod:`examples.finetune`; empty for CLIP, which is not trained.
        backbone: size of the image tower.
        changes: changes of the recipe.
        how: options of the trainer that are not part of the recipe.
        boundary: boundary mode of the attention over frames; ``None`` for a model without attention
            over frames.
    """

    name: str
    method: str
    backbone: Backbone = "small"
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    how: Run = field(default_factory=Run)
    boundary: Literal["zero", "mask", "replicate"] | None = "zero"

    @property
    def trained(self) -> bool:
        """Whether the run trains a model."""
        return bool(self.method)

    @property
    def every(self) -> int:
        """Number of steps from one step with the regulariser to the next; 1 means every step."""
        return self.how.every

    @property
    def relative_cost(self) -> float:
        """Time of a clip's pass through the model, divided by the time for the small model."""
        return _RELATIVE_COSTS[self.backbone]

    def definition(self) -> dict[str, Any]:
        """Return the settings that determine the results of the run, for the results file."""
        return {
            "method": self.method,
            "backbone": self.backbone,
            "changes": self.changes,
            "every": self.how.every,
            "alpha_min": self.how.alpha_min,
            "boundary": self.boundary,
        }


@dataclass(frozen=True)
class Averaging:
    """An additional average of the weights of a run. It does not change the run.

    Attributes:
        after: number of epochs before the averaging begins.
        cycle: number of epochs between two models that enter the average.
    """

    after: int
    cycle: float

    @property
    def name(self) -> str:
        """The name of the weights in the results file."""
        return f"average after {self.after} every {self.cycle:g}"

    def tracker(self, model: nn.Module, steps_per_epoch: int) -> openvclip.SWATracker:
        """Return a new tracker of the average, without any update so far."""
        every = max(1, round(self.cycle * steps_per_epoch))
        return openvclip.SWATracker(model, start=self.after * steps_per_epoch, every=every)


@dataclass(frozen=True)
class Row:
    """Weights of a run, shown as a row of a table and as a curve of a figure.

    Attributes:
        label: label of the row.
        run: the run.
        weights: :data:`LAST`, :data:`AVERAGE` or an :class:`Averaging`.
    """

    label: str
    run: FineTune
    weights: str | Averaging = AVERAGE

    @property
    def end(self) -> str:
        """The name of the weights in the results file."""
        return self.weights.name if isinstance(self.weights, Averaging) else self.weights


@dataclass(frozen=True)
class Study:
    """Rows that are compared seed by seed.

    Attributes:
        name: name on the command line.
        rows: the rows in the order of the table.
        seeds: number of seeds.
    """

    name: str
    rows: tuple[Row, ...]
    seeds: int


@dataclass(frozen=True)
class Task:
    """A run with a seed, and the weights of the run to evaluate."""

    run: FineTune
    seed: int
    weights: tuple[str | Averaging, ...] = (LAST,)

    @property
    def ends(self) -> list[str]:
        """The names of the weights in the results file."""
        return [w.name if isinstance(w, Averaging) else w for w in self.weights]

    @property
    def averagings(self) -> list[Averaging]:
        """The averages in addition to the average of the trainer."""
        return [w for w in self.weights if isinstance(w, Averaging)]

    def __str__(self) -> str:
        return f"{self.run.name}, seed {self.seed}"


def plan(studies: Iterable[Study], seeds: int | None = None) -> list[Task]:
    """Return the tasks of the studies, each run once for each seed, the most useful tasks first.

    Let ``n`` be the number of seeds of the study with the fewest seeds. The first group of tasks
    has the first ``n`` seeds of the studies with the most seeds. The second group has all seeds of
    the other studies. The third group has the remaining seeds of the studies in the first group.
    Within a group the tasks of a study are ordered by seed.

    Args:
        studies: the studies.
        seeds: largest number of seeds of a study. Default: the number of seeds of each study.
    """
    chosen = list(studies)
    number = {s.name: s.seeds if seeds is None else min(seeds, s.seeds) for s in chosen}
    least, most = min(number.values()), max(number.values())
    first = [study for study in chosen if number[study.name] == most]
    others = [study for study in chosen if study not in first]
    rounds = [(first, range(least))]
    rounds += [([study], range(number[study.name])) for study in others]
    rounds += [(first, range(least, most))]
    ordered = [
        (row.run, seed)
        for group, group_seeds in rounds
        for seed in group_seeds
        for study in group
        for row in study.rows
    ]
    wanted: dict[tuple[str, int], dict[str, str | Averaging]] = {}
    for study in chosen:
        for row in study.rows:
            for seed in range(number[study.name]):
                wanted.setdefault((row.run.name, seed), {})[row.end] = row.weights
    tasks = {
        (run.name, seed): Task(run, seed, tuple(wanted[run.name, seed].values()))
        for run, seed in ordered
    }
    return list(tasks.values())


# --- the runs ------------------------------------------------------------------------------------

CLIP = FineTune("clip", "", boundary=None)
FRAMES_ALONE = FineTune("frames alone", "finetune", boundary=None)
PLAIN = FineTune("finetune", "swa")  # averaging does not change the last weights
OPEN_VCLIP = FineTune("openvclip", "openvclip")
L2 = {
    weight: FineTune(f"l2 {weight:g}", "l2", changes={"l2_weight": weight})
    for weight in (0.001, 0.01, 0.1)
}


def _variant(name: str, **fields: Any) -> FineTune:
    """Return the run of Open-VCLIP with some changes."""
    return FineTune(f"openvclip {name}", "openvclip", **fields)


def _of_size(backbone: Backbone) -> list[Row]:
    clip = FineTune(f"clip {backbone}", "", backbone, boundary=None)
    plain = FineTune(f"finetune {backbone}", "finetune", backbone)
    return [
        Row(f"CLIP, {backbone}", clip, LAST),
        Row(f"FINE-TUNE, {backbone}", plain, LAST),
        Row(f"Open-VCLIP, {backbone}", _variant(backbone, backbone=backbone)),
    ]


def _interval(low: float, high: float) -> FineTune:
    name = f"alpha {low:g} to {high:g}"
    return _variant(name, changes={"alpha_max": high}, how=Run(alpha_min=low))


# --- the tables ----------------------------------------------------------------------------------

ROW_CLIP = Row("CLIP", CLIP, LAST)
ROW_FINE_TUNE = Row("FINE-TUNE", PLAIN, LAST)
ROW_OPEN_VCLIP = Row("Open-VCLIP", OPEN_VCLIP)

MAIN = Study(
    "main",
    (
        ROW_CLIP,
        ROW_FINE_TUNE,
        Row("L2", L2[0.01], LAST),
        Row("IWR", OPEN_VCLIP, LAST),
        Row("SWA", PLAIN),
        ROW_OPEN_VCLIP,
    ),
    seeds=5,
)
TEMPORAL = Study(
    "temporal",
    (ROW_CLIP, Row("CLIP, fine-tuned", FRAMES_ALONE, LAST), ROW_FINE_TUNE, ROW_OPEN_VCLIP),
    seeds=5,
)
PARTS = Study("parts", tuple(row for row in MAIN.rows if row.label not in ("CLIP", "L2")), seeds=5)
BACKBONES = Study(
    "backbones",
    (
        *_of_size("tiny"),
        Row("CLIP, small", CLIP, LAST),
        Row("FINE-TUNE, small", PLAIN, LAST),
        Row("Open-VCLIP, small", OPEN_VCLIP),
        *_of_size("wider"),
    ),
    seeds=3,
)
PENALTY = Study(
    "l2",
    (*(Row(f"L2, {weight:g}", run, LAST) for weight, run in L2.items()), ROW_OPEN_VCLIP),
    seeds=3,
)
WEIGHT = Study(
    "weight",
    (
        Row("C = 0.25", _variant("C 0.25", changes={"iwr_weight": 0.25})),
        Row("C = 0.5", OPEN_VCLIP),
        Row("C = 1", _variant("C 1", changes={"iwr_weight": 1.0})),
    ),
    seeds=3,
)
INTERVAL = Study(
    "interval",
    (
        Row("α in (0, 0.3)", _interval(0.0, 0.3)),
        Row("α in (0, 0.6)", OPEN_VCLIP),
        Row("α in (0, 0.9)", _interval(0.0, 0.9)),
    ),
    seeds=3,
)
AVERAGING = Study(
    "averaging",
    (
        *(Row(f"after {n}, cycle 1/4", OPEN_VCLIP, Averaging(n, 0.25)) for n in (1, 5)),
        Row("after 10, cycle 1/4", OPEN_VCLIP),
        Row("after 15, cycle 1/4", OPEN_VCLIP, Averaging(15, 0.25)),
        *(Row(f"after 10, cycle {n}", OPEN_VCLIP, Averaging(10, n)) for n in (1, 2)),
    ),
    seeds=3,
)
BOUNDARY = Study(
    "boundary",
    (
        Row("zero", OPEN_VCLIP),
        Row("mask", _variant("mask", boundary="mask")),
        Row("replicate", _variant("replicate", boundary="replicate")),
    ),
    seeds=3,
)
EVERY = Study(
    "every",
    (
        Row("every step", OPEN_VCLIP),
        Row("every 2nd step", _variant("every 2", how=Run(every=2))),
        Row("every 4th step", _variant("every 4", how=Run(every=4))),
    ),
    seeds=3,
)
FIXED = Study(
    "fixed",
    (Row("α drawn from (0, 0.6)", OPEN_VCLIP), Row("α = 0.3", _interval(0.3, 0.3))),
    seeds=3,
)

#: All studies, in the order of the page.
STUDIES: tuple[Study, ...] = (
    MAIN,
    TEMPORAL,
    PARTS,
    BACKBONES,
    PENALTY,
    WEIGHT,
    INTERVAL,
    AVERAGING,
    BOUNDARY,
    EVERY,
    FIXED,
)

#: The study of a command line without --full and --only: the main table without L2, with one seed.
QUICK = Study("quick", tuple(row for row in MAIN.rows if row.label != "L2"), seeds=1)
