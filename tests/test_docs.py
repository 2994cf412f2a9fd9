"""The code on the documentation's pages runs, and the README names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import openvclip
from tests.helpers import REPO

PAGES = sorted((REPO / "docs").glob("*.md"))


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_pages_with_code() -> None:
    assert sum(len(_blocks(page)) for page in PAGES) >= 5


@pytest.mark.parametrize("page", [p for p in PAGES if _blocks(p)], ids=lambda p: p.stem)
def test_code_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(_blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [REPO / "README.md", REPO / "docs" / "index.md"])
def test_names_on_the_front_pages_exist(page: Path) -> None:
    names = set(re.findall(r"\bopenvclip\.([A-Za-z_]+)\(", page.read_text()))
    assert names
    assert names <= set(openvclip.__all__)
