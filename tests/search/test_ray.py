"""The example for Ray Data, on this machine with two workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openvclip import VideoCLIP
from tests.helpers import REPO
from tests.search.tiny_shards import save_model, slow_windows, video

pytest.importorskip("av")
pytest.importorskip("ray.data", reason="Ray is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

EXAMPLE = REPO / "examples" / "embed_with_ray.py"


def test_two_workers_embed_a_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "videos").mkdir()
    for number in range(4):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(video(number, 9 + number))
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    done = subprocess.run(
        [sys.executable, EXAMPLE, "videos", "--model", "model", "--out", "out", "--batch", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "5 videos were read, 1 failed; the vectors are in out." in done.stdout
    bad = str(tmp_path / "videos" / "bad.mp4")
    assert f"{bad}: " in done.stdout
    columns = parquet.read_table(tmp_path / "out").to_pydict()
    model = VideoCLIP.from_pretrained(tmp_path / "model")
    paths = np.array(columns["path"])
    for number in range(4):
        path = tmp_path / "videos" / f"{number}.mp4"
        times, vectors = slow_windows(model, path)
        rows = np.flatnonzero(paths == str(path))
        assert [columns["start"][row] for row in rows] == times[:, 0].tolist()
        assert [columns["end"][row] for row in rows] == times[:, 1].tolist()
        assert np.abs(np.array([columns["vector"][row] for row in rows]) - vectors).max() < 1e-3
    assert [columns["error"][row] != "" for row in np.flatnonzero(paths == bad)] == [True]


def test_the_example_is_one_short_file() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100
