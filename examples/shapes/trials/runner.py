"""The work of the comparison: tuning, then cell after cell. It can be stopped at any time.

Each result is saved at once. An error in a task does not end the others: the errors are listed at
the end, and the same command tries these tasks again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from examples.shapes.progress import duration
from examples.shapes.results import Results, count_run, save_results
from examples.shapes.run import environment
from examples.shapes.schedule import WorkError, side_by_side
from examples.shapes.trials.cells import QUESTIONS, TUNING, Cell, cell
from examples.shapes.trials.clips import remove_clips
from examples.shapes.trials.codes import require_same_code
from examples.shapes.trials.registry import METHODS, TRAININGS
from examples.shapes.trials.store import Choice, is_key_of, open_results
from examples.shapes.trials.tasks import Failure, Place, Task, cost, do
from examples.shapes.trials.tuning import cell_tasks, choose, enter, has_result, tuning_tasks

__all__ = ["Runner"]

DEATHS = 3
"""How often the worker processes are started again after one of them died."""


class Runner:
    """Do the tasks that a results file lacks.

    Args:
        place: the files and the sizes.
        methods: names of the methods.
        jobs: number of processes with one thread each; 1 works in this process.
        choices: the settings of the methods. Default: they are chosen on the development lists.
        keep: whether to keep the clips and the weights of finished cells.

    Raises:
        FileExistsError: the folder holds results of other sizes, or of other code of a function.
    """

    def __init__(
        self,
        place: Place,
        methods: Sequence[str] = tuple(METHODS),
        *,
        jobs: int = 1,
        choices: dict[str, Choice] | None = None,
        keep: bool = False,
    ) -> None:
        self.place, self.jobs, self.choices, self.keep = place, jobs, choices, keep
        self.methods = [name for name in METHODS if name in _with_likes(methods)]
        self.path = place.out / "results.json"
        self.results: Results = open_results(self.path, place.sizes, choices is not None)
        require_same_code(self.results, self.methods, self.path)
        # Failures of tasks that this run does not try stay on the page.
        self._others = {
            task: failure
            for task, failure in self.results["failures"].items()
            if not self._tries(task)
        }
        self.results["failures"] = dict(self._others)
        self._environment = environment()
        self._cost_left = self._cost_done = 0.0
        self._tasks_left = 0
        self._started = time.perf_counter()

    def run(self) -> Results:
        """Do all missing tasks, and return the results."""
        cells = [cell(number) for number in range(self.place.sizes.cells)]
        if self.choices is None:
            self._plan(cells)
            for _ in range(2):  # methods that are like another method come second
                self._work(tuning_tasks(self.methods, choose(self.results, self.methods)))
        chosen = choose(self.results, self.methods) if self.choices is None else self.choices
        everything = {**self.results["chosen"], **chosen}  # other methods keep their results
        names = [*(name for name in METHODS if name in everything), *everything]
        self.results["chosen"] = {name: everything[name] for name in dict.fromkeys(names)}
        save_results(self.results, self.path)
        for each in cells:  # a run that was killed can leave the files of a finished cell
            self._clean(each)
        by_cell = [cell_tasks(each, self.methods, chosen) for each in cells]
        self._count([task for tasks in by_cell for task in tasks])
        # Two cells at a time: a process that is free at the end of a cell begins the next one.
        self._work([task for tasks in by_cell for task in tasks])
        return self.results

    def report(self) -> str:
        """Return the errors as text, or an empty text."""
        failures = {
            task: failure
            for task, failure in self.results["failures"].items()
            if task not in self._others
        }
        if not failures:
            return ""
        lines = [f"{len(failures)} tasks failed, and the tasks that need them were left out."]
        lines.append("The same command tries them again.")
        lines += [f"- {task}: {failure['text']}" for task, failure in failures.items()]
        return "\n".join(lines)

    def _tries(self, task: str) -> bool:
        """Return whether a task of the results file, as text, belongs to this run."""
        place, _, key = task.partition(": ")
        cells = {TUNING.name, *(cell(n).name for n in range(self.place.sizes.cells))}
        names = {*self.methods, *(need for name in self.methods for need in METHODS[name].needs)}
        is_of_run = key.startswith("clips ") or any(is_key_of(key, name) for name in names)
        return place in cells and is_of_run

    def _plan(self, cells: Sequence[Cell]) -> None:
        """Estimate the work of all stages before the settings are known."""
        first = {
            name: {"training": _first(name), "params": dict(METHODS[name].params[0]), "lam": 0.5}
            for name in self.methods
        } | self.results["chosen"]
        tasks = [*tuning_tasks(self.methods, {}), *tuning_tasks(self.methods, first)]
        for each in cells:
            tasks += cell_tasks(each, self.methods, first)
        self._count(list(dict.fromkeys(tasks)))

    def _count(self, tasks: Sequence[Task]) -> None:
        missing = self._missing(tasks)
        self._cost_left = sum(cost(task, self.place.sizes) for task in missing)
        self._tasks_left = len(missing)
        if missing:
            print(
                f"{len(missing)} tasks to do, {self.jobs} at a time; about {self._time_left()} on "
                "the reference machine",
                flush=True,
            )

    def _is_done(self, task: Task) -> bool:
        place, results = self.place, self.results
        if task.kind == "method":
            return has_result(results, task)
        if task.kind == "clips":
            return place.has(task.cell, task.name)  # type: ignore[arg-type]
        return has_result(results, task) and place.store.path(task.cell, task.key).exists()

    def _work(self, tasks: Sequence[Task]) -> None:
        """Do the tasks without a result whose results are still needed."""
        missing = self._missing(tasks)
        for attempt in range(DEATHS + 1):
            try:
                for task, entry in self._results(missing):
                    self._enter(task, entry)
            except WorkError as error:
                print(f"{error} The processes are started again.", flush=True)
                if attempt == DEATHS:
                    raise
                missing = self._missing(tasks)
                continue
            return

    def _missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks to do: rows without a result, and what these rows need."""
        rows = [task for task in tasks if task.kind == "method" and not self._is_done(task)]
        failed = self.results["failures"]
        rows = [task for task in rows if str(task) not in failed]
        trainings = {(task.cell, key) for task in rows for key in task.needs()}
        lists = {(task.cell, name) for task in rows for name in task.lists()}
        missing = []
        for task in tasks:
            if str(task) in failed:
                continue
            if task.kind == "training" and (task.cell, task.key) in trainings:
                if not self._is_done(task):
                    missing.append(task)
                    lists.add((task.cell, "train"))
            elif task in rows:
                missing.append(task)
        clips = [
            task
            for task in tasks
            if task.kind == "clips" and (task.cell, task.name) in lists and not self._is_done(task)
        ]
        cells = list(dict.fromkeys(task.cell for task in tasks))
        kinds = ("clips", "training", "method")
        return sorted(
            [*clips, *missing], key=lambda task: (cells.index(task.cell), kinds.index(task.kind))
        )

    def _results(self, tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any] | Failure]]:
        ready = self._is_ready
        if self.jobs > 1:
            work = partial(do, self.place)
            log = self.place.out / "log"
            yield from side_by_side(work, tasks, self.jobs, lambda _: None, log, ready)
            return
        for task in tasks:
            if ready(task):
                yield task, do(self.place, task)

    def _is_ready(self, task: Task) -> bool:
        return task.is_ready(self.place)

    def _enter(self, task: Task, entry: dict[str, Any] | Failure) -> None:
        seconds = cost(task, self.place.sizes)
        self._cost_left = max(0.0, self._cost_left - seconds)
        self._cost_done += seconds
        self._tasks_left = max(0, self._tasks_left - 1)
        if isinstance(entry, Failure):
            self.results["failures"][str(task)] = {"text": entry.text, "trace": entry.trace}
            print(f"{task} failed: {entry.text}", flush=True)
        else:
            enter(self.results, task, entry)
            if task.kind != "clips":
                count_run(self.results, self._environment)
        save_results(self.results, self.path)
        if not isinstance(entry, Failure):
            tasks = "1 task" if self._tasks_left == 1 else f"{self._tasks_left} tasks"
            left = f"{tasks}, about {self._time_left()} to go"
            print(f"{task}: {_words(task, entry)} ({left})", flush=True)
        if task.kind == "method" and task.cell != TUNING:
            self._clean(task.cell)

    def _clean(self, each: Cell) -> None:
        """Remove the clips and the weights of a cell whose rows all have results."""
        if self.keep:
            return
        tasks = cell_tasks(each, self.methods, self.results["chosen"])
        if all(self._is_done(row) for row in tasks if row.kind == "method"):
            remove_clips(each, self.place.clips)
            if each.number > 0:  # the final model is made of the first cell
                self.place.store.remove(each)

    def _time_left(self) -> str:
        speed = 1.0
        passed = time.perf_counter() - self._started
        if self._cost_done > 60:
            speed = self._cost_done / (passed * self.jobs)
        return duration(self._cost_left / (speed * self.jobs))


def _with_likes(methods: Sequence[str]) -> set[str]:
    likes = {METHODS[name].like for name in methods}
    return {*methods, *(like for like in likes if like is not None)}


def _first(name: str) -> dict[str, Any]:
    method = METHODS[METHODS[name].like or name]
    return dict(TRAININGS[method.needs[0]].grid[0]) if method.needs else {}


def _words(task: Task, entry: dict[str, Any]) -> str:
    if task.kind == "clips":
        return "written"
    if task.kind == "training":
        step = entry["step_seconds"]
        return f"{entry['steps']} steps of {step:.2f} s, loss {entry['loss']:.2f}"
    texts = []
    for point in entry["points"]:
        accuracy = point["accuracy"]
        values = " / ".join(f"{100 * accuracy[name]:.1f}" for name in accuracy)
        texts.append((accuracy, f"λ={point['lam']:g}: {values}"))
    best = max(texts, key=lambda pair: sum(pair[0][q] for q in QUESTIONS))
    return best[1] + (f" (best of {len(texts)})" if len(texts) > 1 else "")
