"""The results file, and the accuracies of the rows of a study, paired by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.experiment import Accuracies, Outcome
from examples.shapes.studies import MAIN, FineTune, Row, Study, Task
from openvclip.checkpoints import atomic_path
from openvclip.commands.locking import holder_of, lock, unlock
from openvclip.evaluation import Curve, markdown_table, mean_and_std, tradeoff_figure

Results = dict[str, Any]
"""``{"settings": ..., "environments": ..., "seeds": {seed: {run: Entry}}}``. An environment is a
machine with versions of packages, and the number of ``runs`` that were made with it."""

Entry = dict[str, Any]
"""A run with a seed: ``definition``, ``rows`` (accuracies by weights, list and lambda), ``seconds``
of the whole run and ``step_seconds`` (median). The two times are ``None`` if not measured."""

Numbers = NDArray[np.float64]


def save_results(results: Results, path: Path) -> None:
    """Write the results file atomically: a crash leaves the complete old file or new file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def load_results(path: Path, settings: dict[str, Any]) -> Results:
    """Return the results in a file, or empty results if the file does not exist.

    Raises:
        FileExistsError: the results were made with other settings.
    """
    if not path.exists():
        return {"settings": settings, "environments": [], "seeds": {}}
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("settings") != settings:
        raise FileExistsError(
            f"{path} holds results of other settings. Give another --out, or remove the folder "
            f"{path.parent}."
        )
    return results


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Context manager in which no other command writes results into an output folder.

    Raises:
        FileExistsError: another command writes into the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.lock"
    with path.open("a+b", buffering=0) as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{out}: another process{holder_of(path)} writes its results into this folder. "
                "Wait until it ends, or give another --out."
            ) from error
        try:
            yield
        finally:
            unlock(file)


def require_definitions(results: Results, runs: list[FineTune], path: Path) -> None:
    """Check that the results were made with the present definitions of the runs.

    Raises:
        FileExistsError: a run has another definition now.
    """
    for run in runs:
        for entries in results["seeds"].values():
            saved = entries.get(run.name, {}).get("definition", run.definition())
            if saved != run.definition():
                raise FileExistsError(
                    f"{path} holds a run {run.name!r} of other settings. The settings in the file "
                    f"are {saved}. The settings of this command are {run.definition()}. Give "
                    f"another --out, or remove the folder {path.parent}."
                )


def entry_of(task: Task, outcome: Outcome) -> Entry:
    """Return the entry of a run for the results file."""
    return {
        "definition": task.run.definition(),
        "rows": outcome.accuracies,
        "seconds": outcome.seconds,
        "step_seconds": outcome.step_seconds,
    }


def count_run(results: Results, environment: Mapping[str, str]) -> None:
    """Count one more run for this machine and these versions."""
    for known in results["environments"]:
        if known == {**environment, "runs": known["runs"]}:
            known["runs"] += 1
            return
    results["environments"].append({**environment, "runs": 1})


