"""The commands with which a run ends: their flags are those of the training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest

from examples import accuracy
from openvclip import VIDEO_TEMPLATES, expand_temporal_attention
from openvclip.checkpoints import Contract, Expansion, Frames
from openvclip.cli.main import build_parser
from openvclip.models.labels import read_labels
from openvclip.models.loading import LoadedModel
from openvclip.training import options
from openvclip.training.model_card import ModelCard
from openvclip.training.presets import PRESETS
from openvclip.training.trial import (
    contract_of_run,
    sees_neighbours,
    trial_commands,
    write_lists,
)
from openvclip.video.transforms import build
from openvclip.weights import weights_hash
from tests.helpers import tiny_clip, tiny_tokenizer

DATA = ["--annotations", "a.csv", "--videos", "b"]


def arguments(*words: str, out: Path = Path("my run")) -> argparse.Namespace:
    return options.parse_arguments("", [*DATA, "--out", str(out), *words])


def contract_of(args: argparse.Namespace) -> Contract:
    """The contract of a run whose model is tiny, whatever model the arguments name."""
    model = tiny_clip()
    if sees_neighbours(args):
        expand_temporal_attention(model)
    pixels = build("train", 32, hflip=args.flip, short_side=args.short_side)
    contract = contract_of_run(args, LoadedModel(args.model, model, tiny_tokenizer, pixels))
    assert contract is not None
    assert contract.base is not None
    assert contract.base.weights_hash == weights_hash(model.state_dict())
    return contract


ZERO = Expansion(1, "zero")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [],
            {
                "expansion": ZERO,
                "frames": Frames(8, 16, 30.0, "released", 3),
                "templates": VIDEO_TEMPLATES,
                "pooling": "unit_frames",
                "method": "openvclip",
                "model": "ViT-B-16-quickgelu",
            },
        ),
        (
            ["--frames", "4", "--sampling-rate", "6", "--target-fps", "15"],
            {"frames": Frames(4, 6, 15.0, "released", 3)},
        ),
        (["--template", "a {} here"], {"templates": ("a {} here",), "pooling": "unit_frames"}),
        (["--frame-by-frame"], {"expansion": None, "pooling": "unit_frames"}),
        (
            ["--preset", "vifi-zero-shot"],
            {
                "expansion": None,
                "frames": Frames(32, 16, 30.0, "uniform", 1),
                "templates": ("a photo of a {}.",),
                "pooling": "frames",
            },
        ),
        (["--preset", "vifi-supervised"], {"frames": Frames(16, 16, 30.0, "uniform", 4)}),
        (["--method", "vifi"], {"expansion": None, "pooling": "frames"}),
        (["--model", "RN50", "--pretrained", "x/y.pt"], {"model": "RN50"}),
        (["--hf", "a/b"], {"model": "a/b"}),
    ],
)
def test_the_contract_of_a_run_is_the_test_of_its_method(
    words: list[str], expected: dict[str, Any]
) -> None:
    # Report 37: with the defaults of predict, a ViFi run had 19.5 % for 28.5 %.
    contract = contract_of(arguments(*words))
    assert {name: getattr(contract, name) for name in expected} == expected
    assert contract.pixels.name == "released"


def test_the_contract_has_the_pixels_and_the_base_of_the_run() -> None:
    contract = contract_of(arguments("--short-side", "40", "--pretrained", "x/y.pt"))
    assert contract.pixels.short_side == 40
    assert contract.base is not None
    assert (contract.base.name, contract.base.pretrained) == ("ViT-B-16-quickgelu", "y.pt")
    base = contract_of(arguments("--start-from", "runs/s.pt")).base
    assert base is not None
    assert base.pretrained == "s.pt"
    for words, name in (
        (("--model", "hf-hub:a/b"), "hf-hub:a/b"),
        (("--hf", "a/b"), "transformers:a/b"),
    ):
        base = contract_of(arguments(*words)).base
        assert base is not None
        assert (base.name, base.pretrained) == (name, None)
    assert contract_of(arguments("--preset", "vifi-supervised")).pixels.crops == 3


def test_prompts_have_no_contract() -> None:
    args = arguments("--preset", "vita")
    loaded = LoadedModel("m", tiny_clip(), tiny_tokenizer, build("train", 32))
    assert contract_of_run(args, loaded) is None


def test_the_command_for_a_video_needs_the_folder_alone() -> None:
    words = shlex.split(trial_commands(arguments())["labels of a video"])
    assert words[:3] == ["openvclip", "predict", "VIDEO"]
    read = build_parser().parse_args(words[1:])
    assert (read.model, read.labels_file) == ("my run", Path("my run/classes.txt"))
    assert read.given >= {"model", "labels_file"}
    assert not read.given & {"checkpoint", "frames", "expand", "templates", "pretrained"}


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
    assert list(files) == ["`classes.txt`"]


def test_the_card_shows_the_commands() -> None:
    card = ModelCard("m", 0.5, {}, {}, {}, {"`a`": "b"}, {"accuracy": "python x"}).text()
    assert "## Use\n\nAccuracy:\n\n```bash\npython x\n```\n\n## Files" in card
