"""The choice of the settings of each method, on the development lists alone.

Each method has the same budget: at most four training runs, and at most 24 evaluated points (the
settings of the training, times the method's own numbers, times λ). The chosen point has the best
mean accuracy over the three questions of :data:`examples.shapes.trials.cells.TUNING`. Rows that
use the same training have its settings in common: those with the best mean over the rows that have
results, also if a run is only of some of these rows. A method
that is ``like`` another method has the same settings of the training as the other method, and a
control has its numbers too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS, TUNING, Cell
from examples.shapes.trials.registry import CURVE, METHODS, TRAININGS, Method
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.store import Choice
from examples.shapes.trials.tasks import Task

__all__ = [
    "best",
    "cell_tasks",
    "choose",
    "enter",
    "has_points",
    "has_result",
    "score",
    "tuning_tasks",
]

LISTS = ("train", *QUESTIONS)


def score(point: dict[str, Any]) -> float:
    """Return the number by which points are chosen: the mean accuracy over the questions."""
    return fmean(point["accuracy"][question] for question in QUESTIONS)


def best(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the point with the highest score; of equal points the first."""
    return max(points, key=score)


def pairs(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return settings as sorted pairs, which can be hashed."""
    return tuple(sorted(settings.items()))


def tuning_tasks(methods: Iterable[str], chosen: dict[str, Choice]) -> list[Task]:
    """Return the tasks on the development lists.

    Args:
        methods: names of the methods.
        chosen: the choices so far. The tasks of a method that is like another method are left out
            until the other method has a choice.
    """
    tasks = [Task(TUNING, "clips", name) for name in LISTS]
    for name in methods:
        method = METHODS[name]
        for settings in _settings(method, chosen):
            tasks += _trainings(TUNING, method, settings)
            params = [chosen[str(method.like)]["params"]] if method.control else method.params
            numbers = tuple(pairs(dict(numbers)) for numbers in params)
            tasks.append(Task(TUNING, "method", name, settings, numbers, method.lams))
    return list(dict.fromkeys(tasks))


def _settings(method: Method, chosen: dict[str, Choice]) -> list[tuple[tuple[str, Any], ...]]:
    if not method.needs:
        return [()]
    if method.like is not None:
        other = chosen.get(method.like)
        return [] if other is None else [pairs(other["training"])]
    return [pairs(dict(settings)) for settings in TRAININGS[method.needs[0]].grid]


def _trainings(cell: Cell, method: Method, settings: tuple[tuple[str, Any], ...]) -> list[Task]:
    return [Task(cell, "training", need, settings) for need in method.needs]


def choose(results: Results, methods: Iterable[str]) -> dict[str, Choice]:
    """Return the choice of each method whose tuning has results.

    Args:
        results: the results; ``results["tuning"]["methods"][method]`` has the points of each
            setting of the training. If a method is like another method, its points with other
            settings of the training than the present choice are left out.
        methods: names of the methods; a method after the method that it is like.
    """
    chosen: dict[str, Choice] = {}
    methods = list(methods)
    # All rows with results share settings, also those that this run leaves alone.
    shared = _shared_settings(results, [*METHODS])
    for name in methods:
        entries = results["tuning"].get("methods", {}).get(name, {}).values()
        other = chosen.get(METHODS[name].like or "")
        training = shared.get(name) if other is None else other["training"]
        points = [
            {"training": entry["settings"], **point}
            for entry in entries
            if training is None or entry["settings"] == training
            for point in entry["points"]
            if not METHODS[name].control or (other and point["params"] == other["params"])
        ]
        if points:
            point = best(points)
            chosen[name] = {key: point[key] for key in ("training", "params", "lam")}
    return chosen


def _shared_settings(results: Results, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of the trainings that several rows of the page share, by row.

    Of the settings with results of all of these rows, they have the best mean over the rows of the
    best score. One row alone would choose among settings with nearly equal results by luck, and
    its difference from another row would be that of the settings.
    """
    tuned = results["tuning"].get("methods", {})
    rows: dict[str, list[str]] = {}
    for name in methods:
        method = METHODS[name]
        if name in PUBLISHED and method.needs and method.like is None and tuned.get(name):
            rows.setdefault(method.needs[0], []).append(name)
    shared: dict[str, dict[str, Any]] = {}
    for names in rows.values():
        scores: dict[tuple[tuple[str, Any], ...], list[float]] = {}
        for name in names:
            for entry in tuned[name].values():
                found = scores.setdefault(pairs(entry["settings"]), [])
                found.append(max(score(point) for point in entry["points"]))
        whole = {settings: found for settings, found in scores.items() if len(found) == len(names)}
        if len(names) > 1 and whole:
            best_settings = max(whole, key=lambda settings: fmean(whole[settings]))
            shared |= {name: dict(best_settings) for name in names}
    return shared


def cell_tasks(cell: Cell, methods: Iterable[str], chosen: dict[str, Choice]) -> list[Task]:
    """Return the tasks of a cell: its lists, its trainings, and its rows at the chosen settings.

    A row has the results at the chosen λ. The rows of a figure have results at further λ.
    """
    tasks = [Task(cell, "clips", name) for name in LISTS]
    rows = []
    for name in methods:
        choice, method = chosen.get(name), METHODS[name]
        if choice is None:
            continue
        settings = pairs(choice["training"])
        tasks += _trainings(cell, method, settings)
        lams = {choice["lam"], *(CURVE if method.curve else ())}
        numbers = (pairs(choice["params"]),)
        rows.append(Task(cell, "method", name, settings, numbers, tuple(sorted(lams))))
    return list(dict.fromkeys([*tasks, *rows]))


def has_result(results: Results, task: Task) -> bool:
    """Return whether the results have the entry of a training or of a method.

    An entry of other settings, of other numbers of the method or without one of the λ is not the
    entry of the task.
    """
    is_tuning = task.cell == TUNING
    place = results["tuning"] if is_tuning else results["cells"].get(str(task.cell.number), {})
    if task.kind == "training":
        return task.key in place.get("trainings", {})
    entry = place.get("methods", {}).get(task.name)
    if is_tuning and entry is not None:
        entry = entry.get(task.key)
    if task.kind == "clips" or entry is None:
        return False
    params = [dict(numbers) for numbers in task.params]
    return has_points(entry, dict(task.settings), params, task.lams)


def has_points(
    entry: dict[str, Any],
    settings: dict[str, Any],
    params: Iterable[dict[str, Any]],
    lams: Iterable[float],
) -> bool:
    """Return whether an entry of a method has points for all of its numbers and all λ."""
    known = {(pairs(point["params"]), point["lam"]) for point in entry["points"]}
    wanted = {(pairs(numbers), lam) for numbers in params for lam in set(lams)}
    return bool(entry["settings"] == settings and wanted <= known)


def enter(results: Results, task: Task, entry: dict[str, Any]) -> None:
    """Add the entry of a task to the results."""
    place = _place(results, task)
    if task.kind == "training":
        place["trainings"][task.key] = entry
    elif task.kind == "method":
        entry = {"settings": dict(task.settings), **entry}
        if task.cell == TUNING:
            place["methods"].setdefault(task.name, {})[task.key] = entry
        else:
            place["methods"][task.name] = entry


def _place(results: Results, task: Task) -> dict[str, Any]:
    if task.cell == TUNING:
        place: dict[str, Any] = results["tuning"]
    else:
        place = results["cells"].setdefault(str(task.cell.number), {})
    for part in ("trainings", "methods"):
        place.setdefault(part, {})
    return place