def origins(results: Results) -> str:
    """Return the machines and versions of the runs as text."""
    several = len(results["environments"]) > 1
    parts = []
    for environment in results["environments"]:
        versions = {key: value for key, value in environment.items() if key != "runs"}
        machine = versions.pop("machine", "machine unknown")
        runs = f"{environment['runs']} runs on " if several else ""
        parts.append(f"{runs}{machine}; " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    return ". ".join(parts)


def holds(results: Results, task: Task) -> bool:
    """Return whether the results contain all weights of a task."""
    entry = results["seeds"].get(str(task.seed), {}).get(task.run.name)
    return entry is not None and set(task.ends) <= set(entry["rows"])


def enter(results: Results, task: Task, entry: Entry) -> None:
    """Add the entry of a task; other weights of the same run are kept."""
    entries = results["seeds"].setdefault(str(task.seed), {})
    rows = entries.get(task.run.name, {"rows": {}})["rows"] | entry["rows"]
    entries[task.run.name] = {**entry, "rows": rows}


@dataclass(frozen=True)
class Table:
    """The rows of a study that have results, with their common seeds.

    Attributes:
        study: the study.
        results: the results file.
    """

    study: Study
    results: Results

    @cached_property
    def rows(self) -> list[Row]:
        """The rows that have results for at least one seed of the study."""
        return [row for row in self.study.rows if self._seeds_of(row)]

    @cached_property
    def seeds(self) -> list[str]:
        """The seeds for which all of these rows have results."""
        if not self.rows:
            return []
        first, *others = (self._seeds_of(row) for row in self.rows)
        return [seed for seed in first if all(seed in seeds for seeds in others)]

    def row(self, label: str) -> Row | None:
        """Return the row with a label, or ``None`` if it has no results."""
        return next((row for row in self.rows if row.label == label), None)

    def entries(self, row: Row) -> list[Entry]:
        """Return the entries of the run of a row, one for each seed."""
        return [self.results["seeds"][seed][row.run.name] for seed in self.seeds]

    def lambdas(self, row: Row) -> list[float]:
        """Return the lambdas of a row, in the order of the columns of :meth:`accuracies`."""
        return [float(lam) for lam in self._accuracies(row)[0]["seen_test"]]

    def accuracies(self, row: Row, name: str) -> Numbers:
        """Return the accuracies of a row on a list, ``[seeds, lambdas]``, in [0, 1]."""
        return np.array(
            [list(accuracies[name].values()) for accuracies in self._accuracies(row)],
            dtype=np.float64,
        )

    def at(self, row: Row, lam: float, name: str) -> Numbers:
        """Return the accuracies of a row at a lambda, ``[seeds]``; for CLIP lambda is ignored."""
        lams = self.lambdas(row)
        return self.accuracies(row, name)[:, lams.index(lam) if len(lams) > 1 else 0]

    def chosen_lambda(self, row: Row) -> float:
        """Return the lambda with the best mean accuracy on the *development* shapes."""
        means = self.accuracies(row, "development").mean(axis=0)
        return self.lambdas(row)[int(means.argmax())]

    def _accuracies(self, row: Row) -> list[Accuracies]:
        return [entry["rows"][row.end] for entry in self.entries(row)]

    def _seeds_of(self, row: Row) -> list[str]:
        seeds = []
        for seed in map(str, range(self.study.seeds)):
            entry = self.results["seeds"].get(seed, {}).get(row.run.name)
            if entry is not None and row.end in entry["rows"]:
                seeds.append(seed)
        return seeds


def table(results: Results, study: Study = MAIN, *, seconds: bool = False) -> str:
    """Return a Markdown table: the accuracies of each row at λ=0, λ=0.5 and the chosen λ.

    Args:
        results: the results file.
        study: the study.
        seconds: whether to add a column with the seconds of a training step.
    """
    rows_of_study = Table(study, results)
    header = ["method", "seen, λ=0", "unseen, λ=0", "seen, λ=0.5", "unseen, λ=0.5"]
    header += ["chosen λ", "seen", "unseen"]
    rows = [_table_row(rows_of_study, row) for row in rows_of_study.rows]
    if seconds:
        header.append("step, s")
        for cells, row in zip(rows, rows_of_study.rows, strict=True):
            steps = [entry["step_seconds"] for entry in rows_of_study.entries(row)]
            cells.append(f"{median(step for step in steps if step is not None):.2f}")
    return markdown_table(header, rows)


def _table_row(table: Table, row: Row) -> list[str]:
    if not row.run.trained:
        return [row.label, "", "", "", "", "", *_cells(table, row, 1.0)]
    best = table.chosen_lambda(row)
    at = [_cells(table, row, lam) for lam in (0.0, 0.5, best)]
    return [row.label, *at[0], *at[1], f"{best:g}", *at[2]]


def _cells(table: Table, row: Row, lam: float) -> list[str]:
    return [mean_and_std(table.at(row, lam, name)) for name in ("seen_test", "unseen")]


def draw(
    table: Table, path: Path, names: Mapping[str, str] | None = None, *, title: str = "Shapes world"
) -> None:
    """Draw the trade-off figure: a curve along lambda for each row.

    The x-axis is the accuracy on seen shapes, the y-axis is the accuracy on unseen shapes.
    Stars mark the chosen lambda of each row.

    Args:
        table: the rows.
        path: the PNG file to write.
        names: name of each curve by the label of its row. Default: the labels.
        title: title of the figure.
    """
    curves = []
    for row in table.rows:
        lams = table.lambdas(row)
        seen, unseen = (table.accuracies(row, name) for name in ("seen_test", "unseen"))
        chosen = lams.index(table.chosen_lambda(row)) if row.run.trained else None
        highlighted = row.label in ("FINE-TUNE", "Open-VCLIP")
        name = (names or {}).get(row.label, row.label)
        curves.append(Curve(name, lams, seen, unseen, chosen, highlighted))
    n = len(table.seeds)
    tradeoff_figure(
        curves,
        path,
        title=f"{title}, {n} seed{'s' if n > 1 else ''}; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on clips of seen shapes (%)",
        zero_shot_label="accuracy on clips of unseen shapes (%)",
    )
