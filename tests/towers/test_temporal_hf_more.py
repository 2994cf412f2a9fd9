"""Temporal attention of the other models of transformers: MetaCLIP 2, SigLIP 2 and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from openvclip import encode_video, expand_temporal_attention
from openvclip.errors import UnsupportedModelError, VideoShapeError
from openvclip.towers import encode_frames, encode_images
from tests.helpers import random_video, same_bits
from tests.tiny_transformers import make, transformers
from tests.towers.test_temporal_hf import checkpoint, slow_attention
from tests.towers.tower_laws import (
    LAWS,
    Case,
    copies_are_expanded_too,
    equals_equation_3,
    equation_3_settings,
    images,
    images_are_bit_for_bit_what_they_were,
    restore_is_the_exact_inverse,
    what_is_no_video_is_refused,
)

THOROUGH = ("AltCLIPModel", "Siglip2Model")
NAMES = ["MetaClip2Model", "AltCLIPModel", "ChineseCLIPModel", "CLIPSegModel", "Siglip2Model"]


def made(name: str, **vision: Any) -> Any:
    model = make(name, **vision)
    model.set_attn_implementation("eager" if name == "AltCLIPModel" else "sdpa")
    return model


def features(model: Any, x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and x.ndim == 4:
        return encode_images(model, x)
    pooled: Tensor = model.get_image_features(pixel_values=x).pooler_output
    return pooled


CASES = {name: Case(name, partial(made, name), features, checkpoint) for name in NAMES}


# The towers of the other models are the code of CLIP's tower with other classes.
FEW = [images_are_bit_for_bit_what_they_were, restore_is_the_exact_inverse, copies_are_expanded_too]
PAIRS = [(name, law) for name in NAMES for law in (LAWS if name in THOROUGH else FEW)]


@pytest.mark.parametrize(
    ("name", "law"), PAIRS, ids=lambda value: getattr(value, "__name__", value)
)
def test_law(name: str, law: Callable[[Case], None]) -> None:
    if law is what_is_no_video_is_refused and name == "Siglip2Model":
        with pytest.raises(VideoShapeError, match=r"\[4, 3, 8\]; expected a video"):
            CASES[name].expanded().get_image_features(pixel_values=images()[:, :, 0])
        return  # this model takes frames of other sizes
    law(CASES[name])


@equation_3_settings
@pytest.mark.parametrize("name", THOROUGH)
def test_the_tower_equals_equation_3(name: str, window: int, boundary: Any) -> None:
    equals_equation_3(CASES[name], slow_attention, window, boundary, tolerance=1e-9)


@torch.no_grad()
def test_siglip2_and_clipseg_take_frames_of_every_shape() -> None:
    """SigLIP 2 NaFlex. The reference is transformers' own method with its positions."""
    model, plain = expand_temporal_attention(make("Siglip2Model")), make("Siglip2Model")
    wide = random_video(2, 3, pixels=12)[..., :8, :]  # 8 x 12 pixels: 2 x 3 patches
    own = encode_images(plain, wide.flatten(0, 1)).unflatten(0, (2, 3))
    torch.testing.assert_close(encode_frames(plain, wide), own)
    one = torch.stack([model.get_image_features(pixel_values=wide[:, [0]]).pooler_output[:, 0]])
    static = expand_temporal_attention(make("Siglip2Model"), boundary="mask")
    still = wide[:, :1].expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(encode_frames(static, still)[:, 1], own[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[0], own[:, 0], rtol=1e-3)  # the zero frames take attention
    with pytest.raises(
        VideoShapeError, match=r"8 x 10 pixels .*multiples of the size of a patch, 4"
    ):
        encode_video(model, wide[..., :10])
    with pytest.raises(VideoShapeError, match="8 x 10 pixels"):
        encode_video(plain, wide[..., :10])
    seg = make("CLIPSegModel")
    assert encode_frames(seg, wide).shape == (2, 3, 8)
    assert encode_frames(expand_temporal_attention(seg), wide).shape == (2, 3, 8)
    alone = make("Siglip2Model").vision_model
    assert same_bits(encode_frames(alone, wide), encode_frames(plain, wide))


def test_models_that_can_not_be_expanded_are_named() -> None:
    for name in ("AlignModel", "OwlViTModel"):
        with pytest.raises(UnsupportedModelError, match=f"is a {name[:-5]}Vision.*can't be expand"):
            expand_temporal_attention(make(name))
    clip = make("CLIPSegModel")
    with torch.device("meta"):
        config = transformers.CLIPSegConfig(
            **{**clip.config.to_dict(), "extract_layers": [0], "decoder_num_attention_heads": 1}
        )
        masks = transformers.CLIPSegForImageSegmentation(config)
    with pytest.raises(UnsupportedModelError, match="Segmentation returns masks of images, so it"):
        expand_temporal_attention(masks)
