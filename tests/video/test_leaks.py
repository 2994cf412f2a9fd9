"""A worker that reads many clips needs no more memory or files at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import REPO

# OPENVCLIP_LEAK_CLIPS=10000 reads as many clips as an epoch.
CLIPS = int(os.environ.get("OPENVCLIP_LEAK_CLIPS", "1000"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts through /proc")
def test_workers_keep_neither_memory_nor_files(encode):
    path = encode("leak.mkv", frames=20, size=(144, 128))
    done = subprocess.run(
        [sys.executable, "-m", "tests.video.leaks", str(path), str(CLIPS)],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    measurements = [json.loads(line) for line in done.stdout.splitlines()]
    print(*measurements, sep="\n")
    assert [line["clips"] for line in measurements] == [
        CLIPS * tenth // 10 for tenth in range(1, 11)
    ]
    assert measurements[-1]["errors"] == CLIPS // 10
    assert measurements[-1]["files"] == measurements[2]["files"]
    # A frame needs 54 KiB. A leak of one frame for each clip would need at least 54 * 700 KiB.
    assert measurements[-1]["kib"] - measurements[2]["kib"] < 54 * 0.7 * CLIPS / 4
