"""Run the checks of one group and write what happens, one line of JSON for each event.

    python -m tests.device.child GROUP EVENTS SETUP

The process imports the group, waits for a line on its standard input, and then runs each check that
has no result in the file of events yet. A check that leaves the device unusable ends the process
with the exit status :data:`UNUSABLE`; a new process runs the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.device.checks import Check, Group, Setup, Skip

UNUSABLE = 75
# After these errors, every further call of the process fails.
_FATAL = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "CUDA error: the launch timed out",
    "uncorrectable",
)


def is_fatal(text: str) -> bool:
    """Return whether an error with this text leaves the device unusable for its process."""
    return any(words in text for words in _FATAL)


def run_checks(
    checks: list[Check], setup: Setup, events: Path, left: Callable[[], float] = lambda: 1.0
) -> bool:
    """Run the checks without a result, until no time is left.

    Args:
        checks: the checks.
        setup: what the checks get.
        events: the file of events.
        left: gives the seconds that are left. A check that has started is not stopped.

    Returns:
        False if a check left the device unusable; the checks after it did not run.
    """
    done = {event["check"] for event in read(events) if event["event"] == "ended"}
    for check in checks:
        if check.name in done:
            continue
        if left() <= 0:
            break
        write(events, event="started", check=check.name)
        result, usable = run_check(check, setup, events)
        write(events, event="ended", check=check.name, **result)
        if not usable:
            return False
    return True


def run_check(check: Check, setup: Setup, events: Path) -> tuple[dict[str, Any], bool]:
    """Run a check and write its figures; return its outcome, and if the device is still usable."""
    text, outcome, usable = "", "passed", True
    start = time.perf_counter()
    try:
        for figure in check(setup):
            write(events, event="figure", check=check.name, figure=asdict(figure))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a skip of pytest is no Exception
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, Skip) or type(error).__name__ == "Skipped":
            outcome, text = "skipped", str(error)
        else:
            outcome, usable = "failed", not is_fatal(text)
            traceback.print_exc()
    seconds = round(time.perf_counter() - start, 2)
    return {"outcome": outcome, "reason": text[:2000], "seconds": seconds}, usable


def results(events: Path) -> list[dict[str, Any]]:
    """Return the results of the checks that ended, with their figures."""
    ended: list[dict[str, Any]] = []
    figures: dict[str, list[dict[str, Any]]] = {}
    for event in read(events):
        if event["event"] == "figure":
            figures.setdefault(event["check"], []).append(event["figure"])
        elif event["event"] == "ended":
            keys = ("check", "outcome", "reason", "seconds")
            ended.append({key: event[key] for key in keys})
    return [{**result, "figures": figures.get(result["check"], [])} for result in ended]


def write(events: Path, **event: Any) -> None:
    """Append an event."""
    with events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def read(events: Path) -> Iterator[dict[str, Any]]:
    """Read the events; the last line can be cut if its process was killed."""
    if not events.exists():
        return
    for line in events.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def main() -> None:
    """Run one group, see the docstring of the module."""
    group, events, setup = sys.argv[1:]
    fields = json.loads(setup)
    checks = Group(**json.loads(group)).checks(small=fields["small"])
    print("imported", flush=True)
    if sys.stdin.readline():
        ready = Setup(**{**fields, "folder": Path(fields["folder"])})
        usable = run_checks(checks, ready, Path(events))
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads and a device in any state can keep an interpreter from ending.
        os._exit(0 if usable else UNUSABLE)


if __name__ == "__main__":
    main()
