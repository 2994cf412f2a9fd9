"""A plugin of pytest: the outcome of each test as a line of ``$OPENVCLIP_OUTCOMES``.

A process whose device is unusable ends after the test that did it. pytest-xdist then starts another
process for the tests that are left.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.device.child import is_fatal

_unusable = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test, or of its set-up if the set-up fails."""
    global _unusable
    text = ""
    if report.failed:
        text = str(report.longrepr).strip().splitlines()[-1] if report.longrepr else "failed"
        crash: Any = getattr(report.longrepr, "reprcrash", None)
        text = str(crash.message) if crash is not None else text
        _unusable = _unusable or is_fatal(text)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that distributes the tests also gets the report
    if report.when == "call" or report.outcome != "passed":
        line = json.dumps([report.nodeid, report.outcome, " ".join(text.split())[:300]])
        with open(os.environ["OPENVCLIP_OUTCOMES"], "a", encoding="utf-8") as file:
            file.write(line + "\n")


def pytest_runtest_logfinish() -> None:
    """End a process that can't use its device any more."""
    if _unusable and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
