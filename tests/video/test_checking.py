"""Checks of video files: their results, crashes of the decoder, and the command."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from openvclip.cli import main
from openvclip.errors import UsageError, VideoError, VideoOptionError
from openvclip.video import checking, read_clip
from openvclip.video.checking import VideoCheck, VideoChecker, check_video, check_videos
from tests.forked import CONTEXT
from tests.helpers import REPO
from tests.video import servers


@pytest.fixture(scope="module")
def folder(encode, tmp_path_factory):
    """Two good videos, one damaged video and three bad files."""
    root = tmp_path_factory.mktemp("to-check")
    options = {"x264-params": "bframes=0:keyint=6"}
    whole = encode("check.mkv", frames=90, fps=25, options=options).read_bytes()
    (root / "sub").mkdir()
    (root / "good.mkv").write_bytes(whole)
    (root / "sub" / "other.MKV").write_bytes(whole)
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 200] = bytes(200)
    (root / "sub" / "holes.mkv").write_bytes(middle)
    (root / "text.mp4").write_text("not a video" * 50)
    (root / "empty.mp4").touch()
    (root / "header.mkv").write_bytes(whole[:600])
    (root / "notes.txt").write_text("good.mkv,0\n")
    return root


STATUS = {
    "good.mkv": "ok",
    "sub/other.MKV": "ok",
    "sub/holes.mkv": "damaged",
    "text.mp4": "bad",
    "empty.mp4": "bad",
    "header.mkv": "bad",
}


@pytest.fixture
def prompt_workers(monkeypatch):
    """Worker processes that have PyTorch imported; test_the_command starts them as users do."""
    monkeypatch.setattr(checking, "multiprocessing", SimpleNamespace(get_context=lambda _: CONTEXT))


def test_one_file(folder):
    results = {name: check_video(folder / name) for name in (*STATUS, "none.mp4")}
    assert {name: check.status for name, check in results.items()} == {**STATUS, "none.mp4": "bad"}
    size = (folder / "good.mkv").stat().st_size
    whole = VideoCheck(str(folder / "good.mkv"), "ok", "", 90, 25.0, 144, 64, None, size)
    assert results["good.mkv"] == whole
    for name, check in results.items():
        assert bool(check.reason) == (check.status != "ok")
        assert name in check.reason or not check.reason
        # read_clip agrees with the status
        if check.status == "bad":
            with pytest.raises(VideoError):
                read_clip(folder / name)
        else:
            assert read_clip(folder / name).shape == (1, 8, 3, 64, 144)
    assert "no such file" in results["none.mp4"].reason
    assert 0 < results["sub/holes.mkv"].frames < 90


def test_containers_that_say_how_long_they_are(encode):
    path = encode("check.avi", codec="mpeg4", frames=50, fps=25)
    assert check_video(path)[1:8] == ("ok", "", 50, 25.0, 144, 64, 2.0)


def test_quick_looks_at_the_first_frame(folder):
    assert check_video(folder / "sub" / "holes.mkv", quick=True).status == "ok"
    assert check_video(folder / "header.mkv", quick=True).status == "bad"


def test_a_crash_costs_one_file(folder, monkeypatch, prompt_workers):
    monkeypatch.setattr(checking, "_serve", servers.crashing)
    names = ["good.mkv", "text.mp4", "sub/other.MKV", "empty.mp4"]
    checks = check_videos([folder / name for name in names], num_workers=1)
    results = {check.path: check for check in checks}
    assert sorted(results) == sorted(str(folder / name) for name in names)
    assert {name: results[str(folder / name)].status for name in names} == {
        name: STATUS[name] for name in names
    }
    crashed = results[str(folder / "text.mp4")]
    assert crashed.reason == f"{folder}/text.mp4: the decoder crashed (SIGSEGV)."
    assert crashed.bytes == 550
    (hung,) = check_videos([folder / "header.mkv"], timeout=0.1)
    assert hung.status == "bad"
    assert hung.reason.endswith("decoding took more than 0.1 seconds.")


def test_processes_that_do_not_start(folder, monkeypatch, prompt_workers):
    monkeypatch.setattr(checking, "_serve", servers.never_ready)
    with pytest.raises(UsageError, match=r"did not start \(exit status 7\)"):
        list(check_videos([folder / "good.mkv"]))


def test_options(folder):
    for options in ({"num_workers": 0}, {"num_workers": -2}, {"timeout": 0}):
        with pytest.raises(VideoOptionError, match="expected numbers above 0"):
            check_videos([folder / "good.mkv"], **options)
    assert list(check_videos([])) == []


# --- the command ---------------------------------------------------------------------------------


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_command(folder, tmp_path, capsys):
    table = tmp_path / "checked.csv"
    assert main(["check-videos", str(folder), "-o", str(table), "--num-workers", "1"]) == 1
    results = rows(table)
    assert {row["path"]: row["status"] for row in results} == {
        str(folder / name): status for name, status in STATUS.items()
    }
    assert list(results[0]) == list(VideoCheck._fields)
    (good,) = (row for row in results if row["path"].endswith("good.mkv"))
    assert (good["frames"], good["fps"], good["width"], good["seconds"]) == (
        "90",
        "25.0",
        "144",
        "",
    )
    printed = capsys.readouterr()
    assert printed.out.endswith(f"2 ok, 1 damaged, 3 bad; see {table}\n")
    assert f"bad: {folder}/empty.mp4: the file is empty" in printed.out
    assert "6/6" in printed.err  # the progress bar

    assert main(["check-videos", str(folder), "-o", str(table)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["check-videos", str(folder), "-o", str(tmp_path / "none" / "x.csv")]) == 2
    assert "make it first" in capsys.readouterr().err
    if os.path.exists("/dev/full"):
        assert main(["check-videos", str(folder), "-o", "/dev/full", "--overwrite"]) == 2
        assert "/dev/full: can't be written (No space left on device)" in capsys.readouterr().err


def test_the_command_on_lists(folder, tmp_path, capsys, prompt_workers):
    table = tmp_path / "checked.csv"
    listed = tmp_path / "list.csv"
    listed.write_text("good.mkv,0\nsub/other.MKV,1\ngood.mkv,0\n")
    options = [
        "--videos",
        str(folder),
        "-o",
        str(table),
        "--quick",
        "--num-workers",
        "1",
        "--overwrite",
    ]
    assert main(["check-videos", str(listed), *options]) == 0
    assert [row["status"] for row in rows(table)] == ["ok", "ok"]
    listed.write_text("good.mkv,0\nnone.mp4,1\n")
    other = tmp_path / os.fsdecode(b"\xff.mkv")  # a name in Latin-1
    other.write_bytes(b"no video")
    assert main(["check-videos", str(listed), str(other), *options]) == 1
    assert {os.path.basename(row["path"]): row["status"] for row in rows(table)} == {
        "good.mkv": "ok",
        "none.mp4": "bad",
        other.name: "bad",
    }
    capsys.readouterr()
    (tmp_path / "void").mkdir()
    for source, text in (("nowhere", "no such file or folder"), ("void", "neither videos nor")):
        assert main(["check-videos", str(tmp_path / source), "-o", str(tmp_path / "x.csv")]) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "x.csv").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_leaves_what_was_found(folder, tmp_path):
    data = (folder / "good.mkv").read_bytes()
    (tmp_path / "many").mkdir()
    for number in range(2000):
        (tmp_path / "many" / f"{number:04d}.mkv").write_bytes(data)
    table = tmp_path / "checked.csv"
    command = [sys.executable, "-m", "openvclip", "check-videos", str(tmp_path / "many")]
    process = subprocess.Popen(
        [*command, "-o", str(table), "--num-workers", "1"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # shells start background processes with SIGINT ignored, and child processes inherit this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # to all processes, as a terminal does
    out, err = process.communicate(timeout=60)  # returns when all processes have closed the pipes
    assert process.returncode == 130, err
    results = rows(table)
    assert 3 <= len(results) < 2000
    assert all(row["status"] == "ok" and row["bytes"] == str(len(data)) for row in results)
    assert f"{len(results)} ok, 0 damaged, 0 bad, {2000 - len(results)} not checked" in out


def test_the_command_on_real_clips(clips, tmp_path, prompt_workers):
    table = tmp_path / "checked.csv"
    arguments = [str(clips / "labels.csv"), "--videos", str(clips), "-o", str(table)]
    assert main(["check-videos", *arguments, "--num-workers", "1"]) == 0
    results = rows(table)
    assert len(results) == 73
    annotated = {str(clips / row["path"]): row["frames"] for row in rows(clips / "labels.csv")}
    assert {row["path"]: row["frames"] for row in results} == annotated


@pytest.mark.usefixtures("prompt_workers")
def test_one_process_for_several_checks(folder, monkeypatch):
    with closing(VideoChecker()) as checker:
        for path in sorted(folder.glob("*.m*")):
            assert checker.check(path) == check_video(path)
        process = checker._worker._process
        assert process.is_alive()
        process.kill()  # as a file that crashes the decoder does
        process.join()
        assert "crashed (SIGKILL)" in checker.check(folder / "good.mkv").reason
        assert checker.check(folder / "good.mkv").status == "ok"
        process = checker._worker._process
    process.join(10)
    assert not process.is_alive()
