"""A worker that reads many clips needs no more memory or files at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median

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
    # A frame needs 54 KiB. With a leak of one frame for each clip, these medians would be 54 * 600
    # KiB apart. One measurement alone is up to 10 MiB off, as the allocator keeps free memory.
    early, late = (
        median(line["kib"] for line in part) for part in (measurements[1:4], measurements[7:])
    )
    assert late - early < 54 * 0.6 * CLIPS / 4
