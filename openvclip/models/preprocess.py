"""The preprocessing of a model: image size, channel mean and deviation; reading an image."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from openvclip.errors import (
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
    VideoError,
    VideoNotFoundError,
)
from openvclip.models.features import is_transformers, model_type
from openvclip.models.hub import is_offline
from openvclip.video.sources import all_bytes, image_planes, is_array, is_url, source_name
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD, Transform, build

_CLIP_MOMENTS = (CLIP_MEAN, CLIP_STD)
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The mean and standard deviation of the published models of each kind of transformers.
_MOMENTS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "clip": _CLIP_MOMENTS,
    "metaclip_2": _CLIP_MOMENTS,
    "altclip": _CLIP_MOMENTS,
    "chinese_clip": _CLIP_MOMENTS,
    "clipseg": _IMAGENET,
    "siglip": _HALVES,
    "siglip2": _HALVES,
}
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def transform_for(
    model: nn.Module, transform: str | None = None, *, processor: Any = None
) -> Transform:
    """Return a transform with the image size, mean and standard deviation of a model.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel``. If an open_clip
            model has no ``visual.image_mean`` or ``visual.image_std``, the values of the original
            CLIP are used.
        transform: the name of a transform; see :func:`openvclip.video.transforms.build`. Default:
            ``"released"``; with ``processor``, the transform that resizes and crops as the
            processor does.
        processor: an image processor of transformers, or a processor that holds one. The mean, the
            standard deviation and the size of the crop are those of the processor. Default: for a
            model of transformers, the mean and standard deviation of the processor in the folder or
            repository that the model was loaded from. If there is none, the values that models of
            its kind are trained with.

    Raises:
        UnsupportedModelError: the size of the images of the model is not known.
        UsageError: the mean and standard deviation of the model are not known: give ``processor``.
            Or no transform resizes as the processor does: give ``transform`` too.
        VideoOptionError: the processor has values that no transform has.
    """
    if processor is not None:
        return transform_of_processor(processor, _image_size(model), transform)
    mean, std = _moments(model)
    return build(transform or "released", _require_size(model), mean=mean, std=std)


def released_or_square(model: nn.Module, processor: Any | None) -> Transform:
    """Return the transform of a model of transformers that nobody fine-tuned for videos.

    Args:
        model: a model of transformers.
        processor: the image processor that is stored with the model, if there is one. SigLIP's
            processor scales an image to a square, and the transform does the same. For other
            models the transform is ``"released"``.
    """
    if processor is None or not _is_square(processor):
        return transform_for(model, "released", processor=processor)
    made = transform_of_processor(processor)
    return made.with_(size=_image_size(model) or made.size)


def _is_square(processor: Any) -> bool:
    """Return whether a processor scales an image to a square, and a transform does the same."""
    images = getattr(processor, "image_processor", processor)
    size: Any = getattr(images, "size", None)
    known = _does(images, "resize") and hasattr(size, "get") and not _does(images, "center_crop")
    return bool(known and size.get("height") and size.get("height") == size.get("width")) and (
        _interpolation(images) is not None
    )


def _require_size(model: nn.Module) -> int:
    size = _image_size(model)
    if size is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no visual.image_size, so the size of its images is "
            "unknown. Give transform=openvclip.video.transforms.build(name, size)."
        )
    return size


def _image_size(model: nn.Module) -> int | None:
    """Return the height and width of the images of a model, or ``None`` if it is not known."""
    size = getattr(getattr(model, "visual", None), "image_size", None)
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    if size is None and vision is not None:
        size = getattr(vision, "image_size", None)
        patches = getattr(vision, "num_patches", None)
        if size is None and patches is not None:  # SigLIP 2 takes every shape with these patches
            size = int(patches**0.5) * vision.patch_size
    if size is None:
        return None
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def _moments(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation of the channels that a model was trained with."""
    if is_transformers(model):
        name, kind = getattr(model, "name_or_path", ""), model_type(model)
        processor = image_processor_of(str(name)) if name else None
        if hasattr(processor, "image_mean"):
            return _moments_of_processor(processor)
        if kind not in _MOMENTS:
            raise UsageError(
                f"The mean and standard deviation of the pixels of {type(model).__name__} are not "
                "known. Give transform=openvclip.models.transform_for(model, processor=processor) "
                "with the image processor of the model."
            )
        return _MOMENTS[kind]
    visual = cast(Any, getattr(model, "visual", None))
    mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
    return mean or CLIP_MEAN, std or CLIP_STD


_downloaded: dict[str, Any] = {}  # image processors by their name on the Hub


def image_processor_of(name: str, *, offline: bool | None = None) -> Any | None:
    """Return the image processor that is stored with a model of transformers, or ``None``.

    Args:
        name: a folder, or a name on the Hub. A processor of the Hub is kept for the next call. If
            there is none, or the Hub does not answer, the next call looks again.
        offline: whether the Hub can't be reached. Default: the Hub is asked.
    """
    from transformers import AutoImageProcessor

    is_folder = os.path.isdir(name)
    if not is_folder and name in _downloaded:
        return _downloaded[name]
    offline = is_offline(name) if offline is None else offline
    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=offline)
    except (ImportError, OSError, ValueError, KeyError):
        return None
    if not is_folder:
        _downloaded[name] = processor
    return processor


