"""The progress of the shapes world: the bar moves in every phase, and the time to go is right."""

from __future__ import annotations

import pytest

from examples.shapes.experiment import phase_costs
from examples.shapes.progress import (
    DRAWING,
    MEASUREMENT,
    PHASES,
    Advance,
    Costs,
    Estimator,
    Phase,
    Progress,
    Reporter,
    duration,
)
from examples.shapes.settings import FULL
from examples.shapes.studies import QUICK, plan


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _quick_costs(processes: int) -> dict[str, Costs]:
    return {
        str(task): phase_costs(FULL, task, first=number < processes)
        for number, task in enumerate(plan([QUICK]))
    }


def _simulate(
    drawing: float, tasks: dict[str, Costs], processes: int, slowness: dict[Phase, float]
) -> list[tuple[float, Advance]]:
    """Every report of a run in pieces of at most one second, with the time at which it comes."""
    reports: list[tuple[float, Advance]] = []
    pieces = 40
    seconds = drawing * slowness["drawing"] / pieces
    for number in range(1, pieces + 1):
        advance = Advance(DRAWING, "drawing", drawing / pieces, seconds)
        reports.append((number * seconds / processes, advance))
    free_at = [drawing * slowness["drawing"] / processes] * processes
    for name, costs in tasks.items():
        free_at.sort()
        now = free_at[0]
        for phase, cost in costs.items():
            for _ in range(pieces if cost else 0):
                seconds = cost / pieces * slowness[phase]
                now += seconds
                reports.append((now, Advance(name, phase, cost / pieces, seconds)))
        free_at[0] = now
    return sorted(reports, key=lambda report: report[0])


SPEEDS: list[dict[Phase, float]] = [
    dict.fromkeys(PHASES, 1.0),
    dict.fromkeys(PHASES, 0.4),
    dict.fromkeys(PHASES, 5.0),
    {**dict.fromkeys(PHASES, 1.0), "fine-tuning": 1.25, "evaluating": 0.8},
]


@pytest.mark.parametrize("slowness", SPEEDS, ids=["as fast", "faster", "slower", "other ratios"])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_estimate_is_right_within_30_percent_after_a_tenth_of_the_work(
    processes: int, slowness: dict[Phase, float]
) -> None:
    tasks, drawing = _quick_costs(processes), 20.0
    estimator = Estimator({}, drawing, tasks, processes)
    reports = _simulate(drawing, tasks, processes, slowness)
    end = reports[-1][0]
    checked = 0
    for now, advance in reports:
        estimator.add(advance)
        if estimator.done >= 0.1 * estimator.total and now < 0.9 * end:
            to_go = estimator.seconds_to_go()
            assert to_go is not None
            assert to_go == pytest.approx(end - now, rel=0.3)
            checked += 1
    assert checked > 50
    assert estimator.done == pytest.approx(estimator.total)
    assert estimator.seconds_to_go() == pytest.approx(0, abs=1e-6)


def test_the_estimate_counts_the_tasks_that_wait_for_a_free_process() -> None:
    tasks: dict[str, Costs] = {"short": {"fine-tuning": 10}, "long": {"fine-tuning": 40}}
    for processes, expected in ((1, 50), (2, 40), (4, 40)):
        estimator = Estimator({}, 0, tasks, processes)
        estimator.add(Advance("short", "evaluating", 1, 1))
        assert estimator.seconds_to_go() == pytest.approx(expected)


def test_the_measurement_sets_the_speed_of_phases_that_have_not_begun() -> None:
    measurement: Costs = {"starting": 2, "fine-tuning": 1}
    estimator = Estimator(measurement, 100, {"run": {"fine-tuning": 60}}, 2)
    estimator.add(Advance(MEASUREMENT, "starting", 2, 2))
    assert estimator.seconds_to_go() == pytest.approx(1 + 50 + 60)
    estimator.add(Advance(MEASUREMENT, "fine-tuning", 1, 3))
    estimator.add(Advance(DRAWING, "drawing", 50, 50))
    assert estimator.seconds_to_go() == pytest.approx(25 + 60 * 3, rel=0.3)


def test_a_changed_load_of_the_machine_changes_the_estimate() -> None:
    estimator = Estimator({}, 0, {"run": {"fine-tuning": 500}}, 1)
    for number in range(1, 301):
        estimator.add(Advance("run", "fine-tuning", 1, 1 if number > 200 else 4))
    assert estimator.seconds_to_go() == pytest.approx(200, rel=0.15)  # the mean would give 600


def test_no_time_is_given_before_something_was_measured() -> None:
    estimator = Estimator({}, 10, {"run": {"starting": 5, "fine-tuning": 10}}, 1)
    assert estimator.seconds_to_go() is None
    estimator.add(Advance("run", "starting", 5, None))
    assert estimator.seconds_to_go() is None
    assert estimator.done == 5
    estimator.add(Advance(DRAWING, "drawing", 5, 10))
    assert estimator.seconds_to_go() == pytest.approx(2 * (5 + 10))


def test_work_beyond_the_plan_does_not_count_and_a_finished_task_counts_as_a_whole() -> None:
    estimator = Estimator({}, 0, {"run": {"decoding": 4, "fine-tuning": 6}}, 1)
    estimator.add(Advance("run", "decoding", 40, 40))
    estimator.add(Advance("run", "evaluating", 40, 40))
    assert (estimator.done, estimator.total) == (4, 10)
    estimator.finish("run")
    assert (estimator.done, estimator.seconds_to_go()) == (10, 0)


def test_a_reporter_measures_the_time_between_its_reports() -> None:
    clock, sent = Clock(), list[Advance]()
    report = Reporter("run", sent.append, clock)
    report.started(3.0)
    clock.now = 2.0
    report("decoding", 1.0)
    clock.now = 5.0
    report("fine-tuning", 4.0)
    assert sent == [
        Advance("run", "starting", 3.0, None),
        Advance("run", "decoding", 1.0, 2.0),
        Advance("run", "fine-tuning", 4.0, 3.0),
    ]


def test_without_a_terminal_a_line_comes_every_12_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    progress = Progress(Estimator({}, 0, {"run": {"fine-tuning": 100}}, 1), clock)
    lines: list[tuple[float, str]] = []
    for second in range(61):
        clock.now = float(second)
        if second:
            progress.add(Advance("run", "fine-tuning", 1, 1))
        progress.show()
        lines += [(second, line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        (
            second,
            f"{second:3.0f} % in {second} s, about {duration(100 - second)} to go (fine-tuning)",
        )
        for second in (3, 15, 27, 39, 51)
    ]


def test_the_time_to_go_falls_between_two_reports() -> None:
    clock = Clock()
    progress = Progress(Estimator({}, 0, {"run": {"fine-tuning": 100}}, 1), clock)
    assert progress.time_to_go() == "time to go not known yet"
    progress.add(Advance("run", "fine-tuning", 10, 10))
    assert progress.time_to_go() == "about 1 min 30 s to go"
    clock.now = 5.0
    assert progress.time_to_go() == "about 1 min 25 s to go"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (6600, "1 h 50 min")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
