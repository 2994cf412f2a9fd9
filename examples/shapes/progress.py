"""Progress of a whole run: one bar over all phases, and the time to go.

The cost of a piece of work is the number of seconds that one process needs for it on the reference
machine, a virtual machine with 2 cores. Processes report the cost that they have done and the
seconds that they needed. :class:`Estimator` computes the speed of this machine in each phase from
these reports, and it computes the time to go from the speeds. Recent reports count most.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Literal, NamedTuple, get_args

from tqdm import tqdm

Phase = Literal["drawing", "starting", "decoding", "fine-tuning", "evaluating"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Costs = Mapping[Phase, float]
"""The cost of each phase of a task, in seconds of one process on the reference machine."""

DRAWING = "drawing clips"
"""The name of the task that draws all clips; it comes before the other tasks."""

MEASUREMENT = "measurement"
"""The name of the task that measures the speed of the machine; it comes before all other tasks."""

# The speed of a phase is a weighted mean: the reports of the phase have the weight of their cost,
# and the mean speed of all phases has this weight.
_PRIOR = 1.0
_HALF_LIFE = 20.0  # cost after which an old measurement counts half: the load of a machine changes
_LINE_SECONDS = 12.0  # seconds between two lines if the output is not a terminal


class Advance(NamedTuple):
    """A piece of work that a process has done.

    Attributes:
        task: name of the task.
        phase: phase of the task.
        cost: cost of the piece.
        seconds: wall-clock time that the process needed, ``None`` if the time was not measured.
    """

    task: str
    phase: Phase
    cost: float
    seconds: float | None


class Reporter:
    """Report the progress of one task from the process that works on the task.

    Args:
        task: name of the task.
        send: function that takes each :class:`Advance`.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        task: str,
        send: Callable[[Advance], object] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._task, self._send, self._clock = task, send, clock
        self._last = clock()

    def __call__(self, phase: Phase, cost: float) -> None:
        """Report a piece of work that took all the time since the last report."""
        now = self._clock()
        self._send(Advance(self._task, phase, cost, now - self._last))
        self._last = now

    def started(self, cost: float) -> None:
        """Report the start of the process without seconds, because they were not measured."""
        self._send(Advance(self._task, "starting", cost, None))


class Estimator:
    """Estimate the time to go from the work that was done so far.

    Args:
        measurement: cost of the measurement, which is done by one process.
        drawing: cost of drawing all clips, which all processes share.
        tasks: cost of each task by the task's name, in the order in which the tasks begin. One
            process works on a task.
        processes: number of processes.
    """

    def __init__(
        self, measurement: Costs, drawing: float, tasks: Mapping[str, Costs], processes: int
    ) -> None:
        first: dict[str, Costs] = {MEASUREMENT: measurement, DRAWING: {"drawing": drawing}}
        self._tasks = {**first, **tasks}
        self._processes = processes
        self._done: defaultdict[tuple[str, Phase], float] = defaultdict(float)
        self._costs: defaultdict[Phase, float] = defaultdict(float)  # of pieces that were timed
        self._seconds: defaultdict[Phase, float] = defaultdict(float)

    @property
    def total(self) -> float:
        """The cost of the whole run."""
        return sum(sum(costs.values()) for costs in self._tasks.values())

    @property
    def done(self) -> float:
        """The cost of the work that was done."""
        return self.total - sum(
            self._left(name, phase) for name, costs in self._tasks.items() for phase in costs
        )

    def add(self, advance: Advance) -> None:
        """Take a report into account."""
        self._done[advance.task, advance.phase] += advance.cost
        if advance.seconds is not None and advance.cost > 0:
            weight = 0.5 ** (advance.cost / _HALF_LIFE)
            for sums, value in ((self._costs, advance.cost), (self._seconds, advance.seconds)):
                sums[advance.phase] = weight * sums[advance.phase] + value

    def finish(self, task: str) -> None:
        """Count a task as done, even if its reports do not add up to its cost."""
        for phase, cost in self._tasks[task].items():
            self._done[task, phase] = cost

    def seconds_to_go(self) -> float | None:
        """Return the estimated time to the end of the run, ``None`` before the first report."""
        if not self._costs:
            return None
        measurement, drawing, *others = (self._seconds_left(name) for name in self._tasks)
        return measurement + drawing / self._processes + _duration(others, self._processes)

    def _seconds_left(self, task: str) -> float:
        return sum(
            self._left(task, phase) * self._seconds_per_cost(phase) for phase in self._tasks[task]
        )

    def _left(self, task: str, phase: Phase) -> float:
        return max(self._tasks[task][phase] - self._done[task, phase], 0.0)

    def _seconds_per_cost(self, phase: Phase) -> float:
        overall = sum(self._seconds.values()) / sum(self._costs.values())
        return (self._seconds[phase] + _PRIOR * overall) / (self._costs[phase] + _PRIOR)


def _duration(tasks: Sequence[float], processes: int) -> float:
    """The time in which processes finish tasks if a free process takes the next task."""
    free_at = [0.0] * processes
    for seconds in tasks:
        heappush(free_at, heappop(free_at) + seconds)
    return max(free_at)


class Progress:
    """Show the progress of a run: a bar on a terminal, otherwise a line every 12 seconds.

    Args:
        estimator: estimator of the work that was done and of the time to go.
        clock: returns the time in seconds.
    """

    def __init__(
        self, estimator: Estimator, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.estimator, self._clock = estimator, clock
        self._started = self._reported = clock()
        self._line_at = self._started + 3
        self._phase = "measuring"
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        layout = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        self._bar = tqdm(total=estimator.total, desc=self._phase, bar_format=layout, disable=None)

    def __enter__(self) -> Progress:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._ticker.join()
        self._bar.close()

    def add(self, advance: Advance) -> None:
        """Take a report of a process into account."""
        with self._lock:
            self.estimator.add(advance)
            self._reported = self._clock()
            self._phase = "measuring" if advance.task == MEASUREMENT else advance.phase

    def finish(self, task: str, text: str = "") -> None:
        """Count a task as done and print a text together with the time to go."""
        with self._lock:
            self.estimator.finish(task)
            self._reported = self._clock()
            if text:
                self._print(f"{text}; {self.time_to_go()}")
            self.show()

    def time_to_go(self) -> str:
        """The time to go in words."""
        seconds = self.estimator.seconds_to_go()
        if seconds is None:
            return "time to go not known yet"
        return f"about {duration(max(seconds - (self._clock() - self._reported), 0.0))} to go"

    def show(self) -> None:
        """Refresh the bar. If the output is not a terminal, print a line every 12 seconds."""
        with self._lock:
            estimator = self.estimator
            if not self._bar.disable:
                self._bar.n = min(estimator.done, estimator.total)
                self._bar.set_description_str(self._phase, refresh=False)
                self._bar.set_postfix_str(self.time_to_go(), refresh=True)
            elif self._clock() >= self._line_at:
                self._line_at = self._clock() + _LINE_SECONDS
                passed = duration(self._clock() - self._started)
                share = 100 * estimator.done / estimator.total
                self._print(f"{share:3.0f} % in {passed}, {self.time_to_go()} ({self._phase})")

    def _print(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _tick(self) -> None:
        while not self._stopped.wait(0.5):
            self.show()


def duration(seconds: float) -> str:
    """A number of seconds in words: ``"40 s"``, ``"3 min 20 s"`` or ``"1 h 50 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
