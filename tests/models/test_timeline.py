"""Labels over time: windows equal a slow computation, segments and edges are computed by hand."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openvclip
from examples.shapes.clips import write_clip
from examples.shapes.model import create_model
from openvclip import cli
from openvclip.models import timeline as timeline_module
from openvclip.models.timeline import Timeline, clock, predict_timeline
from tests.world import World

Captured = pytest.CaptureFixture[str]


def timeline(times: list[tuple[float, float]], rows: list[list[float]]) -> Timeline:
    return Timeline(
        "a/match.mp4",
        ["run", "jump", "swim"],
        torch.tensor(times, dtype=torch.float64),
        torch.tensor(rows),
    )


BY_HAND = timeline(
    [(0, 4), (2, 6), (4, 8), (6, 9)],
    [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]],
)


def test_edges_lie_between_the_centres_of_windows() -> None:
    assert BY_HAND.edges() == [0, 3, 5, 6.75, 9]  # centres 2, 4, 6, 7.5


def test_segments_join_neighbours_with_the_same_label() -> None:
    segments = BY_HAND.segments()
    assert [(segment.start, segment.end, segment.label) for segment in segments] == [
        (0, 5, "run"),
        (5, 6.75, "jump"),
        (6.75, 9, "run"),
    ]
    assert [segment.probability for segment in segments] == pytest.approx([0.6, 0.8, 0.4])
    assert str(BY_HAND).splitlines() == [
        "a/match.mp4",
        "0:00.0 - 0:05.0   60.0%  run",
        "0:05.0 - 0:06.8   80.0%  jump",
        "0:06.8 - 0:09.0   40.0%  run",
    ]


def test_a_single_window() -> None:
    single = timeline([(0, 1.5)], [[0.2, 0.2, 0.6]])
    assert single.edges() == [0, 1.5]
    assert [segment.label for segment in single.segments()] == ["swim"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00.0"), (7.26, "0:07.3"), (59.96, "1:00.0"), (724, "12:04.0"), (3724, "1:02:04.0")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_examples_in_docstrings_run() -> None:
    result = doctest.testmod(timeline_module)
    assert (result.attempted, result.failed) == (1, 0)


def test_the_figure_shows_each_label_where_it_is_probable(tmp_path: Path) -> None:
    from matplotlib.image import imread

    BY_HAND.figure(tmp_path / "t.png")
    pixels = np.asarray(imread(tmp_path / "t.png"))[..., :3]
    orange = (pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.4) & (pixels[..., 2] < 0.2)
    rows = np.flatnonzero(orange.sum(axis=1) > 20)
    assert len(set(np.diff(rows)) - {1}) == 1  # two underlined labels: swim is never the best
    BY_HAND.figure(tmp_path / "one.png", top=1)
    assert imread(tmp_path / "one.png").shape[0] < pixels.shape[0]


def test_a_timeline_equals_predictions_of_its_windows(world: World, tmp_path: Path) -> None:
    """A window has 32 frames, 4 seconds of 8 frames per second; every 4th frame is used."""
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "long.mp4"
    write_clip(path, frames)
    model = openvclip.expand_temporal_attention(create_model()[0])
    labels = ["star sliding", "key bouncing"]
    options = {"templates": ["{}"], "seconds": 4, "step": 1, "batch_size": 2}
    result = predict_timeline(model, path, labels, **options)
    assert result.times.tolist() == [[0.0, 4.0], [1.0, 5.0]]
    classifier = openvclip.ZeroShotClassifier(model, create_model(None)[1], labels, ["{}"])
    frames_of_file = openvclip.video.read_clip(path, num_frames=40, sampler="uniform")[0]
    to_input = openvclip.video.transforms.build("released", 32)
    for start, row in zip((0, 8), result.probabilities, strict=True):
        clip = to_input(frames_of_file[start : start + 32 : 4])[None]
        with torch.no_grad():
            expected = classifier(clip).softmax(dim=-1)[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)


def test_a_timeline_takes_the_centre_of_three_crops(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 255, (32, 40, 64, 3), dtype=np.uint8)
    write_clip(tmp_path / "wide.mp4", frames)
    model, labels = create_model()[0], ["star sliding", "key bouncing"]
    plain = openvclip.video.transforms.build("released", 32)
    rows = [
        predict_timeline(model, tmp_path / "wide.mp4", labels, transform=transform).probabilities
        for transform in (plain, plain.with_(crops=3))
    ]
    assert torch.equal(*rows)


def test_texts_of_a_timeline_are_encoded_without_autocast(tmp_path: Path) -> None:
    """``classify`` encodes them so, and both keep them for each other."""
    write_clip(tmp_path / "v.mp4", np.zeros((32, 32, 32, 3), np.uint8))
    labels, results = ["star sliding", "key bouncing"], []
    for first in (False, True):
        model, tokenizer = create_model()
        clip = openvclip.VideoCLIP(model, tokenizer, autocast=torch.bfloat16)
        if first:
            clip.timeline(tmp_path / "v.mp4", labels)
        results.append(clip.classifier(labels).text_features)
    assert torch.equal(*results)


def test_videos_of_one_name_have_figures_of_their_own(
    world: World, tmp_path: Path, capsys: Captured
) -> None:
    video = world.folder / world.samples[0][0]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clip.mp4").symlink_to(video)
    arguments = ["predict", str(tmp_path), "--labels", "star sliding", "key bouncing", "--timeline"]
    assert cli.main([*arguments, "--out", str(tmp_path / "figures"), *world.model_flags]) == 0
    names = ["clip-timeline-2.png", "clip-timeline.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names
    printed = capsys.readouterr().out
    assert all(f"wrote {tmp_path / 'figures' / name}\n" in printed for name in names)


def test_figures_that_cant_be_made_are_told_first(
    world: World, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = str(world.folder / world.samples[0][0])
    arguments = ["predict", video, "--labels", "star sliding", "key bouncing", "--timeline"]
    (tmp_path / "file").touch()
    assert cli.main([*arguments, "--out", str(tmp_path / "file"), *world.model_flags]) == 2
    assert "Could not write" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*arguments, "--model", "not-looked-at"]) == 2
    assert 'pip install "openvclip[examples]"' in capsys.readouterr().err


def test_the_command_draws_and_tells(
    world: World, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    video = str(world.folder / world.samples[0][0])
    arguments = ["predict", video, "--labels", "star sliding", "key bouncing", "--timeline"]
    assert cli.main([*arguments, "--seconds", "0.5", *world.model_flags]) == 0
    text = capsys.readouterr().out.splitlines()
    picture = f"{Path(video).stem}-timeline.png"
    assert text[0] == video
    assert text[1].startswith("0:00.0 - 0:")
    assert text[-2].split(" - ")[1].startswith("0:01.5")  # 12 frames at 8 a second
    assert text[-1] == f"wrote {picture}"
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    options: list[Any] = ["--json", "--out", "figures", "--step", "0.5", "--seconds", "0.5"]
    assert cli.main([*arguments, *options, *world.model_flags]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [(w["start"], w["end"]) for w in result["windows"]] == [(0, 0.5), (0.5, 1), (1, 1.5)]
    assert result["segments"][-1]["end"] == 1.5
    assert Path(result["figure"]).is_file()
