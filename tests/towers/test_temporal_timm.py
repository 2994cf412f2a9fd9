"""Temporal attention of timm's ViT and Eva towers, alone and inside open_clip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from timm.layers import Attention, AttentionRope, DiffAttention, HybridEmbed, SimpleNorm
from timm.models.eva import Eva, EvaAttention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
    checkpoint_filter_fn,
)
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import Tensor, nn

from openvclip import (
    encode_video,
    expand_temporal_attention,
    restore_spatial_attention,
)
from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from tests.helpers import TEXT, gradients, random_video, randomise, same_bits, tiny_tower
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
    slow_features,
)

SIZE: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_classes": 8,
}


def vitamin() -> VisionTransformer:
    """ViTamin's convolutional stem and mlp; the stem makes 2 x 2 tokens of 32 x 32 pixels."""
    stem = MbConvStages(VitCfg(embed_dim=(4, 4, 16), depths=(1, 1, 1), stem_width=4))
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    settings = {"patch_size": 1, "embed_layer": embed, "mlp_layer": GeGluMlp, "img_size": 32}
    return VisionTransformer(**{**SIZE, **settings, "class_token": False, "global_pool": "avg"})


def vit(**changes: Any) -> Callable[[], nn.Module]:
    return partial(VisionTransformer, **{**SIZE, **changes})


def eva(**changes: Any) -> Callable[[], nn.Module]:
    return partial(Eva, **{**SIZE, "use_rot_pos_emb": True, **changes})


KINDS: dict[str, Callable[[], nn.Module]] = {
    "siglip": vit(class_token=False, global_pool="map", num_classes=0),
    "clip": vit(pre_norm=True),
    "q/k norm": vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.5),
    "simple q/k norm": vit(qk_norm=True, norm_layer=SimpleNorm),
    "registers": vit(reg_tokens=2, no_embed_class=True, global_pool="avg"),
    "post norm": vit(block_fn=ResPostBlock, init_values=0.5),
    "any size": vit(dynamic_img_size=True),
    "eva01": eva(use_rot_pos_emb=False, qkv_fused=True),
    "eva01 post norm": eva(use_rot_pos_emb=False, use_post_norm=True),
    "eva02": eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    "eva02 fused": eva(qkv_fused=True, init_values=0.5, dynamic_img_size=True),
    "perception encoder": eva(
        attn_type="rope",
        global_pool="map",
        rope_grid_offset=1.0,
        rope_grid_indexing="xy",
        use_pre_transformer_norm=True,
        init_values=0.1,
    ),
    "grouped heads": eva(
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        qk_norm=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=2,
    ),
    "mixed rope": eva(rope_type="mixed", attn_type="rope"),
}


def call(model: Any, x: Tensor) -> Tensor:
    features: Tensor = model(x)
    return features


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind()).eval()


def in_open_clip(name: str = "test_vit", **timm_settings: Any) -> Any:
    """An open_clip model around one of timm's test models, on 32 x 32 pixels."""
    vision = {"timm_model_name": name, "image_size": 32, **timm_settings}
    model = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=dict(TEXT))
    model.visual.set_input_size(32)
    return model


