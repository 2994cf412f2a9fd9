"""An index of tar shards: one part for each shard, processes, kills, bad shards, and the merge."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from openvclip import VideoCLIP
from openvclip.checkpoints import read_contract
from openvclip.cli import main
from openvclip.errors import SearchError, UsageError
from openvclip.processes import Processes
from openvclip.search import (
    Index,
    ShardReport,
    WindowOptions,
    index_shards,
    merge_parts,
    sharded,
)
from openvclip.search.parts import PartFolder, part_name
from openvclip.video import read_clip
from tests.forked import started, together
from tests.search.tiny_shards import save_model, slow_windows, tar_of, tiny_model, video

pytest.importorskip("av")
fsspec = pytest.importorskip("fsspec")

NAMES = ("a.mp4", "clips/b.mp4", "c.mp4")


@pytest.fixture(scope="module")
def model() -> VideoCLIP:
    return tiny_model()


def shard(number: int) -> dict[str, bytes]:
    return {name: video(10 * number + place, 9) for place, name in enumerate(NAMES)}


def write_shards(folder: Path, count: int = 3) -> str:
    for number in range(count):
        (folder / f"{number:03d}.tar").write_bytes(tar_of({**shard(number), "a.json": b"{}"}))
    return str(folder / f"{{000..{count - 1:03d}}}.tar")


def addresses(folder: Path | str, count: int = 3) -> dict[str, bytes]:
    """The videos of :func:`write_shards` by their address."""
    return {
        f"tar://{name}::{folder}/{number:03d}.tar": content
        for number in range(count)
        for name, content in shard(number).items()
    }


def rows_of(index: Index) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times and vectors of each video of an index."""
    now = index.snapshot()
    vectors = np.concatenate([block.vectors for block in now.blocks])
    rows = {path: np.flatnonzero(now.video == place) for place, path in enumerate(now.paths)}
    times = np.stack([now.start, now.end], axis=1)
    return {path: (times[chosen], vectors[chosen]) for path, chosen in rows.items()}


