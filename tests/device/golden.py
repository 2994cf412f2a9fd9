"""The numbers of the released implementations, computed on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

from openvclip import expand_temporal_attention, prompting
from tests.device.checks import Checks, Setup
from tests.on_device import exact_kernels
from tests.prompting import test_released as released
from tests.towers import tower_laws

CHECKS = Checks()
KINDS = ("float32", "bfloat16", "autocast")
LARGEST = 1e-4  # error in float32
FACTOR = 1.5  # of the error of the same arithmetic on a CPU, in half precision


def compare(
    setup: Setup, kind: str, tower: Any, video: Tensor, output: Tensor, pool: Callable[..., Tensor]
) -> None:
    """Compare the features of a tower in one kind of arithmetic with the released output."""

    def error(device: str) -> Tensor:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        moved = copy.deepcopy(tower).to(device, dtype)
        autocast = torch.autocast(device, torch.bfloat16, enabled=kind == "autocast")
        with torch.no_grad(), exact_kernels(), autocast:
            return pool(moved(video.to(device, dtype))).float().cpu() - output

    found = error(setup.device)
    if kind == "float32":
        largest = float(found.abs().max())
        assert largest < LARGEST, f"the largest error is {largest:.1e}, expected {LARGEST:.0e}"
        return
    on_cpu = float(error("cpu").norm())
    ratio = float(found.norm()) / on_cpu
    assert ratio < FACTOR, f"the error is {ratio:.2f} times that of a CPU, expected {FACTOR}"


@CHECKS.add(*KINDS, small=2)
def expanded_view(setup: Setup, kind: str) -> None:
    """Open-VCLIP: a tower with temporal attention over 8 frames."""
    tensors, sizes = tower_laws.golden()
    tower = VisionTransformer(
        image_size=sizes["image_size"],
        patch_size=sizes["patch"],
        width=sizes["width"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        mlp_ratio=4.0,
        output_dim=sizes["embed_dim"],
        act_layer=QuickGELU,
    ).eval()
    weights = {n.removeprefix("weights."): v for n, v in tensors.items() if n.startswith("weights")}
    tower.load_state_dict(weights)
    expand_temporal_attention(tower)
    compare(setup, kind, tower, tensors["input"], tensors["output"], lambda x: x)


@CHECKS.add(*KINDS, small=2)
def vifi_prompts(setup: Setup, kind: str) -> None:
    """ViFi-CLIP: prompts in two layers."""
    weights, video, output = released.golden(released.VIFI)
    tower = released.golden_tower()
    tower.load_state_dict({n: v for n, v in weights.items() if "VPT" not in n})
    prompting.attach_vifi(tower, vision_prompts=3, vision_depth=2, text_prompts=0)
    layers = [weights["VPT"], weights[f"{released.BLOCK}.1.VPT_shallow"]]
    released.fill(tower, {"tokens": torch.stack(layers)})
    compare(setup, kind, tower, video, output, lambda x: x)


@CHECKS.add(*KINDS, small=2)
def vita_prompts(setup: Setup, kind: str) -> None:
    """Vita-CLIP: all of its prompts."""
    weights, video, output = released.golden(released.VITA)
    weights, prompts = released.by_hand(weights)
    tower = released.golden_tower()
    tower.load_state_dict(weights)
    prompting.attach_vita(tower, frames=4, global_prompts=3, text_prompts=0)
    released.fill(tower, prompts)
    compare(setup, kind, tower, video, output, lambda x: x.mean(1))
