"""Processes that run groups: side by side or one after the other, each with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.device import child
from tests.device.checks import Group, Setup

MODULE = "tests.device.child"
NOT_RUN = "not run: no time left"
RESTARTS = 10  # new processes for a group whose processes end too early


class Job:
    """A group and the processes that run its checks, one at a time.

    Attributes:
        group: the group.
        events: the file of events, see :mod:`tests.device.child`.
        note: why checks did not run; empty if all ran.
    """

    def __init__(self, group: Group, setup: Setup, environment: dict[str, str]) -> None:
        self.group, self.setup, self.environment = group, setup, environment
        self.events = setup.folder / f"{group.name}.events"
        self.log = setup.folder / f"{group.name}.log"
        self.note = ""
        self.started, self.seconds = 0.0, 0.0
        self._limit = group.seconds
        self._restarts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Start the process, which imports the group and waits."""
        group, fields = asdict(self.group), asdict(self.setup)
        fields["folder"] = str(self.setup.folder)
        arguments = [json.dumps(group), str(self.events), json.dumps(fields)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def go(self, limit: float) -> None:
        """Let the process run its checks, for at most ``limit`` seconds."""
        if self._process is None:
            self.prepare()
        if not self.started:
            self.started, self._limit = time.monotonic(), limit
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # if the import failed, poll() reports it
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    def poll(self) -> bool:
        """Return whether the group is at its end. Ends it at its time limit."""
        assert self._process is not None
        self.seconds = time.monotonic() - self.started
        status = self._process.poll()
        if status is None and self.seconds > self._limit:
            self.stop(f"cut after {self.seconds:.0f} s, its time limit")
            return True
        hangs = status is None and self._silence() > self.group.check_seconds
        if status is None and not hangs:
            return False
        self.kill()
        if status == 0:
            return True
        end = f"ended with status {status}"
        if hangs:
            end = f"was killed, because a check took more than {self.group.check_seconds:.0f} s"
        reason = f"the process {end}; the end of its log:\n{self._log_end()}"
        unfinished = self._close_unfinished(reason) or status == child.UNUSABLE
        if not unfinished or self._restarts == RESTARTS:
            self._fail_if_nothing_ended(reason)
            self.note = reason
            return True
        self._restarts += 1
        self.prepare()
        self.go(self._limit)
        return False

    def stop(self, reason: str) -> None:
        """End the group: the check that runs has failed, later checks do not run."""
        self.kill()
        self._close_unfinished(f"still running at the end: {reason}")
        self._fail_if_nothing_ended(reason)
        self.note = reason

    def kill(self) -> None:
        """Kill the process and all processes that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()

    def results(self) -> dict[str, Any]:
        """Return the results of the checks that ran, as in the JSON file."""
        return group_results(self.group, self.events, self.seconds, self.note)

    def _close_unfinished(self, reason: str) -> bool:
        """Let the check that started and did not end fail; return whether there is one."""
        open_checks: dict[str, None] = {}
        for event in child.read(self.events):
            if event["event"] == "started":
                open_checks[event["check"]] = None
            elif event["event"] == "ended":
                open_checks.pop(event["check"], None)
        for name in open_checks:
            result = {"outcome": "failed", "reason": reason, "seconds": 0.0}
            child.write(self.events, event="ended", check=name, **result)
        return bool(open_checks)

    def _fail_if_nothing_ended(self, reason: str) -> None:
        """Let a group fail of which no check ran, for example because its import failed."""
        if not child.results(self.events):
            result = {"outcome": "failed", "reason": reason[:2000], "seconds": 0.0}
            child.write(self.events, event="ended", check="start", **result)

    def _silence(self) -> float:
        """Return the seconds since the last event, or 0 before the first."""
        if not self.events.exists():
            return 0.0
        return time.time() - self.events.stat().st_mtime

    def _log_end(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-600:]


def group_results(group: Group, events: Path, seconds: float, note: str) -> dict[str, Any]:
    """Return the results of a group as they are in the JSON file."""
    return {
        "group": group.name,
        "kind": group.kind,
        "seconds": round(seconds, 1),
        "note": note,
        "checks": child.results(events),
    }


def side_by_side(
    jobs: Sequence[Job], left: Callable[[], float], ended: Callable[[Job], None]
) -> None:
    """Run jobs at the same time. ``left`` gives the seconds that are left for all."""
    running = list(jobs)
    for job in running:
        job.prepare()
    for job in running:
        job.go(min(job.group.seconds, left()))
    _wait(running, ended)


def in_turn(jobs: Sequence[Job], left: Callable[[], float], ended: Callable[[Job], None]) -> None:
    """Run jobs one after the other. Each process imports while the one before it runs."""
    for job, following in zip(jobs, [*jobs[1:], None], strict=True):
        if left() <= 0:
            job.kill()
            job.note = NOT_RUN
            ended(job)
            continue
        job.go(min(job.group.seconds, left()))
        if following is not None:
            following.prepare()
        _wait([job], ended)


def _wait(running: list[Job], ended: Callable[[Job], None]) -> None:
    try:
        while running:
            time.sleep(0.05)
            for job in list(running):
                if job.poll():
                    running.remove(job)
                    ended(job)
    except BaseException:
        for job in running:
            job.stop("interrupted")
            ended(job)
        raise