@cache
def expected_windows(model: VideoCLIP, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    return slow_windows(model, content)


def assert_is_index_of(index: Index, videos: dict[str, bytes], model: VideoCLIP) -> None:
    """The index has the windows of these videos, encoded one after the other."""
    found = rows_of(index)
    assert sorted(found) == sorted(videos)
    for path, content in videos.items():
        times, vectors = expected_windows(model, content)
        assert np.array_equal(found[path][0], times)
        assert np.abs(found[path][1] - vectors).max() < 1e-3


# --- the whole way -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["disk", "file", "memory"])
def test_an_index_of_shards(place: str, model: VideoCLIP, tmp_path: Path) -> None:
    pattern, root, parts = write_shards(tmp_path), str(tmp_path), str(tmp_path / "parts")
    if place == "file":
        root, parts = tmp_path.as_uri(), (tmp_path / "parts").as_uri()
    if place == "memory":
        root, parts = "memory://library", "memory://library/deep/parts"
        for number in range(3):
            data = (tmp_path / f"{number:03d}.tar").read_bytes()
            fsspec.filesystem("memory").pipe(f"/library/{number:03d}.tar", data)
    pattern = pattern.replace(str(tmp_path), root)
    told: list[ShardReport] = []
    reports = index_shards(pattern, parts, model, tell=told.append, batch_size=4)
    assert told == reports
    assert [(report.videos, report.failed, report.error) for report in reports] == [
        (3, {}, None)
    ] * 3
    again = index_shards(pattern, parts, model)
    assert [report.skipped for report in again] == [True] * 3
    merged = merge_parts(parts, tmp_path / "library.ovx", shards=pattern)
    assert (merged.parts, merged.added, merged.missing) == (3, 9, [])
    index = Index.open(tmp_path / "library.ovx", model)
    videos = addresses(root)
    assert_is_index_of(index, videos, model)
    for path, content in videos.items():  # the path of a result opens the video
        shown = [read_clip(source, num_frames=3, sampler="uniform") for source in (path, content)]
        assert np.array_equal(*shown)
    assert index.update().unchanged == index.videos


def test_the_header_of_a_part_says_all(model: VideoCLIP, tmp_path: Path) -> None:
    index_shards(write_shards(tmp_path, 1), tmp_path / "parts", model)
    (path,) = (tmp_path / "parts").iterdir()
    assert path.name.startswith("000-")
    contract = read_contract(path)
    assert contract is not None
    assert contract.difference(model.contract) is None
    with safe_open(path, "numpy") as file:
        assert file.get_tensor("vectors").dtype == np.float16
        assert file.get_tensor("times").shape == (len(file.get_tensor("vectors")), 2)


# --- processes and kills -----------------------------------------------------------------------


def _index(pattern: str, folder: str, wait: float = 0.0) -> None:
    model = VideoCLIP.from_pretrained(f"{folder}/model")
    report = sharded._report

    def slow(*args: Any, **options: Any) -> ShardReport:
        time.sleep(wait)
        return report(*args, **options)

    sharded._report = slow
    for found in index_shards(pattern, f"{folder}/parts", model, num_threads=0):
        print(found, flush=True)


def test_two_processes_share_the_shards(model: VideoCLIP, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    pattern = write_shards(tmp_path, 3)
    with together(_index, pattern, str(tmp_path), logs=tmp_path) as processes:
        for process in processes:
            process.join(60)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], logs
    assert [log.count("3 videos") for log in logs] == [2, 1]
    assert all("finished before" not in log for log in logs)
    merge_parts(tmp_path / "parts", tmp_path / "library.ovx")
    assert_is_index_of(Index.open(tmp_path / "library.ovx"), addresses(tmp_path), model)


def test_a_killed_run_goes_on_where_it_stopped(model: VideoCLIP, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    pattern, log = write_shards(tmp_path, 3), tmp_path / "log"
    with started(_index, pattern, str(tmp_path), 30.0, log=log) as process:
        parts = tmp_path / "parts"
        deadline = time.monotonic() + 60
        while not list(parts.glob("*.safetensors")):
            assert time.monotonic() < deadline
            assert process.is_alive(), log.read_text()
            time.sleep(0.02)
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert len(finished) == 1
    # What a kill leaves of a part, on a file system that shows it.
    name = part_name(str(tmp_path / "001.tar"))
    whole = (parts / next(iter(finished))).read_bytes()
    (parts / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SearchError, match="not complete"):
        PartFolder(parts).read(name)
    merged = merge_parts(parts, tmp_path / "early.ovx", shards=pattern)
    assert list(merged.incomplete) == [f"{parts}/{name}"]
    assert [Path(shard).stem for shard in merged.missing] == ["001", "002"]
    reports = index_shards(pattern, parts, model)
    assert [report.skipped for report in reports] == [True, False, False]
    assert all((parts / name).stat().st_mtime_ns == time for name, time in finished.items())
    # The merge adds what the index lacks.
    merged = merge_parts(parts, tmp_path / "early.ovx")
    assert (merged.added, merged.unchanged, merged.incomplete) == (6, 3, {})
    assert_is_index_of(Index.open(tmp_path / "early.ovx"), addresses(tmp_path), model)


def test_ranks_without_processes(model: VideoCLIP, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 3)
    for rank, count in ((1, 1), (0, 2)):
        reports = index_shards(pattern, tmp_path / "parts", model, processes=Processes(rank, 2))
        assert len(reports) == count
    assert len(PartFolder(tmp_path / "parts").names()) == 3


# --- bad shards and bad videos -----------------------------------------------------------------


def test_bad_shards_and_bad_videos_are_listed(model: VideoCLIP, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 4)
    data = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "001.tar").unlink()
    bad = {"a.mp4": video(10, 9), "bad.mp4": b"no video", "c.mp4": video(12, 9)}
    (tmp_path / "002.tar").write_bytes(tar_of(bad))
    reports = index_shards(pattern, tmp_path / "parts", model)
    assert [report.videos for report in reports] == [1, 0, 2, 3]
    assert [report.error is None for report in reports] == [False, False, True, True]
    lost = f"tar://bad.mp4::{tmp_path / '002.tar'}"
    assert list(reports[2].failed) == [lost]
    assert lost in reports[2].failed[lost]
    assert "1 failed" in str(reports[2])
    merged = merge_parts(tmp_path / "parts", tmp_path / "library.ovx")
    assert (merged.added, list(merged.failed)) == (6, [lost])
    assert list(merged.incomplete) == [str(tmp_path / f"00{n}.tar") for n in (0, 1)]
    # A bad shard is read again, a bad video is not.
    (tmp_path / "000.tar").write_bytes(b"")
    (tmp_path / "001.tar").write_bytes(tar_of(shard(1)))
    again = index_shards(pattern, tmp_path / "parts", model)
    assert [report.skipped for report in again] == [False, False, True, True]
    assert [report.videos for report in again] == [1, 3, 2, 3]  # 000: what was read before stays
    assert again[0].error is not None


def test_a_shard_that_changed_is_read_again(model: VideoCLIP, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 2)
    index_shards(pattern, tmp_path / "parts", model)
    library, videos = tmp_path / "library.ovx", addresses(tmp_path, 2)
    merge_parts(tmp_path / "parts", library)
    changed = {"a.mp4": video(6, 30), "new.mp4": video(5)}
    (tmp_path / "000.tar").write_bytes(tar_of(changed))
    (tmp_path / "001.tar").unlink()  # a shard that is gone keeps its part
    reports = index_shards(pattern, tmp_path / "parts", model)
    assert [(report.videos, report.skipped) for report in reports] == [(2, False), (3, True)]
    # The index has the changed video, and keeps those that no part has any more.
    merged = merge_parts(tmp_path / "parts", library)
    assert (merged.added, merged.unchanged) == (2, 3)
    videos |= {f"tar://{name}::{tmp_path}/000.tar": content for name, content in changed.items()}
    assert_is_index_of(Index.open(library), videos, model)


def test_names_that_occur_twice(model: VideoCLIP, tmp_path: Path) -> None:
    """In a shard the later video counts, as for tar. Shards of one name have two parts."""
    first, second, third = video(1, 9), video(2, 14), video(3, 9)
    for folder, files in (
        ("x", [("a.mp4", first), ("b.mp4", first), ("a.mp4", second)]),
        ("y", [("a.mp4", third), ("b.mp4", third), ("b.mp4", b"no video")]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar_of(files))
    index_shards(str(tmp_path / "{x,y}/0.tar"), tmp_path / "parts", model)
    index_shards(str(tmp_path / "x/0.tar"), tmp_path / "more", model)
    folders = [tmp_path / "parts", tmp_path / "more"]
    merged = merge_parts(folders, tmp_path / "library.ovx")
    x, y = (f"{tmp_path / folder / '0.tar'}" for folder in "xy")
    assert sorted(merged.repeated) == [f"tar://a.mp4::{x}", f"tar://b.mp4::{x}"]
    assert list(merged.failed) == [f"tar://b.mp4::{y}"]
    videos = {f"tar://a.mp4::{x}": second, f"tar://b.mp4::{x}": first, f"tar://a.mp4::{y}": third}
    assert_is_index_of(Index.open(tmp_path / "library.ovx"), videos, model)


def test_names_of_every_kind(model: VideoCLIP, tmp_path: Path) -> None:
    names = ("./a.mp4", "b\udcff.mp4", "ü 打?#[1].mp4", "long/" * 40 + "c.mp4")
    shard = tmp_path / "0.tar"
    files = {name: video(place, 9) for place, name in enumerate(names)}
    shard.write_bytes(tar_of({**files, "bad\udcff.mp4": b"no video"}))
    index_shards(str(shard), tmp_path / "parts", model)
    merged = merge_parts(tmp_path / "parts", tmp_path / "library.ovx")
    assert list(merged.failed) == [f"tar://bad\udcff.mp4::{shard}"]
    index = Index.open(tmp_path / "library.ovx", model)
    videos = {f"tar://{name}::{shard}": content for name, content in files.items()}
    assert_is_index_of(index, videos, model)
    for path in videos:
        assert len(read_clip(path, num_frames=2, sampler="uniform")) == 1
    assert sorted(index.update().unchanged) == sorted(videos)


# --- parts of other models ---------------------------------------------------------------------


def test_parts_of_another_model_are_refused(model: VideoCLIP, tmp_path: Path) -> None:
    pattern, other = write_shards(tmp_path, 1), tiny_model(0.5)
    parts, library = tmp_path / "parts", tmp_path / "library.ovx"
    index_shards(pattern, parts, model)
    before = next(parts.iterdir()).read_bytes()
    with pytest.raises(SearchError, match=r"weights_hash is .* in this run"):
        index_shards(pattern, parts, other)
    with pytest.raises(SearchError, match=r"windows are 0\.64 s, .* 0\.5 s, .* in this run"):
        index_shards(pattern, parts, model, windows=WindowOptions(seconds=0.5))
    assert next(parts.iterdir()).read_bytes() == before
    index_shards(pattern, tmp_path / "others", other)
    with pytest.raises(SearchError, match=r"weights_hash is .* in the part of"):
        merge_parts([parts, tmp_path / "others"], library)
    assert not library.exists()
    merge_parts(parts, library)
    with pytest.raises(SearchError, match=r"weights_hash is .* in the index"):
        merge_parts(tmp_path / "others", library)
    assert len(Index.open(library).videos) == 3


def test_the_index_knows_its_model(tmp_path: Path) -> None:
    loaded = VideoCLIP.from_pretrained(save_model(tmp_path / "model"))
    index_shards(write_shards(tmp_path, 1), tmp_path / "parts", loaded)
    merge_parts(tmp_path / "parts", tmp_path / "library.ovx")
    assert Index.open(tmp_path / "library.ovx").model.contract == loaded.contract


def test_what_is_no_folder_of_parts(model: VideoCLIP, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SearchError, match="no part of an index"):
            merge_parts(folder, tmp_path / "library.ovx")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SearchError, match="is no part"):
        merge_parts(tmp_path / "model", tmp_path / "library.ovx")
    with pytest.raises(SearchError, match="can't be opened"):
        PartFolder("unknown://bucket/parts")
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match="can't be"):
        index_shards(write_shards(tmp_path, 1), tmp_path / "file", model)


