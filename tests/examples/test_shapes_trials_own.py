"""A reader's own method in the comparison: the example, and functions whose code changed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from examples.shapes.trials.cells import cell
from examples.shapes.trials.clips import load_list
from examples.shapes.trials.codes import digest
from examples.shapes.trials.registry import METHODS, TRAININGS
from examples.shapes.trials.runner import Runner
from examples.shapes.trials.tasks import Place
from examples.shapes.trials.workshop import Workshop
from tests.examples.trial_results import SMALL as SIZES
from tests.examples.trial_results import tables_as_before

OWN = """
from functools import partial
from examples.shapes.trials.registry import Method, Training, register

def mixed(clip, runs, *, share):
    tuned = runs["plain"]["last"]
    return {name: clip[name] + share * (tuned[name] - clip[name]) for name in tuned}

register(Method("mine", ("plain",), partial(mixed, share=0.5), lams=(0.0,)))
"""


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The tables of methods as they were, after each test."""
    with tables_as_before():
        yield
    for name in ("examples.shapes.own_method", "mine"):  # registers its rows when it is imported
        sys.modules.pop(name, None)


def own_method() -> ModuleType:
    return importlib.import_module("examples.shapes.own_method")


def test_the_example_is_short_and_its_functions_work(tmp_path: Path) -> None:
    module = own_method()
    text = Path(str(module.__file__)).read_text()
    assert len(text.splitlines()) <= 60
    assert {"my loss", "my merge"} <= set(METHODS)
    clip = {"w": torch.zeros(4)}
    tuned = {"w": torch.tensor([0.1, -3.0, 2.0, 0.2])}
    merged = module.trimmed(clip, {"plain": {"last": tuned}}, keep=0.5)
    assert merged["w"].tolist() == [0.0, -3.0, 2.0, 0.0]
    clips = load_list(cell(0), "train", 6, tmp_path)
    workshop = Workshop(cell(0), clips, 2, 4, 0)
    settings = module.GRID[0]
    trained = TRAININGS["smoothed"](workshop, settings)
    moved = [n for n, v in trained.ends["last"].items() if not torch.equal(v, workshop.clip[n])]
    assert "visual.proj" in moved
    assert not any(name.startswith(("transformer.", "token_embedding.")) for name in moved)


def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run the comparison of a module with this code, whose tasks are done at once."""
    for name in ("mine", "other"):
        METHODS.pop(name, None)
    sys.modules.pop("mine", None)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "mine.py").write_text(code)
    importlib.invalidate_caches()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.import_module("mine")
    Runner(Place(tmp_path / "out", replace(SIZES, cells=1)), ("mine",), choices={}).run()


def with_a_result(out: Path) -> None:
    """Add a row of the method to the results file of a run."""
    results = json.loads((out / "results.json").read_text())
    row = {"settings": {}, "points": []}
    results["cells"]["0"] = {"trainings": {}, "methods": {"mine": row}}
    (out / "results.json").write_text(json.dumps(results))


END = """
from examples.shapes.trials.registry import Method, first_end, register
register(Method("mine", ("plain",), first_end("last"), lams=(0.0,)))
"""


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        (OWN, "share * (tuned", "2 * share * (tuned"),
        (OWN, "share=0.5", "share=0.25"),
        (END, '"last"', '"swa"'),
        (END, '("plain",)', '("iwr",)'),
    ],
    ids=["body", "numbers", "end", "trainings"],
)
def test_a_function_whose_code_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, old: str, new: str
) -> None:
    run_with(tmp_path, monkeypatch, code)
    with_a_result(tmp_path / "out")
    run_with(tmp_path, monkeypatch, code.replace("    tuned = ", "    # a comment\n\n    tuned = "))
    changed = code.replace(old, new)
    with pytest.raises(
        FileExistsError, match=r"results of the method 'mine' with other code\. Giv"
    ):
        run_with(tmp_path, monkeypatch, changed)
    run_with(tmp_path / "elsewhere", monkeypatch, changed)


def test_a_function_without_results_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that failed is mended, and the same command tries it again."""
    run_with(tmp_path, monkeypatch, OWN)
    changed = OWN.replace("share=0.5", "share=0.25")
    run_with(tmp_path, monkeypatch, changed)
    with_a_result(tmp_path / "out")
    run_with(tmp_path, monkeypatch, changed)
    with pytest.raises(FileExistsError, match="with other code"):
        run_with(tmp_path, monkeypatch, OWN)


def test_the_code_of_a_function_is_known_by_its_source() -> None:
    def first() -> int:
        return 1

    def made() -> Callable[[], int]:
        def inner() -> int:
            return 1

        return inner

    # Two objects of the same code, as in two processes.
    assert digest(partial(first, made())) == digest(partial(first, made()))

    assert digest(first) == digest(first)
    assert digest(first) != digest(lambda: 1) != ""
    assert digest(len) == ""  # written in C
