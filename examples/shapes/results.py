"""The results file, and what is read from it: accuracies of a study's rows, paired by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.experiment import Accuracies, Outcome
from examples.shapes.studies import MAIN, FineTune, Row, Study, Task
from openvclip.checkpoints import atomic_path
from openvclip.evaluation.figures import Curve, markdown_table, mean_and_std, tradeoff_figure

Results = dict[str, Any]
"""``{"settings": ..., "environments": ..., "seeds": {seed: {run: Entry}}}``; environments are the
versions and machines that runs were made with, each with the number of its ``runs``."""

Entry = dict[str, Any]
"""A run with a seed: ``definition``, ``rows`` (accuracies by weights, list and lambda),
``seconds`` (of the whole run) and ``step_seconds`` (median), None where they were not taken."""

Numbers = NDArray[np.float64]


def save_results(results: Results, path: Path) -> None:
    """Write the results file; after a crash the old file or the new one is there, whole."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def load_results(path: Path, settings: dict[str, Any]) -> Results:
    """Results that an earlier call left, or an empty start.

    Raises:
        FileExistsError: they were made with other settings.
    """
    if not path.exists():
        return {"settings": settings, "environments": [], "seeds": {}}
    results: Results = json.loads(path.read_text())
    if results.get("settings") != settings:
        raise FileExistsError(
            f"{path} holds results of other settings. Give another --out, or remove that folder."
        )
    return results


def require_definitions(results: Results, runs: list[FineTune], path: Path) -> None:
    """Refuse results of runs that are now defined otherwise.

    Raises:
        FileExistsError: there are some.
    """
    for run in runs:
        for entries in results["seeds"].values():
            found = entries.get(run.name, {}).get("definition", run.definition())
            if found != run.definition():
                raise FileExistsError(
                    f"{path} holds a run {run.name!r} of other settings: {found}, now "
                    f"{run.definition()}. Give another --out, or remove that folder."
                )


def entry_of(task: Task, outcome: Outcome) -> Entry:
    """What the results file keeps of a run."""
    return {
        "definition": task.run.definition(),
        "rows": outcome.accuracies,
        "seconds": outcome.seconds,
        "step_seconds": outcome.step_seconds,
    }


def count_run(results: Results, environment: Mapping[str, str]) -> None:
    """Note that one more run was made with these versions, on this machine."""
    for known in results["environments"]:
        if known == {**environment, "runs": known["runs"]}:
            known["runs"] += 1
            return
    results["environments"].append({**environment, "runs": 1})


