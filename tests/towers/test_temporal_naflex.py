"""Temporal attention and prompts of timm's NaFlexVit, alone and inside open_clip.

Report 51 (open_clip 4.2.0.dev0): towers of new kinds are expanded, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from timm.models.naflexvit import NaFlexVit, batch_patchify
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from openvclip import encode_video, expand_temporal_attention
from openvclip import prompting as P
from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from tests.helpers import TEXT, VISION, random_video, randomise, same_bits, tiny_clip
from tests.prompting import towers as prompt_laws
from tests.towers.test_temporal_timm import call, slow_attention
from tests.towers.tower_laws import (
    CLOSE,
    LAWS,
    Case,
    equals_equation_3,
    equation_3_settings,
    images,
)

SIZE: dict[str, Any] = {
    "img_size": 8,
    "pos_embed_grid_size": (2, 2),
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
SIGLIP2 = {"class_token": False, "global_pool": "map", "embed_proj_type": "linear"}
AXIAL = {"rope_type": "axial", "class_token": True, "reg_tokens": 1, "global_pool": "token"}
KINDS: dict[str, dict[str, Any]] = {
    "siglip 2": {**SIGLIP2, "num_classes": 0},
    "axial rope": {**AXIAL, "num_classes": 8},
    "mixed rope": {**AXIAL, "rope_type": "mixed", "pos_embed": "none", "num_classes": 8},
    "gated": {"attn_gated": True, "swiglu_mlp": True, "class_token": False, "global_pool": "avg"},
    "norm before": {"pre_norm": True, "class_token": True, "pos_embed": "factorized"},
}
PREFIX = {"siglip 2": 0, "axial rope": 2, "mixed rope": 2, "gated": 0, "norm before": 1}
BOTH = ("siglip 2", "axial rope")


def make(kind: dict[str, Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    return randomise(NaFlexVit(**{**SIZE, "num_classes": 8, **kind, **changes})).eval()


CASES = {
    name: Case(name, partial(make, kind), call, lambda model: model.set_grad_checkpointing())
    for name, kind in KINDS.items()
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", BOTH)
def test_law(name: str, law: Callable[[Case], None]) -> None:
    law(CASES[name])


@pytest.mark.parametrize("law", prompt_laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("name", "expanded"), [(BOTH[0], False), (BOTH[1], True)])
def test_law_of_prompts(name: str, expanded: bool, law: Callable[[Case, bool], None]) -> None:
    law(CASES[name], expanded)


@equation_3_settings
@pytest.mark.parametrize("name", CASES)
def test_the_tower_equals_equation_3(name: str, window: int, boundary: Any) -> None:
    equals_equation_3(CASES[name], slow_attention, window, boundary, tolerance=1e-6)


@pytest.mark.parametrize("attach", prompt_laws.METHODS)
@pytest.mark.parametrize("name", CASES)
def test_prompts_equal_the_loops(name: str, attach: Any) -> None:
    prompt_laws.equals_the_hooked_tower(
        CASES[name],
        attach,
        partial(slow_attention, settings=(1, "zero")),
        prefix=PREFIX[name],
        class_token=KINDS[name]["class_token"],
        tolerance=1e-6,
        window=1,
        boundary="zero",
    )


@pytest.mark.parametrize("rope", ["axial", "mixed", ""])
@pytest.mark.parametrize("prompted", [False, True])
def test_dropped_patches_take_their_angles_with_them(rope: str, prompted: bool) -> None:
    """The plain tower on the frames equals an expanded tower in which no frame sees another."""
    video, results = random_video(2, 3), []
    for expanded in (False, True):
        tower = make(AXIAL, rope_type=rope, patch_drop_rate=0.5)
        if expanded:
            expand_temporal_attention(tower, layers=[])
        if prompted:
            prompt_laws.vifi(tower)
        tower.train()
        torch.manual_seed(5)
        frames = video if expanded or prompted else video.flatten(0, 1)
        results.append(tower(frames).reshape(2, 3, -1))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_frames_of_any_size_that_the_patches_divide() -> None:
    tower = make(SIGLIP2)
    wide = torch.randn(2, 1, 3, 8, 12)
    expected = tower(wide[:, 0])
    expand_temporal_attention(tower, boundary="mask")
    torch.testing.assert_close(tower(wide)[:, 0], expected, **CLOSE)
    with pytest.raises(VideoShapeError, match=r"10 x 8 pixels .* multiples of 4 x 4"):
        tower(torch.zeros(1, 2, 3, 10, 8))


def patches_of(frames: Tensor) -> dict[str, Tensor]:
    """A NaFlex batch: patches, their places and which of them are valid."""
    patches, (rows, columns) = batch_patchify(frames, (4, 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    coord = torch.stack([y, x], dim=-1).reshape(1, -1, 2).expand(len(frames), -1, -1)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def test_batches_of_patches_are_images() -> None:
    tower = make(SIGLIP2)
    batch = patches_of(images(2))
    batch["patch_valid"][0, 3] = False
    expected, layers = tower(batch), tower.forward_intermediates(batch, output_fmt="NLC")
    assert (tower(images(2)) - expected)[0].abs().max() > 1e-4
    expand_temporal_attention(tower)
    assert same_bits(tower(batch), expected)
    assert same_bits(tower.forward_intermediates(batch, output_fmt="NLC")[0], layers[0])
    options = {name: batch[name] for name in ("patch_coord", "patch_valid")}
    again = tower.forward_intermediates(batch["patches"], output_fmt="NLC", **options, indices=[0])
    assert same_bits(again[1][0], layers[1][0])
    for options in ({"attn_mask": torch.zeros(4, 4)}, {"patch_valid": torch.ones(1, 4)}):
        with pytest.raises(UsageError, match="for batches of patches only"):
            tower.forward_features(random_video(1, 2), **options)
    prompt_laws.vifi(tower)
    with pytest.raises(UsageError, match="Prompts support no batches of patches"):
        tower(batch)


def test_inside_open_clip() -> None:
    name = "naflexvit_base_patch16_siglip"
    timm = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    with torch.device("meta"):  # a large tower, whose place a tiny one takes
        model = open_clip.CustomTextCLIP(
            embed_dim=16, vision_cfg={**VISION, **timm}, text_cfg=dict(TEXT)
        )
    assert type(model.visual.trunk) is NaFlexVit
    model.visual.trunk = make(KINDS["siglip 2"])
    video = random_video(2, 3)
    assert encode_video(model, video).shape == (2, 16)
    expected = CASES["siglip 2"].expanded()(video)
    assert same_bits(expand_temporal_attention(model).encode_image(video), expected)


# --- what can't be expanded --------------------------------------------------------------------


def test_other_blocks_and_towers_for_audio() -> None:
    with pytest.raises(UnsupportedModelError, match="made of ParallelScalingBlock blocks"):
        expand_temporal_attention(make(SIGLIP2, block_fn=ParallelScalingBlock))
    tower = NaFlexVit(**SIZE, in_chans=1)
    for refused in (expand_temporal_attention, partial(P.attach_vifi, text_prompts=0)):
        with pytest.raises(UnsupportedModelError, match="takes 1 channels, so it is no image"):
            refused(tower)


def model_of_open_clip_4(name: str) -> Any:
    """A tiny model of a kind that open_clip 3 does not have."""
    if not hasattr(open_clip, name):
        pytest.skip(f"this version of open_clip has no {name}")
    if name == "CLAP":
        sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
        audio = {"model_type": "naflexvit", "patch_freq": 64, "naflexvit_cfg": sizes}
        return open_clip.CLAP(embed_dim=8, audio_cfg=audio, text_cfg=dict(TEXT))
    config = open_clip.get_model_config(
        "naflexgenlip_test" if name == "NaFlexGenLip" else "naflexgenlap_test_1d"
    )
    config["text_cfg"] |= {"vocab_size": 64, "pad_id": 1, "bos_id": 2, "eos_id": 3}
    return getattr(open_clip, name)(**config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CLAP", "CLAP is a model for audio and has no image tower"),
        ("NaFlexGenLap", "NaFlexGenLap is a model for audio and has no image tower"),
        ("NaFlexGenLip", "NaFlexGenLip takes patches with coordinates instead of frames"),
    ],
)
def test_models_of_open_clip_4_without_frames(name: str, text: str) -> None:
    model = model_of_open_clip_4(name)
    attach = partial(P.attach_vifi, text_prompts=0)
    for holder in (model, nn.Sequential(model)):
        for refused in (expand_temporal_attention, attach):
            with pytest.raises(UnsupportedModelError, match=text):
                refused(holder)
    if hasattr(model, "encode_image"):
        with pytest.raises(UnsupportedModelError, match=text):
            encode_video(model, random_video(1, 2))


def test_text_towers_of_open_clip_4_take_no_prompts() -> None:
    if not hasattr(open_clip, "ModernTextTransformer"):
        pytest.skip("this version of open_clip has one kind of text towers")
    text = {"text_arch": "modern", "pad_id": 0, "eos_id": 63, "pool_type": "eos"}
    model = open_clip.CustomTextCLIP(
        embed_dim=8, vision_cfg=dict(VISION), text_cfg={**TEXT, **text}
    )
    video = random_video(1, 2)
    assert expand_temporal_attention(model).encode_image(video).shape == (1, 2, 8)
    with pytest.raises(UnsupportedModelError, match="text tower is a ModernTextTransformer"):
        P.attach_vifi(model, vision_depth=1, text_depth=1)
    P.attach_vifi(model, vision_depth=1, text_prompts=0)
    assert model.encode_image(video).shape == (1, 2, 8)


def test_a_text_tower_that_is_pooled_elsewhere_is_named() -> None:
    model = tiny_clip()
    model.text_pool_type = "first"
    with pytest.raises(UnsupportedModelError, match="text tower is a tower pooled by 'first'"):
        P.attach_vifi(model, vision_depth=1, text_depth=1)
