"""Colour jitter: change brightness, contrast, saturation and hue of all frames of a clip alike.

Pixels are float ``[..., 3, H, W]`` in the range 0 to 255, before and after the change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Jitter", "draw_jitter"]

_GREY = (0.2989, 0.587, 0.114)  # weights of the channels for luma in ITU-R BT.601


class Jitter(NamedTuple):
    """The strength of the colour jitter.

    Attributes:
        brightness: pixels are multiplied by a factor from ``[max(0, 1 - brightness), 1 +
            brightness]``.
        contrast: the difference between a pixel and the mean grey of its frame is multiplied by a
            factor from ``[max(0, 1 - contrast), 1 + contrast]``.
        saturation: the difference between a pixel and the grey of the pixel is multiplied by a
            factor from ``[max(0, 1 - saturation), 1 + saturation]``.
        hue: the hue is rotated by a fraction of the colour circle from ``[-hue, hue]``. At most
            0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


def draw_jitter(
    jitter: Jitter, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor] | None:
    """Draw the amounts and the order of the changes once.

    Returns:
        A function that changes pixels, or ``None`` if the jitter is 0.
    """
    if not any(jitter):
        return None
    order = torch.randperm(len(jitter), generator=generator).tolist()
    draws = torch.rand(len(jitter), generator=generator).tolist()
    steps: list[tuple[Callable[[Tensor, float], Tensor], float]] = []
    for index in order:
        reach, draw = jitter[index], draws[index]
        if reach:
            low = -reach if index == 3 else max(0.0, 1 - reach)
            high = reach if index == 3 else 1 + reach
            steps.append((_STEPS[index], low + (high - low) * draw))

    def change(pixels: Tensor) -> Tensor:
        for step, amount in steps:
            pixels = step(pixels, amount)
        return pixels

    return change


def _brightness(pixels: Tensor, factor: float) -> Tensor:
    return (pixels * factor).clamp_(0, 255)


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    return _blend(pixels, _grey(pixels).mean((-3, -2, -1), keepdim=True), factor)


def _saturation(pixels: Tensor, factor: float) -> Tensor:
    return _blend(pixels, _grey(pixels), factor)


def _hue(pixels: Tensor, shift: float) -> Tensor:
    """Rotate the hue of HSV and keep value and saturation."""
    red, green, blue = pixels.unbind(-3)
    value, chroma = pixels.amax(-3), pixels.amax(-3) - pixels.amin(-3)
    safe = torch.where(chroma == 0, 1, chroma)
    # the hue in sixths of the colour circle: red is 0, green is 2, blue is 4
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * shift
    channels = []
    for offset in (5, 3, 1):
        position = (offset + sixths) % 6
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp_(0, 1))
    return torch.stack(channels, -3)


_STEPS: tuple[Callable[[Tensor, float], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


def _grey(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor(_GREY).view(3, 1, 1)
    return (pixels * weights).sum(-3, keepdim=True)


def _blend(pixels: Tensor, other: Tensor, factor: float) -> Tensor:
    return torch.lerp(other.expand_as(pixels), pixels, factor).clamp_(0, 255)