def test_parts_that_are_damaged_or_newer(model: VideoCLIP, tmp_path: Path) -> None:
    index_shards(write_shards(tmp_path, 1), tmp_path / "parts", model)
    (path,) = (tmp_path / "parts").iterdir()
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = file.metadata()
    save_file({**tensors, "vectors": tensors["vectors"][1:]}, path, texts)
    with pytest.raises(SearchError, match=r"000-.* is damaged\. Remove it, and index its shard"):
        merge_parts(tmp_path / "parts", tmp_path / "library.ovx")
    about = json.loads(texts["openvclip_part"])
    save_file(tensors, path, {**texts, "openvclip_part": json.dumps({**about, "version": 2})})
    with pytest.raises(SearchError, match="has version 2; this openvclip reads version 1 and old"):
        merge_parts(tmp_path / "parts", tmp_path / "other.ovx")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
        # A script of sbatch that starts the command without srun is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, (0, 1)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"},
            (0, 2),
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
    ],
)
def test_ranks_of_the_environment(
    variables: dict[str, str], expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openvclip.processes import started_processes

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UsageError, match="RANK="):
            started_processes()
    else:
        assert started_processes() == Processes(*expected)


# --- the command -------------------------------------------------------------------------------


def test_the_command(
    model: VideoCLIP,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, parts = write_shards(tmp_path, 3), "memory://command/parts"
    (tmp_path / "002.tar").write_bytes(tar_of({"a.mp4": video(1), "bad.mp4": b"no video"}))
    run = ["index", "--shards", pattern, "-o", parts, "--model", save_model(tmp_path / "model")]
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(run) == 0  # a failed process would end the others
    out, err = capsys.readouterr()
    assert out.count("3 videos, 9 windows") == 1
    assert "process 0 of 2" in out
    assert "bad.mp4" in err
    monkeypatch.delenv("SLURM_PROCID")
    merge = ["index", "--merge", parts, "-o", str(tmp_path / "library.ovx")]
    assert main([*merge, "--shards", pattern]) == 1
    out, err = capsys.readouterr()
    assert f"{tmp_path / '001.tar'}: has no part." in err
    assert "4 videos added, 1 failed, 1 shards without a part" in out
    assert main(run) == 1
    assert "3 shards (2 finished before)" in capsys.readouterr().out
    assert main(merge) == 1  # a video failed
    assert "3 videos added, 4 unchanged, 1 failed" in capsys.readouterr().out
    assert len(Index.open(tmp_path / "library.ovx").videos) == 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shards", "a.tar", "-o", "parts"], "none of the 1 shards exists"),
        (["--shards", "a.tar"], "--output PARTS"),
        (["--merge", "parts"], "--output INDEX"),
        (["--merge", "parts", "-o", "x.ovx", "--model", "m"], "--model has no effect with --merge"),
        (["--merge", "parts", "-o", "x.ovx", "--update"], "--merge and --update can't be"),
        (["v.mp4", "--shards", "a.tar", "-o", "parts"], "--shards and videos can't be"),
        (["-o", "x.ovx"], "Nothing to index"),
        (["--update"], "Nothing to index"),
    ],
)
def test_command_lines_that_are_mistakes(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["index", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
