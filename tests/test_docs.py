"""The code on the documentation's pages runs, and the README names what there is."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import openvclip
from tests.helpers import REPO
from tests.test_architecture import ARROWS

DATABASES = ("faiss", "lancedb")  # no dependencies: their code runs if they are installed
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
        others = re.findall(rf"^import ({'|'.join(DATABASES)})$", block, re.MULTILINE)
        if not all(map(find_spec, others)):
            continue
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [REPO / "README.md", REPO / "docs" / "index.md"])
def test_names_on_the_front_pages_exist(page: Path) -> None:
    names = set(re.findall(r"\bopenvclip\.([A-Za-z_]+)\(", page.read_text()))
    assert names
    assert names <= set(openvclip.__all__)


# --- docs/contributing.md ----------------------------------------------------------------------

MAP = (REPO / "docs" / "contributing.md").read_text(encoding="utf-8")


def test_the_table_of_rooms_is_the_one_that_is_checked() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", MAP, re.MULTILINE)
    table = {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}
    assert table == {room: imports for room, imports in ARROWS.items() if room != "__main__"}


def test_the_seven_walks_name_files_and_tables_that_exist() -> None:
    walks = re.findall(r"^## An? ([^\n]+)\n(.*?)(?=^## |\Z)", MAP, re.MULTILINE | re.DOTALL)
    assert len(walks) == 7
    for title, text in walks:
        paths = re.findall(r"`((?:openvclip|tests)/[\w./]+)`", text)
        existing = [path for path in paths if "my_" not in path]
        assert len(existing) >= 2, title
        assert [path for path in existing if not (REPO / path).exists()] == [], title
        for table, path in re.findall(r"`(\w+)` (?:of|in|\()\s*`([\w./]+\.py)`", text):
            assert re.search(rf"\b{table}\b", (REPO / path).read_text(encoding="utf-8")), table