CASES = {
    name: Case(name, partial(make, kind), call, lambda model: model.set_grad_checkpointing())
    for name, kind in KINDS.items()
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_law(name: str, law: Callable[[Case], None]) -> None:
    law(CASES[name])


@pytest.mark.parametrize(
    ("name", "layers"),
    [("siglip", 1), ("eva02", 1), ("mixed rope", 2)],  # one layer is compiled in half the time
)
def test_compiled_in_one_graph(name: str, layers: int) -> None:
    kind = partial(KINDS[name], depth=layers)
    compiled_in_one_graph(replace(CASES[name], make=partial(make, kind)))


# --- Equation 3 --------------------------------------------------------------------------------


def rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Rotate each pair of channels of ``[T, N, d]`` by its angle, in a loop."""
    sin, cos = rope.double().chunk(2, dim=-1)
    d = x.shape[-1]
    pairs = [(i, i + d // 2) if half else (2 * i, 2 * i + 1) for i in range(d // 2)]
    out = torch.empty_like(x)
    for i, j in pairs:
        out[..., i] = x[..., i] * cos[:, i] - x[..., j] * sin[:, i]
        out[..., j] = x[..., j] * cos[:, j] + x[..., i] * sin[:, j]
    return out


def projections(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    q, k, v = (x @ part.T for part in attn.qkv.weight.chunk(3))
    if attn.qkv.bias is not None:
        of_q, of_k, of_v = attn.qkv.bias.chunk(3)
        return q + of_q, k + of_k, v + of_v
    if getattr(attn, "q_bias", None) is not None:
        return q + attn.q_bias, k, v + attn.v_bias
    return q, k, v


def slow_attention(
    attn: Any, x: Tensor, rope: Tensor | None = None, *, settings: tuple[int, str], **_: Any
) -> Tensor:
    """Self-attention of one clip's tokens ``[T, N, D]``, head by head."""
    q, k, v = projections(attn, x)
    heads = []
    d = attn.head_dim
    for h in range(attn.num_heads):
        of_keys = h // getattr(attn, "num_kv_groups", 1)
        one_q = attn.q_norm(q[..., h * d : (h + 1) * d])
        one_k = attn.k_norm(k[..., of_keys * d : (of_keys + 1) * d])
        one_v = v[..., of_keys * d : (of_keys + 1) * d]
        if rope is not None:
            n, angles = attn.num_prefix_tokens, rope if rope.ndim == 2 else rope[h]
            m = n + len(angles)  # tokens after the patches have no place in the image
            one_q, one_k = (
                torch.cat([y[:, :n], rotated(y[:, n:m], angles, attn.rotate_half), y[:, m:]], dim=1)
                for y in (one_q, one_k)
            )
        heads.append(equation_3(one_q, one_k, one_v, *settings))
    y = attn.norm(torch.cat(heads, dim=-1))
    if attn.gate is not None:
        y = y * torch.sigmoid(attn.gate(x))
    out: Tensor = attn.proj(y)
    return out


@equation_3_settings
@pytest.mark.parametrize("name", CASES)
def test_the_tower_equals_equation_3(name: str, window: int, boundary: Any) -> None:
    equals_equation_3(CASES[name], slow_attention, window, boundary, tolerance=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Attention, {"gated": True, "scale_norm": True}),
        (AttentionRope, {"gated": True, "scale_norm": True}),
        (EvaAttention, {"gated": True}),
        (EvaAttention, {"qkv_bias_separate": True}),
    ],
)
def test_options_of_attentions_that_no_tower_sets(kind: Any, options: dict[str, Any]) -> None:
    tower: Any = make(KINDS["clip" if kind is Attention else "eva02"])
    for block in tower.blocks:
        block.attn = kind(16, num_heads=2, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    case = Case("", lambda: randomise(copy.deepcopy(tower)), call, lambda model: None)
    slow = partial(slow_attention, settings=(1, "zero"))
    with torch.no_grad():
        got, expected = slow_features(case, random_video(1, 4), slow)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


# --- the released implementation ---------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_released_implementation(checkpointing: bool) -> None:
    tensors, sizes = golden()
    tower = VisionTransformer(
        img_size=sizes["image_size"],
        patch_size=sizes["patch"],
        embed_dim=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        num_classes=sizes["embed_dim"],
        act_layer="quick_gelu",
        norm_layer=nn.LayerNorm,
        qkv_bias=True,
        pre_norm=True,
    ).eval()
    weights = {n.replace("weights.", "visual."): v for n, v in tensors.items()}
    tower.load_state_dict(checkpoint_filter_fn(weights, tower))
    tower.set_grad_checkpointing(checkpointing)
    expand_temporal_attention(tower)
    assert (tower(tensors["input"]) - tensors["output"]).abs().max() < 1e-4


# --- inside open_clip, and other ways in -------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"timm_pool": "map", "timm_proj": "none"},
        {"timm_pool": "token", "timm_proj": "linear"},
        {"timm_pool": "avg", "timm_proj": "mlp"},
        {"timm_pool": "token", "timm_proj": None},
    ],
)
def test_inside_open_clip(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomise(in_open_clip(**settings), scale=0.1).eval()
    still = torch.randn(2, 3, 32, 32)
    clip = still[:, None].expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        expected = model.encode_image(still)
        plain = encode_video(model, clip)
        assert expand_temporal_attention(model, boundary="mask") is model
        assert same_bits(model.encode_image(still), expected)
        got = model.encode_image(clip)
        torch.testing.assert_close(got[:, 1], expected, **CLOSE)
        torch.testing.assert_close(encode_video(model, clip), plain, **CLOSE)
        torch.testing.assert_close(encode_video(model.visual, clip), plain, **CLOSE)
    with pytest.raises(VideoShapeError, match=r"40 x 32 pixels .* multiples of 16 x 16"):
        model.encode_image(torch.zeros(1, 2, 3, 40, 32))
    restore_spatial_attention(model)
    with pytest.raises(VideoShapeError, match=r"40 x 32 pixels .* multiples of 16 x 16"):
        encode_video(model, torch.zeros(1, 2, 3, 40, 32))
    with pytest.raises(VideoShapeError, match="dtype float64; the model's weights are float32"):
        encode_video(model, clip.double())


def test_encode_video_of_a_tower_of_open_clip() -> None:
    tower, video = tiny_tower(), random_video(2, 3)
    frames = nn.functional.normalize(tower(video.flatten(0, 1)), dim=-1).unflatten(0, (2, 3))
    torch.testing.assert_close(encode_video(tower, video), frames.mean(1), **CLOSE)
    frames = nn.functional.normalize(expand_temporal_attention(tower)(video), dim=-1)
    torch.testing.assert_close(encode_video(tower, video), frames.mean(1), **CLOSE)


def test_vitamin() -> None:
    tower: Any = make(vitamin)
    still = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tower(still)
        expand_temporal_attention(tower, boundary="replicate")
        assert same_bits(tower(still), expected)
        got = tower(still[:, None].expand(-1, 3, -1, -1, -1))
        torch.testing.assert_close(got[:, 1], expected, **CLOSE)
    tower.train().set_grad_checkpointing()
    tower(torch.randn(1, 3, 3, 32, 32)).square().sum().backward()
    assert gradients(tower).keys() == dict(tower.named_parameters()).keys()
    with pytest.raises(VideoShapeError, match="the model takes 32 x 32"):
        tower(torch.zeros(1, 2, 3, 64, 64))


def test_frames_of_any_size() -> None:
    tower: Any = expand_temporal_attention(make(vit(dynamic_img_size=True)))
    assert tower(torch.randn(1, 2, 3, 12, 16)).shape == (1, 2, 8)
    with pytest.raises(VideoShapeError, match=r"10 x 8 pixels .* multiples of 4 x 4"):
        tower(torch.zeros(1, 2, 3, 10, 8))
    padding: Any = make(vit(dynamic_img_size=True, dynamic_img_pad=True))
    assert expand_temporal_attention(padding)(torch.randn(1, 2, 3, 10, 8)).shape == (1, 2, 8)


def test_a_tower_without_pooling_gives_tokens() -> None:
    tower: Any = expand_temporal_attention(make(vit(global_pool="", num_classes=0)))
    video = random_video(2, 3)
    assert tower(video).shape == (2, 3, 5, 16)
    assert tower.forward_features(video).shape == (2, 3, 5, 16)
    with pytest.raises(UnsupportedModelError, match="no single feature vector for each frame"):
        encode_video(tower, video)


@pytest.mark.parametrize("name", ["clip", "eva02"])
def test_masks_are_for_images(name: str) -> None:
    tower: Any = expand_temporal_attention(make(KINDS[name]))
    assert tower(images(), is_causal=True).shape == (4, 8)
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}):
        with pytest.raises(UsageError, match="are for images"):
            tower(random_video(1, 2), **options)


