"""The outputs of chosen layers for videos: ``forward_intermediates`` of the libraries.

The libraries' own methods take images and have many options. For a video, the method runs on the
frames as a batch of images, in a copy of the tower whose layers compute whole clips. The copy has
the same parameters and buffers. It is made for one call, so threads do not disturb each other.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def frame_tower(tower: Any, plain: type[nn.Module], layers: str, clips: torch.Size) -> Any:
    """Return a copy of an expanded tower that takes the frames of clips as a batch of images.

    Args:
        tower: the expanded tower.
        plain: class of the tower before the expansion.
        layers: name of the submodule with the layers, such as ``"blocks"``.
        clips: number of clips and of frames, ``(B, T)``.

    Returns:
        A tower of class ``plain``. Its methods take images ``[B * T, C, H, W]``. In its layers,
        each frame attends to the frames in view of its clip.
    """
    name, _, rest = layers.partition(".")
    module = getattr(tower, name)
    if rest:
        replacement = frame_tower(module, type(module), rest, clips)
    else:
        sequence_first = not getattr(tower, "batch_first", True)
        replacement = nn.ModuleList(_FrameLayer(layer, clips, sequence_first) for layer in module)
    copy = plain.__new__(plain)
    modules = {**tower._modules, name: replacement}
    copy.__dict__.update({**tower.__dict__, "_modules": modules})
    return copy


class _FrameLayer(nn.Module):
    """A layer of an expanded tower for the tokens ``[B * T, N, W]`` of all frames.

    With ``sequence_first`` the tokens are ``[N, B * T, W]``.
    """

    def __init__(self, layer: nn.Module, clips: torch.Size, sequence_first: bool) -> None:
        super().__init__()
        self.layer, self.clips, self.sequence_first = layer, clips, sequence_first
        self.training = layer.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.sequence_first:
            x = x.transpose(0, 1)
        x = x.unflatten(0, self.clips)
        if isinstance(rope := kwargs.get("rope"), Tensor) and rope.ndim == 4:  # one for each frame
            kwargs["rope"] = rope.unflatten(0, self.clips)
        if self.sequence_first:
            out = self.layer(x.transpose(0, 1), *args, **kwargs).transpose(0, 1)
            return cast(Tensor, out.flatten(0, 1).transpose(0, 1))
        return cast(Tensor, self.layer(x, *args, **kwargs).flatten(0, 1))


def by_clip(output: Any, clips: torch.Size) -> Any:
    """Change each tensor ``[B * T, ...]`` in a list, tuple or dict to ``[B, T, ...]``."""
    if isinstance(output, Tensor):
        return output.unflatten(0, clips)
    if isinstance(output, dict):
        return {name: by_clip(value, clips) for name, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)(by_clip(value, clips) for value in output)
    return output
