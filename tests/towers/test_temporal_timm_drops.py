"""timm's towers while they train: dropped patches, paths, attention weights and projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from openvclip import expand_temporal_attention
from tests.helpers import gradients, random_video, same_bits
from tests.towers.test_temporal_timm import eva, make, vit
from tests.towers.tower_laws import CLOSE, images

DROPS = {
    "patches": vit(patch_drop_rate=0.5),
    "patches and angles": eva(patch_drop_rate=0.5),
    "patches and mixed angles": eva(patch_drop_rate=0.5, rope_type="mixed", attn_type="rope"),
    "paths": vit(drop_path_rate=0.5),
    "paths of eva": eva(drop_path_rate=0.5),
    "weights": vit(attn_drop_rate=0.5),
    "weights of eva": eva(attn_drop_rate=0.5),
    "projections": vit(proj_drop_rate=0.5),
    "positions": vit(pos_drop_rate=0.5),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropping_works_in_training_alone(name: str) -> None:
    tower: Any = expand_temporal_attention(make(DROPS[name]))
    video = random_video(8, 3)
    assert same_bits(tower(video), tower(video))
    tower.train()
    torch.manual_seed(1)
    first, second = tower(video), tower(video)
    assert not torch.allclose(first, second)
    first.square().sum().backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(tower).values())
    tower.set_grad_checkpointing()
    torch.manual_seed(1)
    again = tower(video)
    torch.testing.assert_close(again, first, **CLOSE)
    again.square().sum().backward()


@pytest.mark.parametrize("name", ["patches", "patches and angles", "patches and mixed angles"])
def test_patches_are_dropped_from_each_frame_with_their_angles(name: str) -> None:
    """A static clip whose frames all drop the same patches is still the image."""
    tower: Any = make(DROPS[name]).train()
    keep = torch.tensor([2, 0])

    def same_patches(x: Tensor) -> Any:
        tokens = torch.cat([x[:, :1], x[:, 1:][:, keep]], dim=1)
        return tokens if isinstance(tower, VisionTransformer) else (tokens, keep.expand(len(x), -1))

    tower.patch_drop.forward = same_patches
    still = images(2)
    with torch.no_grad():
        expected = tower(still)
        expand_temporal_attention(tower, boundary="mask")
        got = tower(still[:, None].expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(got[:, 1], expected, **CLOSE)


def test_a_path_is_dropped_for_a_whole_clip() -> None:
    tower: Any = expand_temporal_attention(make(vit(drop_path_rate=0.5))).train()
    dropped: list[Tensor] = []
    tower.blocks[1].drop_path1.register_forward_hook(
        lambda _m, _i, out: dropped.append((out == 0).flatten(2).all(-1))
    )
    torch.manual_seed(0)
    tower(random_video(16, 3))
    assert dropped[0].shape == (16, 3)
    assert (dropped[0].all(1) == dropped[0].any(1)).all()
    assert 0 < dropped[0].sum() < 48
