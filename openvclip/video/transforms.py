"""Video transforms: decoded frames, uint8 ``[..., T, C, H, W]``, to model input, float32.

``"released"`` is the test-time preprocessing of the released Open-VCLIP code, ``"clip"`` is the
image preprocessing of the original CLIP, ``"squash"`` and ``"squash_bilinear"`` are the image
preprocessing of SigLIP, and ``"train"`` is the augmentation of the released code.
Tensors stay on their device. torchvision is not needed.

Source: the released code of Open-VCLIP, and Section 5.1.3 of its paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openvclip.errors import VideoOptionError, VideoShapeError
from openvclip.video._color import Jitter, draw_jitter
from openvclip.video._layout import advice_on_pixels

__all__ = ["CLIP_MEAN", "CLIP_STD", "TRANSFORMS", "Transform", "build"]

CLIP_MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the RGB channels in the training of the original CLIP, for pixels in [0, 1]."""
CLIP_STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the RGB channels in the training of CLIP, for pixels in [0, 1]."""

Change = Callable[[Tensor], Tensor]

_MOST_PIXELS = 2**14  # the largest side of a frame
# Frames are resized in chunks of at most this many values: 256 MB in float32.
_CHUNK = 2**26


@dataclass(frozen=True)
class Transform:
    """A video transform, made by :func:`build`.

    Attributes:
        name: a name of :data:`TRANSFORMS`.
        size: height and width of the result, in pixels.
        mean: mean of the channels, for pixels in [0, 1].
        std: standard deviation of the channels, for pixels in [0, 1].
        hflip: whether ``"train"`` mirrors half of the clips.
        color_jitter: strength of the change of brightness, contrast, saturation and hue in
            ``"train"``.
        short_side: range of the short side of the frames before the crop, in pixels; ``None`` for
            the default of ``name``.
        crops: number of crops of a clip. With several crops the result has one more axis, before T.
    """

    name: str
    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    hflip: bool = True
    color_jitter: tuple[float, float, float, float] = Jitter()
    short_side: tuple[int, int] | None = None
    crops: int = 1

    @property
    def random(self) -> bool:
        """Whether two calls with the same clip can return different results."""
        return self.name == "train"

    def with_(self, **changes: Any) -> Transform:
        """Return a copy with some options of :func:`build` changed.

        The options are checked as in :func:`build`. A name other than ``"train"`` resets
        ``color_jitter`` to 0, unless ``changes`` contains ``color_jitter``.

        Example:
            >>> build("train", 224, color_jitter=0.4).with_(name="released", crops=3).crops
            3
        """
        options = asdict(self)
        if changes.get("name", self.name) != "train":
            options["color_jitter"] = 0.0
        return build(**{**options, **changes})

    def __call__(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Transform a video or a batch of videos.

        Args:
            video: uint8 ``[..., T, C, H, W]`` with three channels.
            generator: CPU random number generator for ``"train"``. Default: the global generator.
                All frames of a clip ``[T, C, H, W]`` get the same random changes.

        Returns:
            float32 ``[..., T, C, size, size]`` on the device of ``video``, or
            ``[..., 3, T, C, size, size]`` with three crops.

        Raises:
            VideoShapeError: ``video`` has another dtype or rank, a number of channels other than
                three, or an empty dimension. Floats are refused, because values from 0 to 1 and
                values from 0 to 255 look alike in a dark video; the error says how to convert them.
        """
        _check(video, len(self.mean))
        frames = video.flatten(0, -4)
        clips = torch.split(frames, video.shape[-4]) if self.random else (frames,)
        result = _join([self.draw(generator)(clip) for clip in clips])
        if self.crops == 1:
            return result[0].reshape(*video.shape[:-2], self.size, self.size)
        crops: Tensor = result.unflatten(1, (-1, video.shape[-4])).transpose(0, 1)
        return crops.reshape(*video.shape[:-4], *crops.shape[1:])

    def draw(self, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
        """Draw the random changes of one clip.

        Args:
            generator: see :meth:`__call__`.

        Returns:
            A function from some frames of the clip, uint8 ``[n, C, H, W]``, to their crops, float32
            ``[crops, n, C, size, size]``. Each frame is transformed for itself, so the frames can
            be given one by one.
        """
        return _RECIPES[self.name](self, generator)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation: the last step of the transform.

        Args:
            pixels: float ``[..., C, H, W]`` from 0 to 255.
        """
        return _normalise(self, pixels)


def build(
    name: str,
    size: int = 224,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    hflip: bool = True,
    color_jitter: float | Sequence[float] = 0.0,
    short_side: int | Sequence[int] | None = None,
    crops: int = 1,
) -> Transform:
    """Make a transform from uint8 ``[..., T, C, H, W]`` to float32 of the same rank.

    - ``"released"``: the preprocessing of the released evaluation. The short side is scaled to
      ``size``, bilinear *without* antialiasing; the other side is rounded down. Then follow a
      centre crop and the normalisation.
    - ``"clip"``: the preprocessing of the images on which CLIP was trained. The 8-bit pixels are
      scaled, bicubic with antialiasing. Then follow a centre crop and the normalisation.
    - ``"squash"`` and ``"squash_bilinear"``: the preprocessing of SigLIP. The 8-bit pixels are
      scaled to a square with antialiasing, bicubic or bilinear, whatever the shape of the frames
      is. Nothing is cropped.
    - ``"train"``: the short side is drawn uniformly between ``size`` and ``size * 8 / 7`` (224 to
      256), and the frames are scaled, bilinear without antialiasing. Then follow a random crop, a
      mirroring with probability 1/2, an optional colour jitter, and the normalisation. All frames
      of a clip get the same random changes.

    Args:
        name: ``"released"``, ``"clip"``, ``"squash"``, ``"squash_bilinear"`` or ``"train"``.
        size: height and width of the result, in pixels.
        mean: mean of the channels, for pixels in [0, 1]. Default: the mean of CLIP.
        std: standard deviation of the channels, for pixels in [0, 1]. Default: the standard
            deviation of CLIP.
        hflip: whether ``"train"`` mirrors clips. Switch it off if class names distinguish left from
            right.
        color_jitter: strength of the colour jitter of ``"train"``. A number: brightness, contrast
            and saturation change by factors from ``[1 - color_jitter, 1 + color_jitter]``. Four
            numbers: brightness, contrast, saturation, and the largest rotation of the hue as a
            fraction of the colour circle, at most 0.5. The changes are applied in random order. The
            paper uses colour jitter but does not give its strength.
        short_side: short side of the frames before the crop, in pixels; for ``"train"`` also the
            two ends of a range. Default: the values above. ViFi-CLIP uses 256 for crops of 224.
        crops: 1, or 3 for the centre and both ends of the longer side. These are the 3 spatial
            crops of multi-view testing. Only possible with ``"released"`` and ``"clip"``.

    Raises:
        VideoOptionError: ``name`` is not known; ``size`` is below 1 or above 16,384; ``mean`` or
            ``std`` does not have three finite values; ``color_jitter`` is negative, has another
            length, or is used with a transform other than ``"train"``; ``short_side`` is below
            ``size`` or above 16,384, or is used with a transform that does not crop; or ``crops``
            is neither 1 nor 3.
    """
    if name not in _RECIPES:
        known = ", ".join(map(repr, TRANSFORMS))
        raise VideoOptionError(f"transform {name!r} is not known: choose one of {known}.")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise VideoOptionError(f"size={size!r}: expected a whole number of pixels, at least 1.")
    if size > _MOST_PIXELS:
        raise VideoOptionError(f"size={size}: expected at most {_MOST_PIXELS} pixels.")
    if not (_are_moments(mean) and _are_moments(std) and all(value >= 1e-6 for value in std)):
        raise VideoOptionError(
            f"mean={mean!r}, std={std!r}: expected three finite numbers each, std above 0."
        )
    jitter = _jitter(color_jitter)
    if any(jitter) and name != "train":
        raise VideoOptionError(
            f"color_jitter={color_jitter!r} with {name!r}: only 'train' changes colours."
        )
    if crops not in (1, 3) or (crops == 3 and name not in ("released", "clip")):
        raise VideoOptionError(
            f"crops={crops!r} with {name!r}: expected 1, or 3 with 'released' or 'clip'."
        )
    if short_side is not None and name in ("squash", "squash_bilinear"):
        raise VideoOptionError(
            f"short_side={short_side!r} with {name!r}: frames are scaled to a square of {size} "
            "pixels, and nothing is cropped. Remove short_side."
        )
    moments = tuple(map(float, mean)), tuple(map(float, std))
    short = _short_side(short_side, size, name)
    return Transform(name, size, *moments, bool(hflip), jitter, short, crops)


def _are_moments(values: object) -> bool:
    """Return whether values are a finite number for each of three channels."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return False
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return False
    return len(numbers) == 3 and all(abs(number) < 1e6 for number in numbers)  # NaN is not


def _short_side(option: int | Sequence[int] | None, size: int, name: str) -> tuple[int, int] | None:
    if option is None:
        return None
    ends = [option] * 2 if isinstance(option, int) else list(option)
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not size <= ends[0] <= ends[1] <= _MOST_PIXELS:
        raise VideoOptionError(
            f"short_side={option!r}: expected a whole number of pixels, or the two ends of a range "
            f"in ascending order. Each number must be at least the size of the crop ({size}), and "
            f"at most {_MOST_PIXELS}."
        )
    if ends[0] < ends[1] and name != "train":
        raise VideoOptionError(
            f"short_side={option!r} with {name!r}: only 'train' accepts a range; give one number."
        )
    return ends[0], ends[1]


def _jitter(option: float | Sequence[float]) -> Jitter:
    reach = [option] * 3 + [0.0] if isinstance(option, (int, float)) else list(option)
    if len(reach) != 4 or not all(math.isfinite(x) and x >= 0 for x in reach) or reach[3] > 0.5:
        raise VideoOptionError(
            f"color_jitter={option!r}: expected a number of at least 0, or four of them for "
            "brightness, contrast, saturation and hue (at most 0.5)."
        )
    return Jitter(*map(float, reach))


def _check(video: Tensor, channels: int) -> None:
    actual = f"{video.dtype} {list(video.shape)}"
    if video.dtype != torch.uint8 or video.ndim < 4 or video.shape[-3] != channels:
        raise VideoShapeError(
            f"video is {actual}; expected torch.uint8 [..., T, {channels}, H, W], as read_clip "
            f"returns it. {_advice(video, channels)}"
        )
    if 0 in video.shape:
        raise VideoShapeError(f"video is {actual}: one of its dimensions is empty.")


def _advice(video: Tensor, channels: int) -> str:
    """Return how to turn a video that is refused into one that is accepted, as far as known."""
    shape = list(video.shape)
    if video.ndim >= 4 and channels not in shape[-3:-2]:
        if shape[-1] == channels:
            return "Move the channels before the height: video.movedim(-1, -3)."
        if shape[-4] == channels:
            return "Swap the channels and the time: video.transpose(-3, -4)."
    return advice_on_pixels(video)


def _released(spec: Transform, generator: torch.Generator | None) -> Change:
    def change(clip: Tensor) -> Tensor:
        scaled = _scaled(clip, _fixed_short(spec))
        return _bilinear_crop(spec, clip, scaled, _corners(spec, scaled, math.ceil))

    return change


def _train(spec: Transform, generator: torch.Generator | None) -> Change:
    scale, down, right, flip = torch.rand(4, generator=generator).tolist()
    least, most = spec.short_side or (spec.size, round(spec.size * 8 / 7))
    short = least + min(int(scale * (most - least + 1)), most - least)
    recolour = draw_jitter(Jitter(*spec.color_jitter), generator)

    def change(clip: Tensor) -> Tensor:
        height, width = _scaled(clip, short)
        top = int(down * (height - spec.size + 1))
        left = int(right * (width - spec.size + 1))
        result = _bilinear_crop(spec, clip, (height, width), [(top, left)], recolour)
        return result.flip(-1) if spec.hflip and flip < 0.5 else result

    return change


def _clip(spec: Transform, generator: torch.Generator | None) -> Change:
    def change(clip: Tensor) -> Tensor:
        scaled = _scaled(clip, _fixed_short(spec))
        corners = _corners(spec, scaled, round)
        parts = []
        for frames in _chunks(clip):
            small = _scaled_8bit(frames, scaled, "bicubic")
            parts.append(_normalise(spec, _crops(small, spec.size, corners).float()))
        return _join(parts)

    return change


def _squash(mode: str, spec: Transform, generator: torch.Generator | None) -> Change:
    def change(clip: Tensor) -> Tensor:
        square = (spec.size, spec.size)
        small = (_scaled_8bit(frames, square, mode) for frames in _chunks(clip))
        return _join([_normalise(spec, frames[None].float()) for frames in small])

    return change


# Each recipe draws the changes of a clip; see Transform.draw.
_RECIPES: dict[str, Callable[[Transform, torch.Generator | None], Change]] = {
    "released": _released,
    "clip": _clip,
    "squash": partial(_squash, "bicubic"),
    "squash_bilinear": partial(_squash, "bilinear"),
    "train": _train,
}
TRANSFORMS: tuple[str, ...] = tuple(_RECIPES)
"""The transforms that :func:`build` can make."""


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _chunks(clip: Tensor) -> Sequence[Tensor]:
    return torch.split(clip, max(1, _CHUNK // clip[0].numel()))


def _fixed_short(spec: Transform) -> int:
    return spec.size if spec.short_side is None else spec.short_side[0]


def _corners(
    spec: Transform, scaled: tuple[int, int], centre: Callable[[float], int]
) -> list[tuple[int, int]]:
    """Return the top row and the left column of each crop.

    A single crop is at the centre. Three crops are at the centre and at both ends of the long side.
    """
    room = [side - spec.size for side in scaled]
    middle = (centre(room[0] / 2), centre(room[1] / 2))
    if spec.crops == 1:
        return [middle]
    if room[0] > room[1]:
        return [(0, middle[1]), middle, (room[0], middle[1])]
    return [(middle[0], 0), middle, (middle[0], room[1])]


def _scaled(clip: Tensor, short: int) -> tuple[int, int]:
    """Return height and width with the short side ``short``; the long side is rounded down."""
    height, width = clip.shape[-2:]
    if width < height:
        return math.floor(height / width * short), short
    return short, math.floor(width / height * short)


def _bilinear_crop(
    spec: Transform,
    clip: Tensor,
    scaled: tuple[int, int],
    corners: Sequence[tuple[int, int]],
    recolour: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    # The released code normalises before it resizes. Bilinear weights sum to 1: the order changes
    # nothing beyond rounding. Resizing first leaves fewer pixels to normalise.
    parts = []
    for frames in _chunks(clip):
        pixels = frames.float()
        if scaled != tuple(pixels.shape[-2:]):
            pixels = functional.interpolate(
                pixels, size=scaled, mode="bilinear", align_corners=False, antialias=False
            )
        pixels = _crops(pixels, spec.size, corners)
        parts.append(_normalise(spec, recolour(pixels) if recolour else pixels))
    return _join(parts)


def _scaled_8bit(frames: Tensor, scaled: tuple[int, int], mode: str) -> Tensor:
    if scaled == tuple(frames.shape[-2:]):
        return frames
    # On the CPU, PyTorch resizes 8-bit pixels with the same result as PIL. On other devices it
    # resizes only floats, and the result is rounded to 8-bit values here.
    pixels = frames if frames.device.type == "cpu" else frames.float()
    small = functional.interpolate(
        pixels, size=scaled, mode=mode, align_corners=False, antialias=True
    )
    return small if small.dtype == torch.uint8 else small.round().clamp(0, 255)


def _crops(pixels: Tensor, size: int, corners: Sequence[tuple[int, int]]) -> Tensor:
    crops = [pixels[..., top : top + size, left : left + size] for top, left in corners]
    return crops[0].unsqueeze(0) if len(crops) == 1 else torch.stack(crops)


def _normalise(spec: Transform, pixels: Tensor) -> Tensor:
    # (x / 255 - mean) / std with one operation less for every pixel
    mean = torch.tensor([255 * value for value in spec.mean], device=pixels.device)
    std = torch.tensor([255 * value for value in spec.std], device=pixels.device)
    return pixels.sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
