"""Each example is a single file, which runs in an empty folder with the package alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.examples.tiny_videos import command, write_videos
from tests.helpers import REPO

EXAMPLES = REPO / "examples"
SCRIPTS = sorted(
    path
    for folder in (EXAMPLES, EXAMPLES / "loops")
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
)


# Imports the slow libraries once, then runs each script in a fork: in its own folder, with its
# arguments.
RUN_ALL = """
import json, os, runpy, sys
from contextlib import suppress
import open_clip, torch, openvclip
with suppress(ImportError):
    import accelerate, lightning
for script, arguments in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        folder, name = os.path.split(script)
        os.chdir(folder)
        output = os.open("../output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[0], sys.argv = folder, [name, *arguments]
        status = 3 if arguments == ["--help"] else 0  # of a script that ends without an exit
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
            status = 1
        sys.stdout.flush()
        os._exit(status)  # without the second that the end of an interpreter with torch takes
    print(script, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Finished:
    """A script that has run in a folder with a copy of it and nothing else."""

    copy: Path
    status: int
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Run a copy of each script in a new folder, where only ``openvclip`` can be imported.

    The module path has a folder with a link to the package, and not the checkout: an import of a
    file beside the script or of ``examples`` fails.
    """
    root = tmp_path_factory.mktemp("alone")
    packages = root / "packages"
    packages.mkdir()
    (packages / "openvclip").symlink_to(REPO / "openvclip")
    wrong = root / "wrong.py"
    wrong.write_text("import openvclip\nfrom examples import finetune\n")
    write_videos(root, 4)
    training = command(root, "run", "--method", "finetune", "--epochs", "1")
    jobs = {script.name: (script, ["--help"]) for script in SCRIPTS}
    jobs |= {"training": (EXAMPLES / "finetune.py", training), "wrong": (wrong, ["--help"])}
    copies = {}
    for title, (script, _) in jobs.items():
        work = root / title / "work"
        work.mkdir(parents=True)
        copies[title] = Path(shutil.copy(script, work))
    runs = [(str(copies[title]), arguments) for title, (_, arguments) in jobs.items()]
    process = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(runs),
        cwd=packages,
        env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    statuses = dict(line.rsplit(" ", 1) for line in process.stdout.splitlines())
    return {
        title: Finished(copy, int(statuses[str(copy)]), (root / title / "output").read_text())
        for title, copy in copies.items()
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_in_an_empty_folder(script: Path, finished: dict[str, Finished]) -> None:
    library = script.stem.partition("_")[0]
    if script.parent.name == "loops" and find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    run = finished[script.name]
    assert run.status == 0, run.output
    assert f"usage: {script.name}" in run.output
    assert list(run.copy.parent.iterdir()) == [run.copy]


def test_an_import_of_a_file_beside_the_script_fails(finished: dict[str, Finished]) -> None:
    assert finished["wrong"].status == 1
    assert "No module named 'examples'" in finished["wrong"].output


def test_a_training_run_in_an_empty_folder(finished: dict[str, Finished]) -> None:
    run = finished["training"]
    assert run.status == 0, run.output
    assert (run.copy.parents[2] / "run" / "final.safetensors").is_file()
