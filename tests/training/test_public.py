"""The public face of openvclip.training, and what importing it costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from openvclip import training
from tests.helpers import REPO

OPTIONAL = ("webdataset", "tensorboard", "av", "transformers", "tqdm", "matplotlib", "open_clip")


def packages_after(*codes: str) -> list[set[str]]:
    """The packages that a new process has loaded after each of some pieces of code."""
    report = "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    code = "\n".join(["import json, sys", *(f"{code}\n{report}" for code in codes)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
    )
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_importing_the_room_adds_no_optional_dependency() -> None:
    """Torch itself loads tqdm if tqdm is installed."""
    rooms = "import torch, openvclip.prompting, openvclip.evaluation"
    modules = (
        "import importlib, pkgutil, openvclip.training as room\n"
        "for module in pkgutil.iter_modules(room.__path__):\n"
        "    importlib.import_module(f'openvclip.training.{module.name}')"
    )
    before, after = packages_after(rooms, modules)
    assert not (after - before) & {*OPTIONAL}


def test_the_index_command_starts_without_a_warning() -> None:
    """Python warns if the package has imported the module that it runs as a command."""
    command = [sys.executable, "-W", "error", "-m", "openvclip.training.shards", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert "PATTERN" in done.stdout


@pytest.mark.parametrize("name", training.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    entry = getattr(training, name)
    if callable(entry):
        assert inspect.getdoc(entry)
        assert entry.__module__.startswith("openvclip.training.")
