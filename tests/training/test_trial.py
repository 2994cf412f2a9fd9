"""The commands with which a run ends: their flags are those of the training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from examples import accuracy
from openvclip.cli import main as cli
from openvclip.cli import predict
from openvclip.models.labels import read_labels
from openvclip.training import options
from openvclip.training.model_card import ModelCard
from openvclip.training.presets import PRESETS
from openvclip.training.trial import sees_neighbours, trial_commands, write_lists

DATA = ["--annotations", "a.csv", "--videos", "b"]


def arguments(*words: str, out: Path = Path("my run")) -> argparse.Namespace:
    return options.parse_arguments("", [*DATA, "--out", str(out), *words])


def predicting(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the command ``openvclip predict`` reads from the text."""
    words = shlex.split(trial_commands(args)["labels of a video"])
    assert words[:3] == ["openvclip", "predict", "VIDEO"]
    read: list[argparse.Namespace] = []

    def check(options: argparse.Namespace) -> None:
        predict._require_effects(options)  # the command refuses no option
        read.append(options)

    monkeypatch.setattr("openvclip.cli.predict._predict", check)
    cli(words[1:])
    return read[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"expand": None, "sampler": "released", "frames": 8, "sampling_rate": 16}),
        (["--frames", "4", "--sampling-rate", "6"], {"frames": 4, "sampling_rate": 6}),
        (["--sampling-rate", "8", "--target-fps", "15"], {"sampling_rate": 16}),
        (["--template", "a {} here"], {"templates": Path("my run/templates.txt")}),
        (["--frame-by-frame"], {"expand": False}),
        (
            ["--preset", "vifi-zero-shot"],
            {
                "expand": False,
                "frames": 32,
                "sampler": "uniform",
                "views": 1,
                "templates": Path("my run/templates.txt"),
            },
        ),
        (["--method", "vifi"], {"expand": False, "sampler": "released", "frames": 8}),
        (["--model", "RN50", "--pretrained", "x y"], {"model": "RN50", "pretrained": "x y"}),
        (["--model", "hf-hub:a/b"], {"model": "hf-hub:a/b", "pretrained": None}),
        (["--model", "transformers:a/b"], {"model": "transformers:a/b", "pretrained": None}),
        (["--hf", "a/b"], {"model": "transformers:a/b", "pretrained": None}),
    ],
)
def test_the_command_for_a_video(
    words: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Report 37: with the defaults of predict, a ViFi run had 19.5 % for 28.5 %.
    args = arguments(*words)
    read = predicting(args, monkeypatch)
    assert read.checkpoint == Path("my run/final.safetensors")
    assert read.labels_file == Path("my run/classes.txt")
    assert {name: getattr(read, name) for name in expected} == expected
    assert (read.templates is None) == ("templates" not in expected and args.method != "vifi")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("more", [[], ["--frames", "5", "--sampler", "uniform"]])
def test_the_command_for_the_accuracy_has_the_test_of_the_preset(
    preset: str, more: list[str]
) -> None:
    # Report 37: nothing said how the model is used.
    start = ["--start-from", "s.pt"] if preset.startswith("bridge") else []
    args = arguments("--preset", preset, *start, *more)
    words = shlex.split(trial_commands(args)["accuracy"])
    assert not more or "--sampling-rate" not in words  # the uniform sampler has no rate
    read = accuracy.parse_arguments(words[2:])
    expected = accuracy.parse_arguments([*DATA, "--preset", preset, "--prompts", "p"])
    for name in ("method", "frames", "sampling_rate", "short_side", "views", "crops", "average"):
        if not (more and name == "frames"):
            assert getattr(read, name) == getattr(expected, name), name
    assert read.frames == args.frames
    assert read.sampler == ("uniform" if more else expected.sampler)
    if args.method in ("bridge", "vita"):
        assert read.prompts == Path("my run/prompts.safetensors")
        assert read.checkpoint == (Path("s.pt") if start else None)
        assert list(trial_commands(args)) == ["accuracy"]
    else:
        assert read.checkpoint == Path("my run/final.safetensors")


def test_no_command_is_better_than_a_wrong_one() -> None:
    assert list(trial_commands(arguments("--frame-by-frame"))) == ["labels of a video"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--frame-by-frame"], False),
        (["--method", "vifi"], False),
        (["--method", "vita"], False),
        (["--method", "finetune"], True),
    ],
)
def test_which_runs_see_neighbouring_frames(words: list[str], expected: bool) -> None:
    assert sees_neighbours(arguments(*words)) == expected


def test_the_lists_are_read_back(tmp_path: Path) -> None:
    names = ["playing the guitar", "Tai Chi", "crème brûlée"]
    files = write_lists(arguments("--method", "vifi", out=tmp_path), names)
    assert read_labels(tmp_path / "classes.txt") == names
    assert read_labels(tmp_path / "templates.txt") == ["a photo of a {}."]
    assert list(files) == ["`classes.txt`", "`templates.txt`"]
    assert list(write_lists(arguments(out=tmp_path), names)) == ["`classes.txt`"]


def test_the_card_shows_the_commands() -> None:
    card = ModelCard("m", 0.5, {}, {}, {}, {"`a`": "b"}, {"accuracy": "python x"}).text()
    assert "## Use\n\nAccuracy:\n\n```bash\npython x\n```\n\n## Files" in card
