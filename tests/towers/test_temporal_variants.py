"""Temporal attention of open_clip's VisionTransformer with each of its options."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from tests.helpers import (
    TEXT,
    VISION,
    gradients,
    random_video,
    randomise,
    same_bits,
    set_attention_dropout,
    tiny_clip,
    tiny_tower,
    with_the_batch_second,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.5},
    "no ln_pre": {"no_ln_pre": True},
    "average pool": {"pool_type": "avg"},
    "final ln after pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "attentional pool": {
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
    },
    "parallel pool": {
        "attentional_pool": "parallel",
        "output_dim": 16,  # open_clip normalises the tokens with ln_post, made for output_dim
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
    },
    "patch dropout": {"patch_dropout": 0.5},
    "sin-cos": {"pos_embed_type": "sin_cos_2d"},
    "custom block": {"block_type": "custom"},
    "q/k norm": {"qk_norm": True},
    "head scale": {"scale_heads": True},
    "inner norm": {"scale_attn_inner": True},
    "attention norm": {"scale_attn": True},
    "mlp norm": {"scale_fc": True},
    "all norms": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True},
    "oblong": {"image_size": (8, 12)},
}


def still_clip(tower: Any, frames: int = 3) -> tuple[Tensor, Tensor]:
    height, width = tower.image_size
    still = torch.randn(2, 3, height, width)
    return still, still[:, None].expand(-1, frames, -1, -1, -1)


@pytest.mark.parametrize("boundary", ["mask", "replicate"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_static_clip_is_the_image(name: str, boundary: Any) -> None:
    tower = tiny_tower(**VARIANTS[name])
    still, clip = still_clip(tower)
    with torch.no_grad():
        expected = tower(still)
        expand_temporal_attention(tower, window=2, boundary=boundary)
        got = tower(clip)
        assert same_bits(tower(still), expected)
    for t in range(3):
        torch.testing.assert_close(got[:, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_neighbours_are_seen_and_gradients_reach_every_parameter(name: str) -> None:
    tower = tiny_tower(**VARIANTS[name])
    video = torch.randn(1, 4, 3, *tower.image_size)
    with torch.no_grad():
        apart = tower(video[0])
    if apart.ndim == 2:
        tower.zero_grad()
        tower(video[0]).square().sum().backward()
    reached = gradients(tower).keys()
    expand_temporal_attention(tower, boundary="replicate")
    for mode in (True, False):
        tower.train(mode).zero_grad()
        out = tower(video)
        assert out.shape == (1, *apart.shape)
        out.square().sum().backward()
        assert reached <= gradients(tower).keys()
        assert all(torch.isfinite(grad).all() for grad in gradients(tower).values())
    assert (out[0] - apart).abs().max() > 1e-4


def test_scaled_cosine_attention() -> None:
    """open_clip's own forward fails for this block, so its formula is the reference here."""
    tower = tiny_tower(scaled_cosine_attn=True)
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            block.attn.logit_scale += torch.tensor([0.5, 9.0]).view(2, 1, 1)  # one is clamped
    attn = tower.transformer.resblocks[0].attn
    x = torch.randn(1, 2, 5, 16)
    q, k, v = functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * (h + 1))
        frames = []
        for t in range(2):
            keys, values = k[0, :, :, part].flatten(0, 1), v[0, :, :, part].flatten(0, 1)
            cosine = (
                functional.normalize(q[0, t, :, part], dim=-1)
                @ functional.normalize(keys, dim=-1).T
            )
            scale = attn.logit_scale[h, 0, 0].clamp(max=attn.logit_scale_max).exp()
            frames.append((cosine * scale).softmax(-1) @ values)
        heads.append(torch.stack(frames))
    expected = attn.out_proj(torch.cat(heads, dim=-1))
    expand_temporal_attention(tower, boundary="mask")
    torch.testing.assert_close(attn(x)[0], expected, rtol=1e-4, atol=1e-5)
    still, clip = still_clip(tower)
    out = tower(clip)
    torch.testing.assert_close(out[:, 0], tower(still[:, None])[:, 0], rtol=1e-4, atol=1e-5)


def test_batch_second() -> None:
    first, second = tiny_tower(), with_the_batch_second(tiny_tower())
    video = random_video(2, 3)
    expected = expand_temporal_attention(first)(video)
    assert not second.transformer.resblocks[0].attn.batch_first
    images = second(video[0])
    expand_temporal_attention(second)
    torch.testing.assert_close(second(video), expected, rtol=1e-4, atol=1e-5)
    assert same_bits(second(video[0]), images)


def test_output_tokens() -> None:
    tower = tiny_tower(output_tokens=True)
    still, clip = still_clip(tower)
    pooled, tokens = tower(still)
    expand_temporal_attention(tower, boundary="mask")
    of_frames, of_tokens = tower(clip)
    assert of_frames.shape == (2, 3, 8)
    assert of_tokens.shape == (2, 3, *tokens.shape[1:])
    torch.testing.assert_close(of_frames[:, 1], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_tokens[:, 1], tokens, rtol=1e-4, atol=1e-5)


def test_patch_dropout_drops_patches_of_videos_in_training() -> None:
    tower = expand_temporal_attention(tiny_tower(patch_dropout=0.5))
    video = random_video(2, 3)
    assert same_bits(tower(video), tower(video))
    tower.train()
    assert not torch.allclose(tower(video), tower(video))
    tokens: list[torch.Size] = []
    handle = tower.transformer.register_forward_hook(lambda m, i, o: tokens.append(o.shape))
    tower(video)
    handle.remove()
    assert tokens == [(2, 3, 1 + 2, 16)]


def test_attention_dropout_works_in_training_alone() -> None:
    tower = expand_temporal_attention(tiny_tower())
    video = random_video(1, 3)
    quiet = tower(video)
    set_attention_dropout(tower, 0.5)
    assert same_bits(tower(video), quiet)
    tower.train()
    assert not torch.allclose(tower(video), quiet)


def test_coca() -> None:
    torch.manual_seed(0)
    pooling = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    model = open_clip.CoCa(
        embed_dim=8,
        multimodal_cfg={"width": 8, "heads": 2, "layers": 1, "context_length": 8},
        text_cfg=dict(TEXT, embed_cls=True, output_tokens=True),
        vision_cfg=dict(VISION, output_tokens=True, **pooling),
    ).eval()
    randomise(model)
    still, clip = still_clip(model.visual)
    with torch.no_grad():
        expected = model.encode_image(still)
        expand_temporal_attention(model, boundary="replicate")
        assert same_bits(model.encode_image(still), expected)
        got = model.encode_image(clip)
        torch.testing.assert_close(got[:, 1], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encode_video(model, clip), expected, rtol=1e-4, atol=1e-5)


def test_custom_text_clip() -> None:
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(
        embed_dim=8, vision_cfg=dict(VISION), text_cfg=dict(TEXT)
    ).eval()
    still, clip = still_clip(model.visual)
    expected = model.encode_image(still)
    expand_temporal_attention(model, boundary="mask")
    torch.testing.assert_close(model.encode_image(clip)[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert type(restore_spatial_attention(model).visual) is VisionTransformer


def test_a_tower_inside_a_wrapper() -> None:
    model = tiny_clip()
    wrapped = torch.nn.DataParallel(model)
    assert expand_temporal_attention(wrapped) is wrapped
    assert model.encode_image(random_video(1, 2)).shape == (1, 2, 8)