# --- what can't be expanded --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_other_towers_in_open_clip(name: str) -> None:
    model = in_open_clip(name, timm_pool="avg", timm_proj="linear")
    kind = type(model.visual.trunk).__name__
    with pytest.raises(UnsupportedModelError, match=f"TimmModel around {kind}, which can't") as e:
        expand_temporal_attention(model)
    assert "timm's VisionTransformer" in str(e.value)
    video = torch.randn(2, 3, 3, 32, 32)
    assert encode_video(model.eval(), video).shape == (2, 8)  # frame by frame


def test_swin() -> None:
    swin = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4
    )
    with pytest.raises(UnsupportedModelError, match="is a SwinTransformer, which can't"):
        expand_temporal_attention(swin)
    with pytest.raises(UnsupportedModelError, match="SwinTransformer has no encode_image"):
        encode_video(swin, torch.zeros(1, 1, 3, 32, 32))


def test_other_blocks_and_attentions() -> None:
    with pytest.raises(UnsupportedModelError, match="made of ParallelScalingBlock blocks"):
        expand_temporal_attention(make(vit(block_fn=ParallelScalingBlock)))
    with pytest.raises(
        UnsupportedModelError, match=r"Layer 0 .* type DiffAttention; expected timm"
    ):
        expand_temporal_attention(make(vit(attn_layer=DiffAttention)))
