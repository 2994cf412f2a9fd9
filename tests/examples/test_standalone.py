"""Each example is a single file, which runs in an empty folder with the package alone."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.examples.tiny_videos import command, write_videos
from tests.forked import started
from tests.helpers import REPO

EXAMPLES = REPO / "examples"
SCRIPTS = sorted(
    path
    for folder in (EXAMPLES, EXAMPLES / "loops")
    for path in folder.glob("*.py")
    if path.name != "__init__.py"
)


def run_alone(script: str, arguments: list[str], packages: str) -> None:
    """Run a script in its own folder, where only the packages of a folder can be imported.

    The fork has ``openvclip`` and libraries loaded; it forgets the examples and the tests.
    """
    folder, name = os.path.split(script)
    os.chdir(folder)
    for module in [name for name in sys.modules if name.partition(".")[0] in ("examples", "tests")]:
        del sys.modules[module]
    sys.path[:] = [folder, packages, *(path for path in sys.path if path not in ("", str(REPO)))]
    sys.argv = [name, *arguments]
    runpy.run_path(script, run_name="__main__")
    if arguments == ["--help"]:
        raise SystemExit(3)  # help ends with an exit


@dataclass(frozen=True)
class Finished:
    """A script that has run in a folder with a copy of it and nothing else."""

    copy: Path
    status: int | None
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
    results = {}
    for title, (script, arguments) in jobs.items():
        work, log = root / title / "work", root / title / "output"
        work.mkdir(parents=True)
        copy = Path(shutil.copy(script, work))
        with started(run_alone, str(copy), arguments, str(packages), log=log) as process:
            process.join(120)
        results[title] = Finished(copy, process.exitcode, log.read_text())
    return results


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
