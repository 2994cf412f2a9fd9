"""Damaged files give frames or an error of this package, in bounded time and memory."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import pytest

from openvclip.errors import MissingDependencyError
from openvclip.video._torchcodec import require_torchcodec
from tests.helpers import REPO

FILES = 500


@pytest.fixture(scope="module")
def originals(encode):
    options = {"x264-params": "bframes=2:keyint=5"}
    small = {"frames": 20, "size": (48, 32)}
    return [
        encode("fuzz.mp4", options=options, container_options={"movflags": "faststart"}, **small),
        encode("fuzz.mkv", options=options, **small),
        encode("fuzz.avi", codec="mpeg4", options={"g": "5"}, **small),
        encode("fuzz.gif", codec="gif", pixel_format="gray", fps=25, **small),
        encode("fuzz.webm", codec="libvpx-vp9", options={"cpu-used": "8"}, **small),
        encode("fuzz.ts", options=options, **small),
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_damaged_files(backend, originals, tmp_path):
    """Runs in another process with limits for its memory and for the processor time of a file."""
    if backend == "torchcodec":
        try:
            require_torchcodec()
        except MissingDependencyError as error:
            pytest.skip(str(error))
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.video.fuzz"]
    done = subprocess.run(
        [*command, str(tmp_path), str(FILES), backend, *map(str, originals)],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1:]}\n{done.stderr[-3000:]}"
    outcomes = collections.Counter(line["outcome"] for line in lines if "outcome" in line)
    assert set(outcomes) == {"error", "frames"}
    assert outcomes.total() == FILES
    assert outcomes["error"] > 50  # both outcomes occur
    assert outcomes["frames"] > 50
