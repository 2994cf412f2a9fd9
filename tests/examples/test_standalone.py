"""Each example is a single file, which runs in an empty folder with the package alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_in_an_empty_folder(script: Path, tmp_path: Path) -> None:
    finished = run_alone(script, tmp_path, "--help")
    assert finished.returncode == 0, finished.stderr
    assert f"usage: {script.name}" in finished.stdout
    assert [path.name for path in (tmp_path / "work").iterdir()] == [script.name]


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
