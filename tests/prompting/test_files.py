"""Saving and loading prompts, and the check of the backbone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openvclip import expand_temporal_attention, save_checkpoint
from openvclip import prompting as P
from openvclip.errors import (
    CheckpointError,
    PromptBackboneWarning,
    PromptingError,
    StateMismatchError,
    UnsupportedModelError,
)
from tests.helpers import assert_same_state, random_video, randomise, same_bits, tiny_tower
from tests.prompting.reference import NAMES, prompt_clip, word_tokenizer
from tests.towers.tower_laws import anatomy


def vifi(model: Any) -> Any:
    P.attach_vifi(model, vision_prompts=2, vision_depth=3, text_prompts=3, text_depth=2)
    return model


def vita(model: Any) -> Any:
    P.attach_vita(
        model,
        frames=4,
        global_prompts=2,
        text_prompts=2,
        class_names=NAMES,
        name_at="middle",
        other_length="nearest",
        released_freeze=True,
    )
    return model


@pytest.fixture(params=[vifi, vita])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = request.param(prompt_clip())
    randomise(model.openvclip_prompts, seed=4)
    P.save(model, tmp_path / "prompts.safetensors")
    return model, tmp_path / "prompts.safetensors"


def test_there_and_back(made: tuple[Any, Path]) -> None:
    model, path = made
    other = prompt_clip()
    assert P.load(other, path) is other
    assert_same_state(other.state_dict(), model.state_dict())
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in other.named_parameters()} == required
    video = random_video(2, 6 if other.openvclip_prompts.method == "vita" else 3)
    heads = [P.VideoClassifier(m, word_tokenizer, NAMES[1:]) for m in (model, other)]
    assert same_bits(heads[0](video), heads[1](video))


def test_only_the_prompts_are_stored(made: tuple[Any, Path]) -> None:
    model, path = made
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        about = json.loads(file.metadata()["openvclip_prompts"])
    assert names == {n.removeprefix("openvclip_prompts.") for n in P.state_dict(model)}
    assert about["backbone"]["vision"] == {
        "width": 16,
        "layers": 3,
        "heads": 2,
        "patch size": [4, 4],
        "image size": [8, 8],
        "feature size": 8,
    }
    assert path.stat().st_size < 60_000


def test_a_tower_alone_and_a_module_around_the_model(tmp_path: Path) -> None:
    path, video = tmp_path / "prompts.safetensors", random_video(1, 3)
    tower = expand_temporal_attention(tiny_tower())
    P.attach_vifi(tower, vision_prompts=2, vision_depth=2, text_prompts=0)
    P.save(torch.nn.ModuleDict({"inner": tower}), path)
    other = P.load(expand_temporal_attention(tiny_tower()), path)
    assert same_bits(other(video), tower(video))


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"layers": 2}, ["layers 3 2"]),
        ({"width": 32}, ["width 16 32", "heads 2 4"]),
        ({"patch_size": 2}, ["patch size [4, 4] [2, 2]"]),
        ({"image_size": 16}, ["image size [8, 8] [16, 16]"]),
    ],
)
def test_another_backbone(made: tuple[Any, Path], changes: dict[str, int], rows: list[str]) -> None:
    other = prompt_clip(**changes)
    before = anatomy(other)
    with pytest.raises(CheckpointError, match="learned with another vision tower") as raised:
        P.load(other, made[1])
    lines = [" ".join(line.split()) for line in str(raised.value).splitlines()]
    assert lines[1:-1] == ["file model", *rows]
    assert anatomy(other) == before


def test_other_weights_of_the_same_sizes(made: tuple[Any, Path]) -> None:
    with pytest.warns(PromptBackboneWarning, match="same sizes as the model, but other"):
        P.load(prompt_clip(seed=1), made[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P.load(prompt_clip().to(torch.bfloat16), made[1])


def test_no_text_tower(made: tuple[Any, Path]) -> None:
    tower = prompt_clip().visual
    with pytest.raises(
        CheckpointError, match=r"has no text tower .* and the file holds text prompts"
    ):
        P.load(tower, made[1])
    with pytest.raises(UnsupportedModelError, match=r"can.t take prompts"):
        P.load(torch.nn.Linear(2, 2), made[1])


def test_a_second_attachment(made: tuple[Any, Path]) -> None:
    with pytest.raises(PromptingError, match="has prompts already"):
        P.load(made[0], made[1])


def test_what_is_no_file_of_prompts(made: tuple[Any, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_checkpoint(P.state_dict(made[0]), path)
    with pytest.raises(CheckpointError, match="holds no prompts"):
        P.load(prompt_clip(), path)
    path.write_bytes(made[1].read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        P.load(prompt_clip(), path)
    with pytest.raises(CheckpointError):
        P.load(prompt_clip(), tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda about: "[1", "is damaged"),
        (lambda about: {}, "is damaged"),
        (lambda about: {**about, "method": "coop"}, "is damaged"),
        (lambda about: {**about, "settings": {"width": 3}}, "does not know"),
        (lambda about: {**about, "backbone": {"audio": {}}}, "does not know"),
        (lambda about: {**about, "sample": 3}, "does not know"),
        (
            lambda about: {**about, "settings": {**about["settings"], "text_prompts": 70}},
            "can't be attached: text_prompts=70",
        ),
    ],
)
def test_headers_that_are_not_ours(
    made: tuple[Any, Path], tmp_path: Path, change: Any, text: str
) -> None:
    with safe_open(made[1], "pt") as file:
        about = json.loads(file.metadata()["openvclip_prompts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = change(about)
    changed = changed if isinstance(changed, str) else json.dumps(changed)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata={"openvclip_prompts": changed})
    with pytest.raises(CheckpointError, match=text):
        P.load(prompt_clip(), path)


def test_entries_that_the_header_does_not_tell_of(made: tuple[Any, Path], tmp_path: Path) -> None:
    with safe_open(made[1], "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["text.context"] = tensors["text.context"][..., :4].contiguous()
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata=metadata)
    other = prompt_clip()
    before = anatomy(other)
    with pytest.raises(StateMismatchError, match=r"shape of openvclip_prompts\.text\.context"):
        P.load(other, path)
    assert anatomy(other) == before
