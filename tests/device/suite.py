"""The core tests by pytest, in processes of their own: ``pytest -m core --torch-device``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.device.checks import GROUPS, Setup
from tests.on_device import CORE, TESTS

PROCESSES = 5  # that share the device; most of a core test's time is spent in Python
RESERVE = 20.0  # seconds of the group's limit for imports, and for the report after a cut


def run(setup: Setup, subject: str) -> None:
    """Run the core tests of one subject.

    Raises:
        AssertionError: tests failed, or did not end in time; the text has their number and names.
    """
    outcomes = setup.folder / f"core-{subject}.jsonl"
    files = [str(TESTS / file) for file in CORE[subject]]
    number = PROCESSES if _has("xdist") else 0
    command = ["-m", "core", "--torch-device", setup.device, "-p", "tests.device.outcomes"]
    # Warnings are no failures: the versions of this machine can have new ones.
    command += ["-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    # The options of pyproject.toml need pytest-xdist.
    command += ["-o", "addopts=--import-mode=importlib"]
    if number:
        command += ["-n", str(number), "--dist", "worksteal", "--max-worker-restart", "20"]
    cut = ""
    try:
        if setup.device == "cpu":
            start_pytest([*command, *files], outcomes)
        else:
            limit = next(group.seconds for group in GROUPS if group.name == f"core_{subject}")
            start_pytest([*command, *files], outcomes, limit - RESERVE)
    except subprocess.TimeoutExpired as error:
        cut = f"cut after {error.timeout:.0f} s, before all tests ran"
    report(outcomes, cut)


def start_pytest(arguments: list[str], outcomes: Path, limit: float | None = None) -> None:
    """Run pytest in a new process, which writes the outcome of each test to a file.

    Raises:
        subprocess.TimeoutExpired: pytest ran for ``limit`` seconds and was stopped.
    """
    environment = os.environ | {"OPENVCLIP_OUTCOMES": str(outcomes)}
    command = [sys.executable, "-m", "pytest", *arguments]
    subprocess.run(command, check=False, env=environment, timeout=limit)


def report(outcomes: Path, cut: str = "") -> None:
    """Raise an error that names the tests that failed, if there are any, or tells of a cut."""
    found: dict[str, tuple[str, str]] = {}
    for line in outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []:
        test, outcome, text = json.loads(line)
        if found.get(test, ("", ""))[0] != "failed":
            found[test] = (outcome, text)
    counts = Counter(outcome for outcome, _ in found.values())
    failed = [f"{test}: {text}" for test, (outcome, text) in found.items() if outcome == "failed"]
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    print(summary or "no test ran", cut, *failed, sep="\n")
    assert counts["passed"] > 0, f"no test passed; see the log. {cut}"
    problems = [*failed, cut] if cut else failed
    assert not problems, f"{summary}: " + " | ".join(problems)


def _has(plugin: str) -> bool:
    try:
        __import__(plugin)
    except ImportError:
        return False
    return True


def check_of(subject: str) -> Callable[[Setup], None]:
    """Return the check of one subject."""

    def core_tests(setup: Setup) -> None:
        run(setup, subject)

    return core_tests
