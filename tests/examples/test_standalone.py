"""Each example is a single file, which runs in an empty folder with the package alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def run_alone(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of a script in a new folder, where only ``openvclip`` can be imported.

    The module path has a folder with a link to the package, and not the checkout: an import of a
    file beside the script or of ``examples`` fails.
    """
    packages, work = folder / "packages", folder / "work"
    packages.mkdir()
    work.mkdir()
    (packages / "openvclip").symlink_to(REPO / "openvclip")
    shutil.copy(script, work)
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, script.name, *arguments],
        cwd=work,
        env=environment,
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )


# Imports the slow libraries once, then runs each script in a fork: in its own folder, with the
# arguments "--help".
HELP_OF_ALL = """
import os, runpy, sys
import accelerate, lightning, open_clip, torch, openvclip
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        folder, name = os.path.split(script)
        os.chdir(folder)
        output = os.open("../output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[0], sys.argv = folder, [name, "--help"]
        status = 3  # of a script that does not end at its arguments
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        os._exit(status)  # without the second that the end of an interpreter with torch takes
    print(script, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def help_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each script, with the folder ``work`` and the file ``output``."""
    for library in ("accelerate", "lightning"):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    root = tmp_path_factory.mktemp("help")
    copies = []
    for script in SCRIPTS:
        work = root / script.stem / "work"
        work.mkdir(parents=True)
        copies.append(shutil.copy(script, work))
    packages = root / "packages"
    packages.mkdir()
    (packages / "openvclip").symlink_to(REPO / "openvclip")
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *map(str, copies)],
        cwd=packages,
        env=environment,
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    (root / "statuses").write_text(finished.stdout + finished.stderr)
    return root


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_in_an_empty_folder(script: Path, help_folder: Path) -> None:
    folder = help_folder / script.stem
    output = (folder / "output").read_text()
    copy = folder / "work" / script.name
    assert f"{copy} 0" in (help_folder / "statuses").read_text().splitlines(), output
    assert f"usage: {script.name}" in output
    assert list((folder / "work").iterdir()) == [copy]


def test_an_import_of_a_file_beside_the_script_fails(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import openvclip\nfrom examples import finetune\n")
    (tmp_path / "alone").mkdir()
    finished = run_alone(script, tmp_path / "alone", "--help")
    assert "No module named 'examples'" in finished.stderr


def test_a_training_run_in_an_empty_folder(tmp_path: Path) -> None:
    write_videos(tmp_path, 4)
    arguments = command(tmp_path, "run", "--method", "finetune", "--epochs", "1")
    (tmp_path / "alone").mkdir()
    finished = run_alone(EXAMPLES / "finetune.py", tmp_path / "alone", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "final.safetensors").is_file()