def transform_of_processor(
    processor: Any, size: int | None = None, transform: str | None = None
) -> Transform:
    """Return the transform that does what an image processor of transformers does.

    If the sides of the scaled frames and of the crop differ by an odd number of pixels, the crop
    can lie one pixel aside: the transforms round as the original CLIP does.

    Args:
        processor: an image processor, or a processor that holds one.
        size: height and width of the images of the model. Default: the size of the processor.
        transform: the name of a transform, which resizes and crops in another way. Default: the
            resizing of the processor.

    Raises:
        UsageError: ``processor`` is no image processor; or no transform resizes as it does.
        VideoOptionError: the processor has values that no transform has.
    """
    images = getattr(processor, "image_processor", processor)
    if not hasattr(images, "image_mean"):
        raise UsageError(
            f"processor is a {type(processor).__name__}; expected an image processor of "
            "transformers, or a processor that holds one (AutoProcessor)."
        )
    mean, std = _moments_of_processor(images)
    cut = _side(getattr(images, "crop_size", None) if _does(images, "center_crop") else None)
    if transform is not None:
        resized = _side(getattr(images, "size", None))
        return build(transform, size or cut or resized or 224, mean=mean, std=std)
    return _resized_as(images, cut, mean, std)


def _resized_as(
    images: Any, cut: int | None, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """Return the transform with the resizing of an image processor."""
    size: Any = getattr(images, "size", None)
    short = size.get("shortest_edge") if hasattr(size, "get") else None
    kind = _interpolation(images)
    if short is not None and cut is not None and kind == "bicubic" and short >= cut:
        return build("clip", cut, mean=mean, std=std, short_side=None if short == cut else short)
    square = None if short is not None else _side(size)
    if square is not None and cut in (None, square) and kind is not None:
        name = "squash" if kind == "bicubic" else "squash_bilinear"
        return build(name, square, mean=mean, std=std)
    how = f"size {size}, crop {cut}, resample {getattr(images, 'resample', None)}"
    if size is None and hasattr(images, "max_num_patches"):
        how = "it keeps the shape of each image (NaFlex), and the frames of a transform are square"
    raise UsageError(
        f"{type(images).__name__} resizes in a way that no transform has ({how}). Give transform= "
        "too, such as transform='clip': the mean and standard deviation of the processor are used."
    )


def _interpolation(images: Any) -> str | None:
    """Return ``"bilinear"`` or ``"bicubic"``, or ``None`` for another interpolation."""
    resample = getattr(images, "resample", None)
    # The numbers of Pillow and of torchvision's fast processors.
    return {2: "bilinear", 3: "bicubic"}.get(int(getattr(resample, "value", resample) or 0))


def _moments_of_processor(images: Any) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation for pixels in [0, 1] that a processor uses."""
    normalises = _does(images, "normalize")
    means = _channels(images.image_mean) if normalises else [0.0] * 3
    stds = _channels(images.image_std) if normalises else [1.0] * 3
    factor = float(getattr(images, "rescale_factor", 1 / 255)) if _does(images, "rescale") else 1.0
    if getattr(images, "include_top", False):  # EfficientNet divides twice
        stds = [std * own for std, own in zip(stds, _channels(images.image_std), strict=True)]
    offset = 1.0 if getattr(images, "rescale_offset", False) else 0.0
    scale = 255 * factor  # 1, up to rounding, for most processors
    if abs(scale - 1) < 1e-6 and not offset:
        return means, stds
    return [(m + offset) / scale for m in means], [s / scale for s in stds]


def _channels(values: Any) -> list[float]:
    return [float(v) for v in values] if isinstance(values, (list, tuple)) else [float(values)] * 3


def _does(images: Any, step: str) -> bool:
    """Return whether an image processor does a step, such as ``"center_crop"``."""
    return bool(getattr(images, f"do_{step}", step != "center_crop"))


def _side(size: Any) -> int | None:
    """Return the side of a square size of a processor; ``None`` for another size."""
    if isinstance(size, int):
        return size
    if not hasattr(size, "get"):
        return None
    height, width = size.get("height"), size.get("width")
    side: int | None = height if height == width else None
    short: int | None = size.get("shortest_edge")
    return short if side is None else side


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether the extension of a file is that of an image format."""
    return os.path.splitext(os.fspath(path))[1].lower() in _IMAGES


def read_image(image: Any) -> Tensor:
    """Read an image with Pillow, upright as its EXIF orientation says.

    Args:
        image: the path of a file, a URL that fsspec opens, the bytes of a file, a file object, an
            image of Pillow, or uint8 ``[H, W, C]`` or ``[C, H, W]``, which Pillow does not read.
            Grey images become RGB, and the alpha channel is dropped.

    Returns:
        uint8 ``[C, H, W]``, RGB.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the file is not an image, or is damaged.
        VideoShapeError: an array has another dtype or shape.
        MissingDependencyError: Pillow is not installed.
    """
    if is_array(image):
        return image_planes(image)
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            'Images are read with Pillow: pip install "openvclip[video]".'
        ) from error
    name = source_name(image)
    if isinstance(image, Image.Image):
        try:
            return _upright(image)
        except (OSError, SyntaxError, ValueError) as error:  # closed, or its file is damaged
            raise VideoError(f"{name}: can't be read as an image ({error}).") from error
    is_path = isinstance(image, (str, os.PathLike)) and not is_url(image)
    file = image if is_path else io.BytesIO(all_bytes(image))
    try:
        with Image.open(file) as opened:
            return _upright(opened)
    except FileNotFoundError as error:
        raise VideoNotFoundError(f"{name}: no such file.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{name}: can't be read as an image ({error}).") from error


def _upright(image: Any) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB"))).movedim(-1, 0)
