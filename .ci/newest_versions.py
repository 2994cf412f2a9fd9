"""The dependencies of pyproject.toml without their bounds, and the versions that are installed.

``newest_versions.py names`` prints one requirement a line, for an installer. ``newest_versions.py
table`` prints a Markdown table: the newest version that passed the tests before, the upper bound,
and the installed version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("video", "examples", "test")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_-]+)(\[[^]]*\])?\s*(.*)")


def requirements() -> dict[str, str]:
    """Map each dependency that the tests use to its bounds, without the package itself."""
    try:
        tomllib: Any = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        tomllib = importlib.import_module("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    matches = [match for match in map(_REQUIREMENT.fullmatch, lines) if match]
    return {match[1]: match[3] for match in matches if match[1] != project["name"]}


def names() -> list[str]:
    """The requirements without bounds. A pinned tool ("==") keeps its version.

    open_clip is left out, because .ci/newest chooses where it comes from.
    """
    bounds = requirements()
    del bounds["open_clip_torch"]
    return [name + (bound if bound.startswith("==") else "") for name, bound in bounds.items()]


def tried() -> dict[str, str]:
    """The versions in constraints/newest.txt."""
    lines = (ROOT / "constraints" / "newest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def table() -> str:
    """A Markdown table of all versions; new versions are bold."""
    rows = ["| dependency | passed before | bounds | installed |", "| --- | --- | --- | --- |"]
    passed = tried()
    for name, bounds in requirements().items():
        installed = importlib.metadata.version(name)
        mark = "**" if name in passed and installed != passed[name] else ""
        rows.append(f"| {name} | {passed.get(name, '')} | {bounds} | {mark}{installed}{mark} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table() if sys.argv[1:] == ["table"] else "\n".join(names()))
