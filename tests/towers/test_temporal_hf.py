"""Temporal attention of Hugging Face's CLIP and SigLIP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from tests.helpers import REPO, random_video, randomise, same_bits
from tests.towers.test_temporal_reference import equation_3
from tests.towers.tower_laws import (
    CLOSE,
    LAWS,
    Case,
    compiled_in_one_graph,
    equals_equation_3,
    equation_3_settings,
    golden,
    images,
)

transformers = pytest.importorskip("transformers", minversion="5")

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 63,
    "pad_token_id": 1,
}


def clip_vision(**changes: Any) -> Any:
    return transformers.CLIPVisionConfig(**{**VISION, "projection_dim": 8, **changes})


def siglip_vision(**changes: Any) -> Any:
    return transformers.SiglipVisionConfig(**{**VISION, **changes})


def clip(**changes: Any) -> Any:
    config = transformers.CLIPConfig(
        vision_config={**VISION, **changes}, text_config=TEXT, projection_dim=8
    )
    return transformers.CLIPModel(config)


def siglip(**changes: Any) -> Any:
    config = transformers.SiglipConfig(vision_config={**VISION, **changes}, text_config=TEXT)
    return transformers.SiglipModel(config)


MODELS: dict[str, Callable[..., Any]] = {
    "CLIPModel": clip,
    "CLIPVisionModel": lambda **c: transformers.CLIPVisionModel(clip_vision(**c)),
    "CLIPVisionModelWithProjection": lambda **c: transformers.CLIPVisionModelWithProjection(
        clip_vision(**c)
    ),
    "SiglipModel": siglip,
    "SiglipVisionModel": lambda **c: transformers.SiglipVisionModel(siglip_vision(**c)),
}


def make(name: str, implementation: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = randomise(MODELS[name](**changes)).eval()
    model.set_attn_implementation(implementation)
    return model


def features(model: Any, x: Tensor) -> Tensor:
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=x)
    else:
        out = model(pixel_values=x)
    pooled: Tensor = out.image_embeds if "image_embeds" in out else out.pooler_output
    return pooled


def checkpoint(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name in the first releases of transformers 5
        model.gradient_checkpointing_enable()


CASES = {
    f"{name}-{implementation}": Case(
        name,
        partial(make, name, implementation),
        features,
        checkpoint,
    )
    for name in MODELS
    for implementation in ("eager", "sdpa")
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_law(name: str, law: Callable[[Case], None]) -> None:
    law(CASES[name])


@pytest.mark.parametrize(
    "case",
    [
        CASES["CLIPModel-sdpa"],
        # One layer, which is compiled in half the time.
        replace(
            CASES["SiglipVisionModel-eager"],
            make=partial(make, "SiglipVisionModel", "eager", num_hidden_layers=1),
        ),
    ],
    ids=lambda case: case.name,
)
def test_compiled_in_one_graph(case: Case) -> None:
    compiled_in_one_graph(case)


# --- Equation 3 and the released implementation ------------------------------------------------


def slow_attention(
    attn: Any, hidden_states: Tensor, *_: Any, settings: tuple[int, str], **__: Any
) -> tuple[Tensor, None]:
    """Self-attention of one clip's tokens ``[T, N, D]``, head by head."""
    layers = (attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (hidden_states @ layer.weight.T + layer.bias for layer in layers)
    d = hidden_states.shape[-1] // attn.num_heads
    heads = [
        equation_3(q[..., part], k[..., part], v[..., part], *settings)
        for part in (slice(h * d, (h + 1) * d) for h in range(attn.num_heads))
    ]
    return torch.cat(heads, dim=-1) @ attn.out_proj.weight.T + attn.out_proj.bias, None


@equation_3_settings
@pytest.mark.parametrize("name", CASES)
def test_the_tower_equals_equation_3(name: str, window: int, boundary: Any) -> None:
    equals_equation_3(CASES[name], slow_attention, window, boundary, tolerance=1e-9)


RENAMED = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


def hugging_face_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an OpenAI visual tower to ``CLIPVisionModelWithProjection``."""
    state = {"visual_projection.weight": weights["proj"].T.contiguous()}
    for name, value in weights.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        name = f"vision_model.{name}"
        if "attn.in_proj_" in name:
            start, kind = name.split("attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[f"{start}self_attn.{letter}_proj.{kind}"] = part
        elif not name.endswith(".proj"):
            state[name] = value
    return state


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_released_implementation(implementation: str, checkpointing: bool) -> None:
    tensors, sizes = golden()
    config = transformers.CLIPVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=4 * sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch"],
        projection_dim=sizes["embed_dim"],
        hidden_act="quick_gelu",
        attn_implementation=implementation,
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    prefix = "weights."
    weights = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    model.load_state_dict(hugging_face_names(weights))
    if checkpointing:
        checkpoint(model.train())
    expand_temporal_attention(model)
    got = model(pixel_values=tensors["input"]).image_embeds
    assert (got - tensors["output"]).abs().max() < 1e-4


# --- outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_of_the_outputs(name: str) -> None:
    model = expand_temporal_attention(make(name))
    tokens = 4 if "Siglip" in name else 5
    call = getattr(model, "get_image_features", model)
    out = call(pixel_values=random_video(2, 3), output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 3, tokens, 16)
    assert [h.shape for h in out.hidden_states] == [(2, 3, tokens, 16)] * 3
    as_tuple = call(pixel_values=random_video(2, 3), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert any(same_bits(x, features(model, random_video(2, 3))) for x in as_tuple)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_weights_of_images_are_what_they_were(name: str) -> None:
    model = make(name, "eager")
    call = getattr(model, "get_image_features", model)
    options = {"pixel_values": images(), "output_hidden_states": True, "output_attentions": True}
    before = call(**options)
    expand_temporal_attention(model)
    after = call(**options)
    assert before.keys() == after.keys()
    for name, n in (("hidden_states", 3), ("attentions", 2)):
        assert len(before[name]) == n
        for x, y in zip(before[name], after[name], strict=True):
            assert same_bits(x, y)


@pytest.mark.parametrize("name", MODELS)
def test_attention_weights_and_masks_of_videos_are_refused(name: str) -> None:
    model = expand_temporal_attention(make(name, "eager"))
    call = getattr(model, "get_image_features", model)
    with pytest.raises(UsageError, match="output_attentions is for images"):
        call(pixel_values=random_video(1, 2), output_attentions=True)
    tower = getattr(model, "vision_model", model)
    tower.config.output_attentions = True
    with pytest.raises(UsageError, match="output_attentions is for images"):
        tower(pixel_values=random_video(1, 2))
    tower.config.output_attentions = False
    with pytest.raises(UsageError, match="attention_mask is for images"):
        call(pixel_values=random_video(1, 2), attention_mask=torch.zeros(1, 1, 5, 5))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipVisionModel"])
def test_videos_pass_by_implementations_that_are_not_there(name: str) -> None:
    """Images need flash attention, which is not installed here. Videos do not need it."""
    model = expand_temporal_attention(make(name))
    expected = features(model, random_video(2, 3))
    for module in model.modules():
        if hasattr(module, "view"):
            module.config._attn_implementation = "flash_attention_2"
    assert same_bits(features(model, random_video(2, 3)), expected)
    with pytest.raises((ImportError, KeyError, TypeError)):
        features(model, images())


def test_attention_dropout_works_in_training_alone() -> None:
    model = expand_temporal_attention(make("CLIPVisionModel", attention_dropout=0.5))
    video = random_video(1, 3)
    assert same_bits(features(model, video), features(model, video))
    model.train()
    assert not torch.allclose(features(model, video), features(model, video))


@pytest.mark.parametrize("name", MODELS)
def test_frames_of_other_sizes_by_interpolation(name: str) -> None:
    model, still = make(name), torch.randn(2, 3, 12, 16)
    call = getattr(model, "get_image_features", model)
    key = "image_embeds" if "Projection" in name else "pooler_output"
    expected = call(pixel_values=still, interpolate_pos_encoding=True)[key]
    expand_temporal_attention(model, boundary="mask")
    video = still[:, None].expand(-1, 3, -1, -1, -1)
    got = call(pixel_values=video, interpolate_pos_encoding=True)[key]
    torch.testing.assert_close(got[:, 2], expected, **CLOSE)
    with pytest.raises(VideoShapeError, match=r"12 x 16 pixels .* the model takes 8 x 8"):
        call(pixel_values=video)


def test_siglip_without_a_head_has_no_features() -> None:
    model = make("SiglipVisionModel", vision_use_head=False)
    expand_temporal_attention(model)
    out = model(pixel_values=random_video(2, 3))
    assert out.last_hidden_state.shape == (2, 3, 4, 16)
    assert out.pooler_output is None
    with pytest.raises(UnsupportedModelError, match="no single feature vector"):
        encode_video(model, random_video(2, 3))


# --- the rest of transformers ------------------------------------------------------------------


def test_the_text_tower_is_left_alone() -> None:
    model = make("CLIPModel")
    tokens = torch.tensor([[0, 5, 7, 63]])
    before = model.get_text_features(input_ids=tokens).pooler_output
    expand_temporal_attention(model)
    assert same_bits(model.get_text_features(input_ids=tokens).pooler_output, before)
    assert type(model.text_model.encoder.layers[0].self_attn).__module__.startswith("transformers")
    logits = model(input_ids=tokens, pixel_values=images()).logits_per_image
    assert logits.shape == (4, 1)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipModel"])
def test_an_expanded_model_is_saved_as_the_model_that_it_is(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    model = expand_temporal_attention(make(name))
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, name)
    loaded = kind.from_pretrained(tmp_path).to(device)
    assert loaded.config.architectures == [name]
    assert same_bits(features(loaded.eval(), images()), features(model, images()))
    assert type(restore_spatial_attention(model)) is kind


def test_a_compiled_vision_model() -> None:
    torch._dynamo.reset()
    model, video = expand_temporal_attention(make("CLIPVisionModel")), random_video(1, 2)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(encode_video(compiled, video), encode_video(model, video))


def test_models_of_other_kinds() -> None:
    config = transformers.ViTConfig(**VISION)
    with pytest.raises(UnsupportedModelError, match=r"is a ViTModel, .* Hugging Face's CLIP"):
        expand_temporal_attention(transformers.ViTModel(config))
    with pytest.raises(UnsupportedModelError, match="ViTModel has no encode_image"):
        encode_video(transformers.ViTModel(config), random_video(1, 1))
    kinds: list[tuple[Any, Any]] = [
        (transformers.CLIPForImageClassification, clip().config),
        (transformers.SiglipForImageClassification, siglip().config),
    ]
    for kind, config in kinds:
        with pytest.raises(UnsupportedModelError, match="ForImageClassification pools the tokens"):
            expand_temporal_attention(kind(config))
    model = make("CLIPVisionModel")
    model.encoder.layers[1].self_attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"Layer 1 .* type Identity; expected transf"):
        expand_temporal_attention(model)


def test_transformers_is_imported_only_where_its_models_are() -> None:
    code = (
        "import sys, torch, openvclip\n"
        "assert 'timm' not in sys.modules and 'transformers' not in sys.modules\n"
        "import open_clip\n"
        "tower = open_clip.transformer.VisionTransformer(8, 4, 16, 1, 2, 2.0, output_dim=8)\n"
        "openvclip.expand_temporal_attention(tower)\n"
        "assert 'openvclip.towers.hf' not in sys.modules\n"
        "assert 'transformers.models.clip.modeling_clip' not in sys.modules\n"
        "import transformers.models.clip.modeling_clip\n"
        "openvclip.restore_spatial_attention(tower)\n"
        "assert 'openvclip.towers.hf' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
