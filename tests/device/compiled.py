"""Towers and encode_video under the modes of torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvclip import encode_video, expand_temporal_attention
from tests.device.checks import Checks, Setup
from tests.helpers import gradients, random_video, tiny_clip, tiny_tower
from tests.on_device import exact_kernels

CHECKS = Checks()
MODES = ("default", "reduce-overhead")
SLOW_MODE = "max-autotune-no-cudagraphs"  # measures many kernels for each product
BOUNDARIES = ("zero", "mask", "replicate")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def options(setup: Setup, mode: str = "default") -> dict[str, Any]:
    """Return arguments of torch.compile; small setups compile no kernels."""
    return {"backend": "eager"} if setup.small else {"mode": mode}


def tower_on(setup: Setup, **settings: Any) -> Any:
    """Return an expanded tower with heads of 64, as the fused kernels need them."""
    sizes = {} if setup.small else {"width": 128, "heads": 2, "image_size": 32, "patch_size": 8}
    tower = tiny_tower(layers=1 if setup.small else 2, **sizes)
    return expand_temporal_attention(tower, **settings).to(setup.device)


def video_on(setup: Setup, clips: int = 2, frames: int = 4, seed: int = 0) -> Tensor:
    """Return random clips on the device."""
    return random_video(clips, frames, seed, pixels=8 if setup.small else 32).to(setup.device)


@CHECKS.add(*MODES, small=1)
def modes(setup: Setup, mode: str) -> None:
    """Features and gradients of videos and images equal those without torch.compile."""
    torch._dynamo.reset()
    tower = tower_on(setup).train()
    compiled = torch.compile(tower, fullgraph=True, **options(setup, mode))
    with exact_kernels():
        inputs = (video_on(setup), video_on(setup, seed=1), video_on(setup)[0])
        for x in inputs[: 1 if mode == SLOW_MODE else 2 if setup.small else 3]:
            results = []
            for function in (tower, compiled):
                tower.zero_grad()
                out = function(x)
                out.square().mean().backward()
                results.append((out.detach().clone(), gradients(tower)))
            torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
            for name, grad in results[0][1].items():
                torch.testing.assert_close(results[1][1][name], grad, **CLOSE)


@CHECKS.add(*BOUNDARIES, small=0)
def boundaries(setup: Setup, boundary: Any) -> None:
    """Each boundary under autocast, without gradients."""
    torch._dynamo.reset()
    tower = tower_on(setup, boundary=boundary, window=2)
    compiled = torch.compile(tower, fullgraph=True, **options(setup))
    with torch.no_grad(), torch.autocast(setup.device, torch.bfloat16):
        x = video_on(setup)
        got, expected = compiled(x).float(), tower(x).float()
    assert float((got - expected).norm() / expected.norm()) < 0.03


@CHECKS.add(small=0)
def batches_of_any_size(setup: Setup) -> None:
    """One graph takes every number of clips and of frames."""
    torch._dynamo.reset()
    tower, graphs = tower_on(setup), []
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(tower, fullgraph=True, dynamic=True, **options(setup))
    with exact_kernels(), torch.no_grad():
        for clips, frames in ((2, 4), (3, 4), (5, 4), (4, 6), (6, 3)):
            x = video_on(setup, clips, frames)
            torch.testing.assert_close(compiled(x), tower(x), **CLOSE)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 5, f"graphs after each batch: {graphs}"


@CHECKS.add("expanded", "plain", small=0)
def encoded_video(setup: Setup, kind: str) -> None:
    """encode_video is compiled in one graph."""
    torch._dynamo.reset()
    model = tiny_clip().to(setup.device)
    if kind == "expanded":
        expand_temporal_attention(model)
    video = random_video(2, 3).to(setup.device)
    compiled = torch.compile(lambda x: encode_video(model, x), fullgraph=True, **options(setup))
    with exact_kernels(), torch.no_grad():
        torch.testing.assert_close(compiled(video), encode_video(model, video), **CLOSE)


# The last check, because it can take most of the group's time.
CHECKS.add(SLOW_MODE, small=0)(modes)
