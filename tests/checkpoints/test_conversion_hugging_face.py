"""Files that Hugging Face's models write, and the features of models that load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import openvclip
from openvclip.errors import StateMismatchError
from tests.checkpoints.test_conversion import clip_state, hugging_face, quick_clip, same_entries
from tests.helpers import TINY_PIXELS, same_bits


def hugging_face_model(kind: str = "CLIPModel") -> Any:
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    tower |= {"projection_dim": 8, "hidden_act": "quick_gelu"}
    ids = {"eos_token_id": 63, "bos_token_id": 62, "pad_token_id": 0}
    text = transformers.CLIPTextConfig(
        **tower, **ids, num_hidden_layers=1, vocab_size=64, max_position_embeddings=8
    )
    vision = transformers.CLIPVisionConfig(
        **tower, num_hidden_layers=3, image_size=TINY_PIXELS, patch_size=4
    )
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
        )
    else:
        config = vision if "Vision" in kind else text
    torch.manual_seed(4)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def test_features_agree_with_those_of_hugging_face(tmp_path: Path) -> None:
    hf_model, clip_model = hugging_face_model(), quick_clip()
    save_file(hf_model.state_dict(), tmp_path / "w")
    openvclip.load_checkpoint(tmp_path / "w", clip_model)
    images = torch.randn(2, 3, TINY_PIXELS, TINY_PIXELS)
    tokens = torch.tensor([[62, 5, 9, 63, 0, 0, 0, 0], [62, 7, 1, 2, 3, 4, 5, 63]])
    out = hf_model(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(clip_model.encode_image(images, normalize=True), out.image_embeds)
    torch.testing.assert_close(clip_model.encode_text(tokens, normalize=True), out.text_embeds)
    assert same_bits(clip_model.logit_scale.data, hf_model.logit_scale.data)


def test_files_that_transformers_writes_are_known(tmp_path: Path) -> None:
    hf_model = hugging_face_model()
    hf_model.save_pretrained(tmp_path)
    loaded = openvclip.load_checkpoint(tmp_path / "model.safetensors", quick_clip())
    same_entries(hugging_face(loaded), dict(hf_model.state_dict()))


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@torch.no_grad()
def test_an_image_tower_of_hugging_face_alone(tmp_path: Path, kind: str) -> None:
    hf_model = hugging_face_model(kind)
    hf_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    info = openvclip.inspect_checkpoint(file)
    assert (info.family, info.left_over, info.missing) == ("Hugging Face CLIP", (), ())
    assert (info.image_size, info.vision_layers, info.text_width) == (8, 3, None)
    state = openvclip.load_checkpoint(file)
    assert all(name.startswith("visual.") for name in state)

    clip_model = quick_clip()
    text = {name: v.clone() for name, v in clip_model.state_dict().items() if "visual" not in name}
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(file, clip_model)
    absent = set(text) | ({"visual.proj"} if kind == "CLIPVisionModel" else set())
    assert set(caught.value.missing) == absent
    openvclip.load_checkpoint(file, clip_model, allow_missing=sorted(absent))
    images = torch.randn(2, 3, TINY_PIXELS, TINY_PIXELS)
    out = hf_model(pixel_values=images)
    if kind == "CLIPVisionModel":
        clip_model.visual.proj = None
        torch.testing.assert_close(clip_model.encode_image(images), out.pooler_output)
    else:
        torch.testing.assert_close(clip_model.encode_image(images), out.image_embeds)
    same_entries({name: clip_model.state_dict()[name] for name in text}, text)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_text_tower_of_hugging_face_alone(tmp_path: Path, kind: str) -> None:
    hugging_face_model(kind).save_pretrained(tmp_path)
    info = openvclip.inspect_checkpoint(tmp_path / "model.safetensors")
    assert (info.family, info.left_over, info.missing) == ("Hugging Face CLIP", (), ())
    assert (info.text_width, info.text_layers, info.vision_width) == (16, 1, None)
    state = openvclip.load_checkpoint(tmp_path / "model.safetensors")
    assert {"token_embedding.weight", "transformer.resblocks.0.attn.in_proj_bias"} <= state.keys()


def test_query_without_key_is_missing_and_left_over(tmp_path: Path) -> None:
    state = hugging_face(clip_state())
    gone = "vision_model.encoder.layers.2.self_attn.k_proj.weight"
    del state[gone]
    save_file(state, tmp_path / "w")
    with pytest.raises(StateMismatchError) as caught:
        openvclip.load_checkpoint(tmp_path / "w")
    assert caught.value.missing == ["visual.transformer.resblocks.2.attn.in_proj_weight"]
    assert caught.value.unexpected == [gone.replace("k_proj", x) for x in ("q_proj", "v_proj")]
