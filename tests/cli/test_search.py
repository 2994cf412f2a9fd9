"""``openvclip search``: what it prints and writes, and wrong command lines."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from openvclip.checkpoints.contract import Confidence
from openvclip.cli import main
from openvclip.search import Index
from openvclip.search import index as index_module
from tests.search.small_index import new_index, tiny_model, write_video


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("cli")
    index = new_index(folder / "x.ovx", tiny_model())
    index.add([write_video(folder / f"{name}.mp4", 25, seed) for seed, name in enumerate("ab")])
    return index


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index finds its model."""
    monkeypatch.setattr(index_module.Index, "model", tiny_model())


def search(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    status = main(["search", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_table_of_path_start_end_score(
    library: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = search(capsys, library.path, "a ball", "-k", 2)
    moments = library.search("a ball", k=2)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split() == ["path", "start", "end", "score"]
    assert [line.split() for line in lines[1:]] == [
        [m.path, f"0:{m.start:04.1f}", f"0:{m.end:04.1f}", f"{m.score:.3f}"] for m in moments
    ]


def test_several_queries_have_titles(library: Index, capsys: pytest.CaptureFixture[str]) -> None:
    clip = library.videos[0]
    words = ["one", "two", "--clip", clip, "--from", 1, "--to", 2, "-k", 1]
    _, out, _ = search(capsys, library.path, *words)
    parts = [part.splitlines() for part in out.split("\n\n")]
    assert [part[0] for part in parts] == ["one", "two", f"{clip}, 1 s to 2 s"]
    assert parts[2][2].split()[0] == clip


def test_json_and_csv(library: Index, capsys: pytest.CaptureFixture[str]) -> None:
    expected = library.search(["x", "y"], negative=["horse"], min_score=0.0)
    words = [library.path, "x", "y", "--not", "horse", "--min-score", 0]
    _, out, _ = search(capsys, *words, "--json")
    entries = json.loads(out)
    assert [entry["query"] for entry in entries] == ["x", "y"]
    assert all(expected)
    for entry, moments in zip(entries, expected, strict=True):
        assert entry["moments"] == [moment._asdict() for moment in moments]
    _, out, _ = search(capsys, *words, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    flat = [
        (q, i, m) for q, ms in zip("xy", expected, strict=True) for i, m in enumerate(ms, start=1)
    ]
    assert [(row["query"], int(row["rank"]), row["path"]) for row in rows] == [
        (query, rank, moment.path) for query, rank, moment in flat
    ]
    for row, (_, _, moment) in zip(rows, flat, strict=True):
        assert float(row["start"]) == pytest.approx(moment.start, abs=1e-3)
        assert float(row["score"]) == pytest.approx(moment.score, abs=1e-6)


def test_nothing_fits_is_an_answer(
    library: Index, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = library.search("x")[0].score
    said = f"nothing fits: the best moment has the score {best:.3f}, below 1"
    assert search(capsys, library.path, "x", "--min-score", 1) == (0, f"{said}\n", "")
    status, out, err = search(capsys, library.path, "x", "--min-score", 1, "--json")
    assert (status, json.loads(out)[0]["moments"], err) == (0, [], f"x: {said}\n")
    model = tiny_model()
    model.confidence = Confidence(threshold=0.999)
    monkeypatch.setattr(index_module.Index, "model", model)
    _, out, _ = search(capsys, library.path, "x")
    assert out.endswith("below 0.999\n")


def test_moments_become_files_and_a_page(
    library: Index, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moments = library.search("x", k=2)
    page, clips = tmp_path / "p.html", tmp_path / "clips"
    words = ["x", "x", "-k", 2, "--cut", clips, "--html", page]
    status, _, err = search(capsys, library.path, *words)
    assert status == 0
    assert f"wrote {page}" in err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(entry.name for entry in clips.iterdir()) == [
        f"{rank:02d} {Path(m.path).stem} {m.start:06.1f}-{m.end:06.1f}.mp4"
        for rank, m in enumerate(moments, start=1)
    ]


def test_a_video_that_is_gone_is_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [write_video(tmp_path / name, 12) for name in ("gone.mp4", "here.mp4")]
    index = new_index(tmp_path / "x.ovx", tiny_model())
    index.add(paths)
    paths[0].unlink()
    status, out, err = search(capsys, index.path, "x", "--cut", tmp_path / "clips")
    assert status == 1
    assert "gone.mp4" in out
    assert "gone.mp4: no such file" in err
    assert [entry.name[3:7] for entry in (tmp_path / "clips").iterdir()] == ["here"]


def test_a_path_of_a_result_in_a_tar_file_is_a_clip(
    library: Index, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("fsspec")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(library.videos[0], "in/a.mp4")
    name = f"tar://in/a.mp4::{tmp_path / 's.tar'}"
    options = ["--from", 0, "--to", 2, "-k", 1, "--json"]
    _, out, err = search(capsys, library.path, "--clip", name, *options)
    _, expected, _ = search(capsys, library.path, "--clip", library.videos[0], *options)
    assert err == ""
    (found,), (same,) = json.loads(out), json.loads(expected)
    assert found["query"].startswith(name)
    assert found["moments"] == same["moments"]


def test_vectors_are_exported(
    library: Index, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = search(capsys, library.path, "--export", tmp_path / "v.npz")
    assert (status, out) == (0, f"wrote {len(library)} vectors to {tmp_path / 'v.npz'}\n")
    assert search(capsys, library.path, "x", "--export", tmp_path / "v.npz")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to search for"),
        (["x", "--from", "1"], "--from has no effect without --clip"),
        (["--image", "nope.jpg"], "nope.jpg: no such file"),
        (["{index}/openvclip.json"], "is a file, and a query is a sentence"),
        ([" "], "sentence is empty"),
        (["x", "-k", "0"], "expected the number of moments"),
        (["x", "--min-score", "2"], "from -1 to 1"),
        (["x", "--frames", "4"], "the index knows how its model is used"),
        (["x", "--export", "v.npz"], "--export searches nothing, but a sentence is given"),
        (["-k", "3", "--export", "v.npz"], "error: -k has no effect with --export"),
        (["--not", "x", "--export", "v.npz"], "error: --not has no effect with --export"),
        (["--clip", "nope.mp4"], "nope.mp4: no such file"),
        (["--clip", "tar://a.mp4::nope.tar"], "nope.tar: no such file"),
        (["--export", "v.txt"], "no format of vectors"),
    ],
)
def test_wrong_command_lines(
    library: Index, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = search(
        capsys, library.path, *(word.format(index=library.path) for word in words)
    )
    assert (status, out) == (2, "")
    assert message in err


def test_a_folder_that_is_no_index(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = search(capsys, tmp_path, "x")
    assert status == 2
    assert "is not an index" in err
