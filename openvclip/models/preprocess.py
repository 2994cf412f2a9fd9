"""The pixels that a model takes: size, mean and deviation as open_clip notes them in it."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from openvclip.errors import UnsupportedModelError
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD, Transform, build


def transform_for(model: nn.Module, transform: str = "released") -> Transform:
    """The transform whose result ``model`` was trained on.

    Args:
        model: an open_clip model. Where its mean and deviation are not noted they are CLIP's.
        transform: a name for :func:`openvclip.video.transforms.build`.

    Raises:
        UnsupportedModelError: the model does not say how large its images are.
    """
    visual = cast(Any, getattr(model, "visual", None))
    size = getattr(visual, "image_size", None)
    if size is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no visual.image_size; give transform=build(name, size)."
        )
    return build(
        transform,
        int(size[0] if isinstance(size, (tuple, list)) else size),
        mean=getattr(visual, "image_mean", None) or CLIP_MEAN,
        std=getattr(visual, "image_std", None) or CLIP_STD,
    )
