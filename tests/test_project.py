"""The project's own settings: dependencies and their oldest versions, the suite, the address."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.conftest import SLOW
from tests.forked import started
from tests.helpers import GOLDEN, REPO

try:
    tomllib = importlib.import_module("tomllib")
except ModuleNotFoundError:  # Python 3.10, where pytest depends on tomli
    tomllib = importlib.import_module("tomli")

ADDRESS = "https://github.com/openvclip/openvclip"
# Tools whose version has no effect on the results of the tests.
NOT_PINNED = {"ruff", "mypy", "openvclip"}
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
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


def later(a: str, b: str) -> bool:
    return [int(part) for part in a.split(".")] > [int(part) for part in b.split(".")]


def pins(name: str) -> dict[str, str]:
    """The versions in ``constraints/NAME.txt``."""
    lines = (REPO / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


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
    pinned = pins("oldest")
    assert pinned.keys() == allowed.keys()
    assert all(same_version(pinned[name], allowed[name]) for name in pinned)


# Libraries that break in minor versions, or whose next major version passed the tests before its
# release (open_clip 4.2.0.dev0). For all others the next major version is excluded.
OTHER_UPPER_BOUNDS = {"timm": "1.1", "open_clip_torch": "5"}


def bounds() -> dict[str, str]:
    """Map each direct dependency to its bounds; tools with a pinned version are left out."""
    project = settings()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    matches = [REQUIREMENT.fullmatch(text) for group in groups for text in group]
    found = {match[1]: match[2] for match in matches if match}
    assert len(matches) == sum(match is not None for match in matches)
    return {name: text for name, text in found.items() if name not in NOT_PINNED}


def test_every_dependency_has_both_bounds() -> None:
    """Report 51: open_clip 4 would break each new install of a version without an upper bound."""
    newest = pins("newest")
    assert newest.keys() == bounds().keys()
    for name, text in bounds().items():
        both = re.fullmatch(r">=([0-9.]+),<([0-9.]+)", text)
        assert both, f"{name}{text}: expected a lower and an upper bound, '>=1.2,<3'"
        major = int(newest[name].split(".")[0])
        assert both[2] == OTHER_UPPER_BOUNDS.get(name, str(major + 1)), name
    for name, oldest in pins("oldest").items():
        assert not later(oldest, newest[name]), f"{name}: oldest.txt is newer than newest.txt"


def test_the_newest_versions_are_asked_for_without_bounds() -> None:
    """The requirements that .ci/newest installs, and its table."""
    module = runpy.run_path(str(REPO / ".ci" / "newest_versions.py"))
    names = module["names"]()
    assert {"torch", "timm", "transformers", "pytest"} <= set(names)
    assert "open_clip_torch" not in names
    assert all(name.partition("==")[0] in NOT_PINNED for name in names if "=" in name)
    assert re.search(r"\| open_clip_torch \| [0-9.]+ \| >=3.1,<5 \| \S+ \|", module["table"]())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_files_that_exist(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["name"]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 40
        commands = [step["run"] for step in job["steps"] if "run" in step]
        scripts = [word for text in commands for word in text.split() if word.startswith(".ci/")]
        assert all((REPO / script).is_file() for script in scripts)


def test_newest_versions_are_tried_each_week() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((WORKFLOWS[0].parent / "newest.yml").read_text(encoding="utf-8"))
    triggers = workflow[True]  # YAML 1.1 reads the key "on" as true
    assert [len(entry["cron"].split()) for entry in triggers["schedule"]] == [5]
    job = workflow["jobs"]["newest"]
    assert job["strategy"]["matrix"] == {"open_clip": ["released", "development"]}
    script = (REPO / ".ci" / "newest").read_text(encoding="utf-8")
    assert all(f"\n{kind})" in script for kind in job["strategy"]["matrix"]["open_clip"])
    assert "tests/towers/test_library_names.py" in script


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
    optional |= {"fsspec", "onnxruntime", "onnxscript", "pyarrow", "torchao"}
    optional |= {"gradio", "starlette", "uvicorn", "vl_convert"}
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


def test_forks_have_the_package_imported(tmp_path: Path) -> None:
    """A second list of modules to preload would take the place of the first, for all tests."""
    texts = [path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py")]
    assert sum(text.count("." + "set_forkserver_preload(") for text in texts) == 1
    with started(_report_imports, log=tmp_path / "log") as process:
        process.join(120)
    names = set((tmp_path / "log").read_text().split())
    assert set(preloaded.MODULES) <= names


def _report_imports() -> None:
    print(*sys.modules, flush=True)


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
