"""The subcommand ``openvclip index``: what it prints, its exit status, and the model it records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.shapes.model import WEIGHTS
from openvclip.checkpoints import load_checkpoint, save_checkpoint
from openvclip.errors import UsageError
from openvclip.search import Index
from tests.cli.test_cli import Captured, failure, help_text, run
from tests.examples.tiny_videos import MODEL
from tests.search.small_index import content, write_video
from tests.search.tiny_shards import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    write_video(folder / "a.mp4", 10)
    write_video(folder / "more" / "b.mp4", 20, seed=1)
    return folder


def test_the_life_of_an_index(videos: Path, model: str, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "library.ovx"

    def printed(*arguments: object) -> str:
        assert run("index", *arguments) == 0
        text = capsys.readouterr()
        assert text.err == ""
        assert text.out.startswith(f"{out}: ")
        return text.out.removeprefix(f"{out}: ").rstrip()

    first = printed(videos, "-o", out, "--model", model, "--seconds", 1, "--step", 0.5)
    assert first == "2 added. The index has 2 videos, 4 windows."
    assert printed(videos, "-o", out) == (
        "0 added, 2 unchanged. The index has 2 videos, 4 windows."
    )
    write_video(videos / "c.mp4", 5)
    (videos / "a.mp4").unlink()
    assert printed(f"{videos}/*.mp4", "-o", out, "--update", "--seconds", 1) == (
        "0 added, 1 unchanged, 1 removed; 1 added. The index has 2 videos, 4 windows."
    )
    write_video(videos / "c.mp4", 15)
    assert printed(out, "--update") == (
        "0 added, 1 changed, 1 unchanged. The index has 2 videos, 5 windows."
    )
    assert printed(out, "--remove", videos / "more", "*c.mp4") == (
        "2 removed. The index has 0 videos, 0 windows."
    )
    assert printed("-o", out, "--update") == "0 added. The index has 0 videos, 0 windows."


def test_files_that_cannot_be_read_are_listed(
    videos: Path, model: str, tmp_path: Path, capsys: Captured
) -> None:
    out, empty = tmp_path / "x.ovx", tmp_path / "empty"
    empty.mkdir()
    (videos / "z.mp4").write_text("no video")
    assert run("index", videos, empty, "-o", out, "--model", model, "--num-threads", 0) == 1
    text = capsys.readouterr()
    assert "2 added, 2 failed. The index has 2 videos" in text.out
    assert "z.mp4: cannot be read as a video" in text.err
    assert f"{empty}: no video files in this folder" in text.err
    assert run("index", empty, tmp_path / "absent", "-o", tmp_path / "y.ovx") == 1
    text = capsys.readouterr()
    assert "absent: no such file" in text.err
    assert "There is nothing to index" in text.err
    assert not (tmp_path / "y.ovx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["VIDEOS"], "Give the folder of the index: --output library.ovx"),
        ([], "Nothing to index is given; expected VIDEO"),
        (["VIDEOS", "-o", "INDEX", "--remove", "a"], "give the index alone"),
        (["VIDEOS", "OTHER", "--update"], "2 paths without --output; expected the index alone"),
        (["VIDEOS", "-o", "INDEX", "--seconds", "3"], "seconds is 1 in the index, but 3 is given"),
        (["VIDEOS", "-o", "INDEX", "--seconds", "0"], "seconds=0.0: expected a number of sec"),
        (["VIDEOS", "-o", "INDEX", "--frames", "4"], "--frames has no effect without --model"),
        (["VIDEOS", "-o", "INDEX", "--model", "OTHER"], "another model made this index: weights"),
        (["INDEX", "--remove", "a", "--seconds", "1"], "--seconds has no effect with --remove"),
        (["INDEX", "--remove", "absent"], "absent: the index has no such video"),
        (["INDEX"], "is an index. To bring it up to date, add --update; to add videos"),
        (["VIDEOS", "--update"], "is not an index; expected a folder that 'openvclip index'"),
        (["VIDEOS", "-o", "VIDEOS"], "holds other files"),
        (["VIDEOS", "-o", "INDEX", "--batch-size", "0"], "batch_size=0: expected a whole number"),
    ],
)
def test_wrong_use(
    made: dict[str, str], arguments: list[str], message: str, capsys: Captured
) -> None:
    assert message in failure(capsys, "index", *(made.get(word, word) for word in arguments))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: str) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("made")
    write_video(folder / "videos" / "a.mp4", 10)
    names = {"VIDEOS": folder / "videos", "INDEX": folder / "x.ovx", "OTHER": folder / "other"}
    save_model(folder / "other", 1.0)
    options = ["--model", model, "--seconds", "1"]
    assert run("index", names["VIDEOS"], "-o", names["INDEX"], *options) == 0
    return {name: str(path) for name, path in names.items()}


def test_the_help_shows_examples_and_fits_a_terminal(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(capsys, "index")
    assert "openvclip index videos/ -o library.ovx --model runs/b16" in text
    assert "openvclip index library.ovx --update" in text
    assert "--templates" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("case", ["folder", "config", "checkpoint"])
def test_an_index_loads_its_model_again(
    case: str, videos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the names below are relative
    shutil.copytree(model, "model")
    shutil.copy(MODEL, "shapes-clip.json")
    shutil.copy(WEIGHTS, "clip.safetensors")
    tuned = {name: value + 0.01 for name, value in load_checkpoint("clip.safetensors").items()}
    save_checkpoint(tuned, "tuned.safetensors")
    named = ["--model", "shapes-clip.json", "--pretrained", "clip.safetensors", "--frames", "3"]
    options = {
        "folder": ["--model", "model"],
        "config": named,
        "checkpoint": [
            *named,
            "--checkpoint",
            "tuned.safetensors",
            *("--window", "2", "--lam", "0.25"),
        ],
    }[case]
    assert run("index", "videos", "-o", "x.ovx", *options) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    index = Index.open("../x.ovx")
    before = content(index)
    expansion = index.model.expansion
    assert (None if expansion is None else expansion.window) == (None if case == "config" else 2)
    other = write_video(videos / "a copy.mp4", 10)
    index.add(other)
    found, again = before[str(videos / "a.mp4")], content(index)[str(other)]
    np.testing.assert_allclose([w[2] for w in found], [w[2] for w in again], atol=2e-3)
    with torch.no_grad():
        feature: Any = index.model.encode_text("a star")
    assert feature.shape == (index.blocks()[0].vectors.shape[1],)


def test_a_model_that_was_moved_is_named_once(
    videos: Path, model: str, tmp_path: Path, capsys: Captured
) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "x.ovx"
    shutil.copytree(model, first)
    assert run("index", videos / "a.mp4", "-o", out, "--model", first, "--seconds", 1) == 0
    first.rename(second)
    text = failure(capsys, "search", out, "a star")
    assert str(first) in text
    assert "--model" in text
    assert run("search", out, "a star", "--model", second) == 0  # a search changes nothing
    assert str(first) in failure(capsys, "search", out, "a star")
    assert run("index", videos, "-o", out, "--model", second) == 0
    assert run("search", out, "a star") == 0
    second.rename(first)
    Index.open(out).set_source(first)
    assert run("index", out, "--update") == 0
    assert Index.open(out).search("a star")
    assert Index.open(out, str(first)).search("a star")
    for wrong in (5, ["x"]):
        with pytest.raises(UsageError, match="expected a VideoCLIP, the folder of a model"):
            Index.open(out, wrong)  # type: ignore[arg-type]


def test_an_index_that_another_process_makes_meanwhile_is_used(
    videos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openvclip.cli import index as command

    out, load = tmp_path / "x.ovx", command.load_video_clip

    def slow(options: Any) -> Any:
        monkeypatch.setattr(command, "load_video_clip", load)
        assert run("index", videos / "a.mp4", "-o", out, "--model", model) == 0
        return load(options)

    monkeypatch.setattr(command, "load_video_clip", slow)
    assert run("index", videos, "-o", out, "--model", model) == 0
    assert len(Index.open(out).videos) == 2


def test_an_index_after_the_sentence_is_named(made: dict[str, str], capsys: Captured) -> None:
    text = failure(capsys, "search", "a horse", made["INDEX"])
    assert "is an index, and a query is a sentence. The index comes first" in text
