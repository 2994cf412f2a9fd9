"""The preprocessing of a model: image size, channel mean and deviation; reading an image."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from openvclip.errors import (
    MissingDependencyError,
    UnsupportedModelError,
    VideoError,
    VideoNotFoundError,
)
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD, Transform, build

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def transform_for(model: nn.Module, transform: str = "released") -> Transform:
    """Return a transform with the image size, mean and standard deviation of a model.

    Args:
        model: an open_clip model. If the model has no ``visual.image_mean`` or
            ``visual.image_std``, the values of the original CLIP are used.
        transform: the name of a transform; see :func:`openvclip.video.transforms.build`.

    Raises:
        UnsupportedModelError: the model has no ``visual.image_size``.
    """
    visual = cast(Any, getattr(model, "visual", None))
    size = getattr(visual, "image_size", None)
    if size is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no visual.image_size, so the size of its images is "
            "unknown. Give transform=openvclip.video.transforms.build(name, size)."
        )
    return build(
        transform,
        int(size[0] if isinstance(size, (tuple, list)) else size),
        mean=getattr(visual, "image_mean", None) or CLIP_MEAN,
        std=getattr(visual, "image_std", None) or CLIP_STD,
    )


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether the extension of a file is that of an image format."""
    return os.path.splitext(os.fspath(path))[1].lower() in _IMAGES


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file with Pillow, upright as its EXIF orientation says.

    Args:
        path: the file. Grey images become RGB, and the alpha channel is dropped.

    Returns:
        uint8 ``[C, H, W]``, RGB.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the file is not an image, or is damaged.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError(
            'Images are read with Pillow: pip install "openvclip[video]".'
        ) from error
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise VideoNotFoundError(f"{os.fspath(path)}: no such file.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{os.fspath(path)}: can't be read as an image ({error}).") from error
    return torch.from_numpy(pixels).movedim(-1, 0)
