"""Prompts on open_clip's VisionTransformer with each of its options."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from openvclip import expand_temporal_attention
from openvclip import prompting as P
from tests.helpers import TEXT, VISION, random_video, randomise, tiny_tower
from tests.prompting import towers as laws
from tests.prompting.towers import METHODS, vifi, vita
from tests.towers.test_temporal_variants import VARIANTS
from tests.towers.tower_laws import Case


def call(model: Any, x: Tensor) -> Any:
    return model(x)


def checkpoint(model: Any) -> None:
    model.set_grad_checkpointing()


@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_tower_equals_the_hooked_one(name: str, attach: Any) -> None:
    case = Case(name, partial(tiny_tower, **VARIANTS[name]), call, checkpoint)
    pixels = (8, 12) if name == "oblong" else (8, 8)
    laws.equals_the_hooked_tower(
        case, attach, None, prefix=1, class_token=True, tolerance=1e-9, pixels=pixels
    )


@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("name", VARIANTS)
def test_in_an_expanded_tower_neighbours_see_prompts(name: str, attach: Any) -> None:
    case = Case(name, partial(tiny_tower, **VARIANTS[name]), call, checkpoint)
    pixels = (8, 12) if name == "oblong" else (8, 8)
    still = torch.randn(2, 1, 3, *pixels).expand(-1, 3, -1, -1, -1)
    outs = []
    for boundary in (None, "mask", "zero"):
        model = case.make()
        if boundary is not None:
            expand_temporal_attention(model, boundary=boundary)
        outs.append(attach(model)(still).detach())
    # Vita-CLIP's prompts depend on time, so the frames of a static clip differ.
    if attach is vifi:
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    else:
        assert (outs[1] - outs[0]).abs().max() > 1e-4
    assert (outs[2] - outs[0]).abs().max() > 1e-4


@pytest.mark.parametrize("expanded", [False, True])
def test_dropped_patches_are_no_prompts(expanded: bool) -> None:
    for attach, added in ((vifi, 2), (vita, 2 + 3 + 1)):
        tower = tiny_tower(patch_dropout=0.5)
        if expanded:
            expand_temporal_attention(tower)
        attach(tower).train()
        seen: list[int] = []
        for block in tower.transformer.resblocks:
            block.register_forward_pre_hook(
                lambda m, args, seen=seen: seen.append(args[0].shape[-2])
            )
        tower(random_video(2, 3))
        assert seen == [1 + 2 + added] * 3


def test_coca() -> None:
    torch.manual_seed(0)
    pooling = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    model = open_clip.CoCa(
        embed_dim=8,
        multimodal_cfg={"width": 8, "heads": 2, "layers": 1, "context_length": 8},
        text_cfg=dict(TEXT, embed_cls=True, output_tokens=True),
        vision_cfg=dict(VISION, output_tokens=True, **pooling),
    ).eval()
    vita(randomise(model))
    features = model.encode_image(random_video(2, 3))
    pooled, tokens = model.visual(random_video(2, 3))
    assert tokens.shape[:2] == (2, 3)
    torch.testing.assert_close(features, torch.nn.functional.normalize(pooled, dim=-1))
    P.detach(model)
