"""The core tests by pytest, in processes of their own: ``pytest -m core --torch-device``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.device.checks import Setup
from tests.on_device import CORE, TESTS

PROCESSES = 5  # that share the device; most of a core test's time is spent in Python


def run(setup: Setup, subject: str) -> None:
    """Run the core tests of one subject.

    Raises:
        AssertionError: tests failed; the text has their number and their names.
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
    start_pytest([*command, *files], outcomes)
    report(outcomes)


def start_pytest(arguments: list[str], outcomes: Path) -> None:
    """Run pytest in a new process, which writes the outcome of each test to a file."""
    environment = os.environ | {"OPENVCLIP_OUTCOMES": str(outcomes)}
    subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False, env=environment)


def report(outcomes: Path) -> None:
    """Raise an error that names the tests that failed, if there are any."""
    found: dict[str, tuple[str, str]] = {}
    for line in outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []:
        test, outcome, text = json.loads(line)
        if found.get(test, ("", ""))[0] != "failed":
            found[test] = (outcome, text)
    counts = Counter(outcome for outcome, _ in found.values())
    failed = [f"{test}: {text}" for test, (outcome, text) in found.items() if outcome == "failed"]
    summary = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    print(summary or "no test ran", *failed, sep="\n")
    assert counts["passed"] > 0, "no test passed; see the log"
    assert not failed, f"{summary}: " + " | ".join(failed)


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
