"""The project's own settings: dependencies and their oldest versions, the suite, the address."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SLOW
from tests.helpers import GOLDEN, REPO

try:
    tomllib = importlib.import_module("tomllib")
except ModuleNotFoundError:  # Python 3.10, where pytest depends on tomli
    tomllib = importlib.import_module("tomli")

ADDRESS = "https://github.com/openvclip/openvclip"
# Tools whose version has no effect on the results of the tests.
NOT_PINNED = {"ruff", "mypy", "openvclip"}
REQUIREMENT = re.compile(r"([A-Za-z0-9_-]+)(?:\[.*\])?\s*(.*)")


def settings() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded


# --- dependencies ------------------------------------------------------------------------------


def same_version(a: str, b: str) -> bool:
    """Trailing zeros do not count: 2.8 is 2.8.0."""
    first, second = ([int(part) for part in version.split(".")] for version in (a, b))
    length = max(len(first), len(second))
    return first + [0] * (length - len(first)) == second + [0] * (length - len(second))


def test_the_oldest_versions_are_those_that_the_package_allows() -> None:
    project = settings()["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *extras["video"],
        *extras["examples"],
        *extras["test"],
    ]
    allowed = {}
    for requirement in requirements:
        match = REQUIREMENT.fullmatch(requirement)
        assert match, requirement
        if match[1] not in NOT_PINNED:
            assert match[2].startswith(">="), requirement
            allowed[match[1]] = match[2].removeprefix(">=").split(",")[0]
    lines = (REPO / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned.keys() == allowed.keys()
    assert all(same_version(pinned[name], allowed[name]) for name in pinned)


def imported_packages(folder: Path) -> set[str]:
    """The packages that are imported anywhere in a folder, inside functions too."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names


def test_every_import_is_declared() -> None:
    """The project declares every package that it imports, also if a dependency requires it too."""
    modules = {"open_clip_torch": "open_clip"}
    project = settings()["project"]
    core = {REQUIREMENT.fullmatch(text)[1] for text in project["dependencies"]}  # type: ignore[index]
    optional = {"av", "PIL", "torchcodec", "transformers", "matplotlib", "webdataset"}
    foreign = imported_packages(REPO / "openvclip") - sys.stdlib_module_names - {"openvclip"}
    assert foreign - optional <= {modules.get(name, name) for name in core}


def test_one_address() -> None:
    urls = settings()["project"]["urls"]
    assert urls["Homepage"] == ADDRESS
    assert all(url.startswith((ADDRESS, "https://arxiv.org/")) for url in urls.values())
    assert f"repository-code: {ADDRESS}\n" in (REPO / "CITATION.cff").read_text(encoding="utf-8")


# --- the suite ---------------------------------------------------------------------------------


def test_every_test_has_a_time_limit(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) == 300


HANGING = """
import multiprocessing, subprocess, sys, threading, time

def test_sleep():
    time.sleep(60)

def test_subprocess():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])

def test_thread():
    thread = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    thread.start()
    thread.join()

def test_lock():
    multiprocessing.get_context("spawn").Lock().acquire()
    multiprocessing.get_context("spawn").Queue().get()

def test_next():
    pass
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_a_test_that_hangs_is_ended(processes: int, tmp_path: Path) -> None:
    """In the main process and in one of pytest-xdist's, and the tests after it run."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    flags = ["-q", "-p", "no:cacheprovider", "-n", str(processes), "--timeout", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, "-c", "/dev/null", "--rootdir", ".", "."],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout.count("Failed: Timeout") >= 4
    assert "4 failed, 1 passed" in done.stdout


def test_slow_tests_exist() -> None:
    """An entry of ``SLOW`` that no longer names a test would have no effect."""
    texts: dict[str, str] = {}
    for path in (REPO / "tests").rglob("test_*.py"):
        texts[path.name] = texts.get(path.name, "") + path.read_text(encoding="utf-8")
    for entry in SLOW:
        file, _, function = entry.partition("::")
        assert file in texts, entry
        assert not function or f"def {function}(" in texts[file], entry


def test_the_golden_files_are_small() -> None:
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    assert len(sizes) > 5
    assert sum(sizes) < 12e6
