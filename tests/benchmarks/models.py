"""CLIPs with random weights, for benchmarks on every device."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

TINY = "tiny"
"""The name of a model with frames of 8 x 8 pixels, which shows that a benchmark still runs."""


def created(name: str, device: str = "cpu") -> Any:
    """Return a CLIP in train mode on a device. The weights are random: nothing is downloaded."""
    torch.manual_seed(0)
    if name == TINY:
        from tests.helpers import tiny_clip

        return tiny_clip(layers=1).train().to(device)
    with torch.device(device):  # a GPU draws random weights faster than a CPU
        return open_clip.create_model(name, device=device).train()


def noise_for(model: Any, clips: int, frames: int, device: str = "cpu") -> torch.Tensor:
    """Return clips of noise ``[clips, frames, 3, H, W]`` for a CLIP or its image tower."""
    tower = getattr(model, "visual", model)
    size = tower.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(clips, frames, 3, height, width, device=device)
