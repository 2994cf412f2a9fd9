"""The example for Ray Data, on this machine with two workers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from openvclip import VideoCLIP
from tests.forked import run_by_path, started
from tests.helpers import REPO
from tests.search.tiny_shards import save_model, slow_windows, video

pytest.importorskip("av")
if find_spec("ray") is None:  # the example alone imports it, in another process
    pytest.skip("Ray is not installed", allow_module_level=True)
parquet = pytest.importorskip("pyarrow.parquet")

EXAMPLE = REPO / "examples" / "embed_with_ray.py"


def _embed(folder: str) -> None:
    import ray

    try:
        run_by_path(
            folder,
            "embed_with_ray",
            ["videos", "--model", "model", "--out", "out", "--batch", "2", "--workers", "2"],
        )
    finally:
        ray.shutdown()


def test_two_workers_embed_a_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "videos").mkdir()
    for number in range(4):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(video(number, 9 + number))
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    out, errors = tmp_path / "stdout", tmp_path / "stderr"
    settings = {"PYTHONPATH": str(REPO), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with started(_embed, str(tmp_path), log=out, errors=errors, **settings) as process:
        process.join(250)
    assert process.exitcode == 0, errors.read_text()
    assert "5 videos were read, 1 failed; the vectors are in out." in out.read_text()
    bad = str(tmp_path / "videos" / "bad.mp4")
    assert f"{bad}: " in out.read_text()
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
