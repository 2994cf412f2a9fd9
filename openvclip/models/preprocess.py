"""The preprocessing of a model: image size, channel mean and channel standard deviation."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from openvclip.errors import UnsupportedModelError
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD, Transform, build


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
