"""The single-file examples: each imports openvclip and nothing beside it, and does what it says."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from openvclip import cli
from tests.examples.single_files import CLASSES, FRAMES, rows_of
from tests.examples.tiny_videos import model_flags
from tests.forked import run_by_path, started
from tests.helpers import REPO

SCRIPTS = ("open_vclip", "finetune_image_clip", "merge_two_finetunes", "sweep_and_plot")
INSTALLED = {"openvclip", "torch", "torchvision", "open_clip", "numpy", "tqdm", "PIL"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_one_short_file_that_imports_installed_packages_alone(name: str) -> None:
    path = REPO / "examples" / f"{name}.py"
    text = path.read_text()
    assert len(text.splitlines()) < 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - INSTALLED <= sys.stdlib_module_names


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_option_with_a_default_states_the_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"examples.{name}")
    actions: list[argparse.Action] = []
    with pytest.MonkeyPatch.context() as patch:
        add = argparse.ArgumentParser.add_argument

        def record(self: Any, *args: Any, **kwargs: Any) -> argparse.Action:
            actions.append(add(self, *args, **kwargs))
            return actions[-1]

        patch.setattr(argparse.ArgumentParser, "add_argument", record)
        with pytest.raises(SystemExit):
            module.main(["--help"])
    assert "λ" in capsys.readouterr().out
    for action in actions:
        stated = "default: " in (action.help or "")
        automatic = action.dest in ("help", "device") or action.default in (None, [], False)
        assert stated or automatic or action.required, action.dest


def test_an_example_runs_in_an_empty_folder(clips: Path, tmp_path: Path) -> None:
    """Then the printed command predicts with the model that was written."""
    empty, log = tmp_path / "empty", tmp_path / "log"
    empty.mkdir()
    options = [*model_flags(), *FRAMES, "--videos", str(clips / "closed"), "--out", "run"]
    options += ["--epochs", "2", "--batch-size", "4", "--lr", "1e-3"]
    with started(run_by_path, str(empty), "open_vclip", options, log=log) as process:
        process.join(120)
        text = log.read_text()
    assert process.exitcode == 0, text
    assert "12 training videos, 3 held out" in text
    assert set(rows_of(text)) >= {"0", "0.5", "1"}
    command = shlex.split(text.splitlines()[-1])
    assert command[:2] == ["openvclip", "predict"]
    command = [str(empty / part) if f"{part}/".startswith("run/") else part for part in command]
    with started(_predict, command[1:], log=tmp_path / "predicted") as process:
        process.join(120)
        answer = (tmp_path / "predicted").read_text()
    assert process.exitcode == 0, answer
    assert all(name in answer for name in CLASSES)


def _predict(arguments: list[str]) -> None:
    raise SystemExit(cli.main(arguments))


def test_the_readme_lists_every_example_and_no_other() -> None:
    folder = REPO / "examples"
    named = set(re.findall(r"\]\((?!\.\.)([^)#]+)\)", (folder / "README.md").read_text()))
    assert all((folder / path).exists() for path in named)
    scripts = {*folder.glob("*.py"), *folder.glob("*.ipynb"), *folder.glob("loops/*.py")}
    expected = {str(path.relative_to(folder)) for path in scripts if path.stem != "__init__"}
    assert named == expected | {"shapes/", "shapes/own_method.py"}
