"""Prompts on the vision models of Hugging Face's CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from openvclip import expand_temporal_attention
from openvclip import prompting as P
from openvclip.errors import UnsupportedModelError, UsageError
from tests.helpers import random_video, same_bits
from tests.prompting import towers as laws
from tests.prompting.reference import NAMES, word_tokenizer
from tests.prompting.test_released import VIFI, VITA, by_hand, fill, golden
from tests.prompting.towers import METHODS, vifi, vita
from tests.towers.test_temporal_hf import (
    CASES,
    MODELS,
    checkpoint,
    features,
    hugging_face_names,
    make,
    slow_attention,
    transformers,
)
from tests.towers.tower_laws import Case, images

SDPA = {name: CASES[f"{name}-sdpa"] for name in MODELS}
CASES_OF_LAWS = ("CLIPModel-eager", "SiglipVisionModel-sdpa")


@pytest.mark.parametrize("expansion", [{}, {"window": 1, "boundary": "zero"}], ids=str)
@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("name", SDPA)
def test_the_model_equals_the_loops(name: str, attach: Any, expansion: dict[str, Any]) -> None:
    settings = (expansion["window"], expansion["boundary"]) if expansion else (0, "mask")
    of_clip = "CLIP" in name
    laws.equals_the_hooked_tower(
        SDPA[name],
        attach,
        partial(slow_attention, settings=settings),
        prefix=int(of_clip),
        class_token=of_clip,
        tolerance=1e-9,
        **expansion,
    )


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "expanded"])
@pytest.mark.parametrize("name", CASES_OF_LAWS)
def test_law(name: str, expanded: bool, law: Callable[[Case, bool], None]) -> None:
    law(CASES[name], expanded)


@pytest.mark.parametrize("name", SDPA)
def test_files_go_there_and_back(name: str, tmp_path: Path) -> None:
    laws.files_go_there_and_back(SDPA[name], tmp_path / "prompts.safetensors")


def test_compiled_in_one_graph() -> None:
    laws.compiled_in_one_graph(SDPA["CLIPModel"], vita)


# --- the released implementations --------------------------------------------------------------


def golden_model(weights: dict[str, Any]) -> Any:
    """The golden tower's sizes and weights in ``CLIPVisionModelWithProjection``."""
    config = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=48,
        hidden_act="quick_gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(hugging_face_names(weights))
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vifi_equals_the_release(checkpointing: bool) -> None:
    released, video, output = golden(VIFI)
    model = golden_model({n: v for n, v in released.items() if "VPT" not in n})
    if checkpointing:
        checkpoint(model.train())
    P.attach_vifi(model, vision_prompts=3, vision_depth=2, text_prompts=0)
    names = ("VPT", "transformer.resblocks.1.VPT_shallow")
    fill(model, {"tokens": torch.stack([released[name] for name in names])})
    torch.testing.assert_close(features(model, video), output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vita_equals_the_release(checkpointing: bool) -> None:
    released, video, output = golden(VITA)
    weights, prompts = by_hand(released)
    model = golden_model(weights)
    if checkpointing:
        checkpoint(model.train())
    P.attach_vita(model, frames=4, global_prompts=3, text_prompts=0)
    fill(model, prompts)
    torch.testing.assert_close(features(model, video).mean(1), output, rtol=0, atol=1e-5)


def test_prompts_of_a_release_go_onto_a_model_of_hugging_face_and_back(tmp_path: Path) -> None:
    """The file was written with open_clip's tower. Loading it does not warn of other weights."""
    released, video, output = golden(VITA)
    first: Any = P.load_released(released)
    P.save(first, tmp_path / "vita.safetensors")
    model = P.load(golden_model(by_hand(released)[0]), tmp_path / "vita.safetensors")
    torch.testing.assert_close(features(model, video).mean(1), output, rtol=0, atol=1e-5)
    P.save(model, tmp_path / "again.safetensors")
    P.load(P.detach(first), tmp_path / "again.safetensors")
    torch.testing.assert_close(first(video).mean(1), output, rtol=0, atol=1e-5)


# --- the rest of transformers ------------------------------------------------------------------


@pytest.mark.parametrize("name", SDPA)
def test_the_shapes_of_the_outputs(name: str) -> None:
    """The tokens that the model returns include no prompts."""
    tokens = 4 if "Siglip" in name else 5
    for attach in METHODS:
        model = attach(make(name))
        call = getattr(model, "get_image_features", model)
        out = call(pixel_values=random_video(2, 3))
        assert out.last_hidden_state.shape == (2, 3, tokens, 16)
        as_tuple = call(pixel_values=random_video(2, 3), return_dict=False)
        assert any(same_bits(x, features(model, random_video(2, 3))) for x in as_tuple)
    model = vifi(make(name))
    call = getattr(model, "get_image_features", model)
    assert call(pixel_values=images()).last_hidden_state.shape == (4, tokens, 16)
    as_tuple = call(pixel_values=images(), return_dict=False)
    assert any(same_bits(x, features(model, images())) for x in as_tuple)


@pytest.mark.parametrize("name", SDPA)
def test_hidden_states_and_attentions_are_refused(name: str) -> None:
    model = vifi(make(name, "eager"))
    call = getattr(model, "get_image_features", model)
    for pixels in (images(), random_video(1, 2)):
        with pytest.raises(UsageError, match="output_hidden_states does not support prompts"):
            call(pixel_values=pixels, output_hidden_states=True)
        with pytest.raises(UsageError, match="output_attentions is for images"):
            call(pixel_values=pixels, output_attentions=True)


def test_a_model_is_saved_as_the_model_that_it_is(tmp_path: Path) -> None:
    model = vita(expand_temporal_attention(make("CLIPModel")))
    model.save_pretrained(tmp_path)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["CLIPModel"]
    expected = features(make("CLIPModel"), images())
    assert same_bits(features(loaded.eval(), images()), expected)


def test_text_prompts_need_a_text_tower() -> None:
    model = make("CLIPVisionModel")
    for attach in (partial(P.attach_vifi, vision_depth=2), P.attach_vita):
        with pytest.raises(
            UnsupportedModelError, match=r"CLIPVisionModel has no text tower.*open_clip"
        ):
            attach(model)
    with pytest.raises(UnsupportedModelError, match=r"CLIPVisionModel has no text tower\. Load"):
        P.VideoClassifier(vifi(model), word_tokenizer, NAMES)


def test_models_that_pool_themselves_are_refused() -> None:
    model = transformers.CLIPForImageClassification(make("CLIPModel").config)
    with pytest.raises(UnsupportedModelError, match="ForImageClassification pools the tokens"):
        vifi(model)
