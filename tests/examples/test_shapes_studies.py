"""The studies of the shapes world: their runs, and how the runs share the processes."""

from __future__ import annotations

from collections import Counter
from multiprocessing import active_children
from pathlib import Path

import pytest
from torch import nn

from examples.shapes import schedule, studies
from examples.shapes.experiment import cost
from examples.shapes.schedule import WorkError, side_by_side
from examples.shapes.settings import FULL
from examples.shapes.studies import AVERAGE, LAST, STUDIES, Averaging, plan
from tests.examples.shapes_work import square
from tests.forked import CONTEXT


def test_each_run_is_made_once_for_a_seed() -> None:
    made = Counter((task.run.name, task.seed) for task in plan(STUDIES))
    assert set(made.values()) == {1}


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_row_gets_its_seeds(study: studies.Study) -> None:
    evaluated = {(task.run.name, task.seed, end) for task in plan(STUDIES) for end in task.ends}
    needed = {(r.run.name, seed, r.end) for r in study.rows for seed in range(study.seeds)}
    assert needed <= evaluated
    assert len({row.label for row in study.rows}) == len(study.rows)


def test_nothing_is_evaluated_that_no_study_shows() -> None:
    evaluated = {(task.run.name, task.seed, end) for task in plan(STUDIES) for end in task.ends}
    needed = {
        (row.run.name, seed, row.end)
        for study in STUDIES
        for row in study.rows
        for seed in range(study.seeds)
    }
    assert evaluated == needed


def test_the_order_is_that_of_worth() -> None:
    tasks = plan(STUDIES)
    main = {row.run.name for s in STUDIES if s.seeds == 5 for row in s.rows}
    names = ["main" if t.run.name in main else "study" for t in tasks]
    begun = names.index("study")
    ended = len(names) - names[::-1].index("study")
    assert {"main"} == set(names[:begun]) == set(names[ended:])
    assert [task.seed for task in tasks[:begun]] == [0] * 5 + [1] * 5 + [2] * 5
    assert {task.seed for task in tasks[ended:]} == {3, 4}
    order = {run: place for place, run in enumerate(task.run.name for task in tasks)}
    places = [
        max(order[row.run.name] for row in study.rows if row.run.name not in main)
        for study in STUDIES
        if study.seeds == 3 and study is not studies.AVERAGING
    ]
    assert places == sorted(places)


def test_fewer_seeds_and_single_studies() -> None:
    assert {task.seed for task in plan(STUDIES, 1)} == {0}
    tasks = plan([studies.EVERY], 2)
    assert [(task.run.name, task.seed) for task in tasks] == [
        (name, seed)
        for seed in (0, 1)
        for name in ("openvclip", "openvclip every 2", "openvclip every 4")
    ]
    assert {tuple(task.ends) for task in tasks} == {(AVERAGE,)}


def test_averages_beside_the_run_are_kept_for_the_seeds_of_their_study() -> None:
    ends = {task.seed: task.ends for task in plan(STUDIES) if task.run == studies.OPEN_VCLIP}
    beside = {row.end for row in studies.AVERAGING.rows} - {AVERAGE}
    assert len(beside) == 5
    assert {seed for seed, names in ends.items() if beside <= set(names)} == {0, 1, 2}
    assert set(ends[4]) == {LAST, AVERAGE}


def test_an_average_begins_and_repeats_in_epochs() -> None:
    model = nn.Linear(1, 1)
    tracker = Averaging(2, 0.5).tracker(model, steps_per_epoch=4)
    entered = [step for step in range(1, 17) if tracker.update(model)]
    assert entered == [10, 12, 14, 16]


def test_cost_counts_the_passes() -> None:
    """512 clips, 20 epochs: a step's backward pass counts twice its forward pass."""
    costs = {task.run.name: cost(FULL, task) for task in plan(STUDIES) if task.seed == 0}
    evaluated = 3 * 512 * 8
    assert costs["clip"] == 3 * 512
    assert costs["frames alone"] == 20 * 512 * 3 + evaluated
    assert costs["openvclip C 1"] == 20 * 512 * 3 * 2 + evaluated
    assert costs["openvclip every 4"] == 20 * 512 * 3 * 1.25 + evaluated


def test_work_comes_back_whole_from_workers_of_one_thread(tmp_path: Path) -> None:
    passed: list[float] = []
    numbers = list(range(5))
    squares = dict(side_by_side(square, numbers, 2, passed.append, tmp_path))
    assert squares == {number: (number**2, 1) for number in numbers}
    assert sum(passed) == sum(numbers)
    assert not active_children()


def test_a_worker_that_dies_ends_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "get_context", lambda _: CONTEXT)  # starts at once
    with pytest.raises(WorkError, match=r"died before 5000 was finished"):
        list(side_by_side(square, [5000], 1, lambda _: None, tmp_path))
    assert not active_children()