def origins(results: Results) -> str:
    """The machines and versions that the runs were made with, in words."""
    several = len(results["environments"]) > 1
    parts = []
    for environment in results["environments"]:
        versions = {key: value for key, value in environment.items() if key != "runs"}
        machine = versions.pop("machine", "machine unknown")
        runs = f"{environment['runs']} runs on " if several else ""
        parts.append(f"{runs}{machine}; " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    return ". ".join(parts)


def holds(results: Results, task: Task) -> bool:
    """Whether all that a task gives is there."""
    entry = results["seeds"].get(str(task.seed), {}).get(task.run.name)
    return entry is not None and set(task.ends) <= set(entry["rows"])


def enter(results: Results, task: Task, entry: Entry) -> None:
    """Put in what a task gave, beside other weights of the same run that were there."""
    entries = results["seeds"].setdefault(str(task.seed), {})
    rows = entries.get(task.run.name, {"rows": {}})["rows"] | entry["rows"]
    entries[task.run.name] = {**entry, "rows": rows}


@dataclass(frozen=True)
class Table:
    """The rows of a study that have results, with the seeds that all of them have.

    Attributes:
        study: the study.
        results: the results file.
    """

    study: Study
    results: Results

    @cached_property
    def rows(self) -> list[Row]:
        """The rows that have results, of whichever of the study's seeds."""
        return [row for row in self.study.rows if self._seeds_of(row)]

    @cached_property
    def seeds(self) -> list[str]:
        """The seeds that all these rows have."""
        if not self.rows:
            return []
        first, *others = (self._seeds_of(row) for row in self.rows)
        return [seed for seed in first if all(seed in seeds for seeds in others)]

    def row(self, label: str) -> Row | None:
        """The row of this label, None where it has no results."""
        return next((row for row in self.rows if row.label == label), None)

    def entries(self, row: Row) -> list[Entry]:
        """The run of a row, by seed."""
        return [self.results["seeds"][seed][row.run.name] for seed in self.seeds]

    def lambdas(self, row: Row) -> list[float]:
        """The lambdas of a row, in the order of the columns of :meth:`accuracies`."""
        return [float(lam) for lam in self._accuracies(row)[0]["seen_test"]]

    def accuracies(self, row: Row, name: str) -> Numbers:
        """Accuracies of a row on a list, ``[seeds, lambdas]``, in [0, 1]."""
        return np.array(
            [list(found[name].values()) for found in self._accuracies(row)], dtype=np.float64
        )

    def at(self, row: Row, lam: float, name: str) -> Numbers:
        """Accuracies of a row on a list at a lambda, ``[seeds]``; of CLIP, its only ones."""
        lams = self.lambdas(row)
        return self.accuracies(row, name)[:, lams.index(lam) if len(lams) > 1 else 0]

    def chosen_lambda(self, row: Row) -> float:
        """The lambda of the best mean zero-shot accuracy on the *development* shapes."""
        means = self.accuracies(row, "development").mean(axis=0)
        return self.lambdas(row)[int(means.argmax())]

    def _accuracies(self, row: Row) -> list[Accuracies]:
        return [entry["rows"][row.end] for entry in self.entries(row)]

    def _seeds_of(self, row: Row) -> list[str]:
        found = []
        for seed in map(str, range(self.study.seeds)):
            entry = self.results["seeds"].get(seed, {}).get(row.run.name)
            if entry is not None and row.end in entry["rows"]:
                found.append(seed)
        return found


def table(results: Results, study: Study = MAIN, *, seconds: bool = False) -> str:
    """Markdown: accuracies of each row at the fine-tuned end, half way, and at its chosen λ.

    Args:
        results: the results file.
        study: whose rows.
        seconds: add a column with the seconds of a training step.
    """
    found = Table(study, results)
    header = ["method", "seen, λ=0", "unseen, λ=0", "seen, λ=0.5", "unseen, λ=0.5"]
    header += ["chosen λ", "seen", "unseen"]
    rows = [_table_row(found, row) for row in found.rows]
    if seconds:
        header.append("step, s")
        for cells, row in zip(rows, found.rows, strict=True):
            steps = [entry["step_seconds"] for entry in found.entries(row)]
            cells.append(f"{median(step for step in steps if step is not None):.2f}")
    return markdown_table(header, rows)


def _table_row(found: Table, row: Row) -> list[str]:
    if not row.run.trained:
        return [row.label, "", "", "", "", "", *_cells(found, row, 1.0)]
    best = found.chosen_lambda(row)
    at = [_cells(found, row, lam) for lam in (0.0, 0.5, best)]
    return [row.label, *at[0], *at[1], f"{best:g}", *at[2]]


def _cells(found: Table, row: Row, lam: float) -> list[str]:
    return [mean_and_std(found.at(row, lam, name)) for name in ("seen_test", "unseen")]


def draw(
    found: Table, path: Path, names: Mapping[str, str] | None = None, *, title: str = "Shapes world"
) -> None:
    """The trade-off figure: unseen over seen accuracy along lambda, stars at the chosen lambda.

    Args:
        found: the rows.
        path: the PNG to write.
        names: the curves' names by the rows' labels, which they are by default.
        title: what the figure shows.
    """
    curves = []
    for row in found.rows:
        lams = found.lambdas(row)
        seen, unseen = (found.accuracies(row, name) for name in ("seen_test", "unseen"))
        chosen = lams.index(found.chosen_lambda(row)) if row.run.trained else None
        highlighted = row.label in ("FINE-TUNE", "Open-VCLIP")
        name = (names or {}).get(row.label, row.label)
        curves.append(Curve(name, lams, seen, unseen, chosen, highlighted))
    n = len(found.seeds)
    tradeoff_figure(
        curves,
        path,
        title=f"{title}, {n} seed{'s' if n > 1 else ''}; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on clips of seen shapes (%)",
        zero_shot_label="accuracy on clips of unseen shapes (%)",
    )


def wrapped(text: str, bullet: str = "") -> str:
    """A paragraph or, with ``"- "``, an item of a list, in lines that can be read as plain text."""
    return fill(
        text,
        118,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
