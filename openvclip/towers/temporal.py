"""Expanding the attention of a CLIP's image tower over time, undoing it, and encoding videos."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ExpansionError, ExpansionOptionError, UnsupportedModelError
from openvclip.towers.checks import require_images, require_video
from openvclip.towers.families import (
    families_in_use,
    find_tower,
    find_tower_for_prompts,
    is_library_model,
)
from openvclip.towers.family import Encoder, TemporalTower, image_features
from openvclip.towers.prompted import is_prompted
from openvclip.towers.view import (
    Boundary,
    ExpansionSettings,
    FrameView,
    Pooling,
    require_pooling,
    require_window,
)

Model = TypeVar("Model", bound=nn.Module)


def expand_temporal_attention(
    model: Model,
    *,
    window: int = 1,
    boundary: Boundary = "zero",
    layers: Iterable[int] | slice | None = None,
) -> Model:
    r"""Expand the attention of the image tower to neighbouring frames, in place.

    In the self-attention layers of the image tower, the tokens of a frame then attend to the tokens
    of the neighbouring frames too (Equation 3 of Open-VCLIP):

    .. math:: y_{s,t} = \mathrm{Softmax}\left(\frac{q_{s,t}\,[K_{(t-w)\sim(t+w)}]^T}
              {\sqrt{d}}\right)[V_{(t-w)\sim(t+w)}]

    No parameter is added. The parameters stay the same objects with the same names, and existing
    optimizers keep working. For image batches ``[B, C, H, W]`` the output stays bitwise the same.

    For a video ``[B, T, C, H, W]`` the model returns one feature per frame:
    ``model.encode_image(video)`` is ``[B, T, D]``. With Hugging Face this is
    ``model.get_image_features(pixel_values=video).pooler_output``. :func:`encode_video` pools the
    features of a clip. The number of frames is read from the tensor: the same model encodes images
    and clips of any length, and no setting has to change between calls. A single clip needs a batch
    axis, because a tensor ``[T, C, H, W]`` is a batch of T images.

    Args:
        model: an open_clip model with open_clip's or timm's image tower, a model of transformers
            such as ``CLIPModel`` or ``SiglipModel``, the image tower of such a model, or a module
            that holds exactly one such tower.
        window: number of frames in view on either side (w), 1 or more. The paper uses 1.
            Default: 1.
        boundary: how frames outside the clip are treated.
            ``"zero"``: their keys and values are zero vectors, which take part in the softmax. The
            released code does the same.
            ``"mask"``: they get no attention weight.
            ``"replicate"``: the first or the last frame of the clip is repeated.
            With ``"mask"`` and ``"replicate"``, the features of a static clip equal the feature of
            its image (the static videos of Lemma 4.1). Default: ``"zero"``.
        layers: indices or a slice of the layers to expand. Negative indices count from the end. In
            all other layers each frame attends to itself alone. Default: all layers.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: if the model has no supported tower, or several.
        ExpansionError: if the model is expanded already, or has prompts.
        ExpansionOptionError: if an argument is out of range.

    Example:
        >>> import open_clip, torch
        >>> model = open_clip.create_model("ViT-B-32-quickgelu")
        >>> model = expand_temporal_attention(model)
        >>> model.encode_image(torch.zeros(1, 8, 3, 224, 224)).shape
        torch.Size([1, 8, 512])
    """
    require_window(window)
    view = FrameView(window, boundary)
    family, tower = find_tower(model)
    if isinstance(tower, TemporalTower):
        raise ExpansionError(
            "The model is expanded already. Call restore_spatial_attention(model) first to expand "
            "it with other settings."
        )
    n_layers = len(family.layers(tower))
    selected = _layer_indices(layers, n_layers)
    own_frame_only = FrameView(0, boundary)
    family.expand(tower, [view if i in selected else own_frame_only for i in range(n_layers)])
    return model


def restore_spatial_attention(model: Model) -> Model:
    """Undo :func:`expand_temporal_attention`, in place.

    The modules get their original classes back. The weights keep their current values.

    Args:
        model: an expanded model.

    Returns:
        ``model``.

    Raises:
        ExpansionError: if the model is not expanded, or has prompts.
        UnsupportedModelError: if the model has no supported tower, or several; or if another tool,
            such as peft, has replaced or wrapped an attention module.
    """
    family, tower = find_tower(model)
    if not isinstance(tower, TemporalTower):
        raise ExpansionError("The model is not expanded, so there is nothing to restore.")
    family.restore(tower)
    return model


def is_expanded(model: nn.Module) -> bool:
    """Return whether the image tower of ``model`` encodes videos: it is expanded or has prompts."""
    return any(isinstance(module, TemporalTower) for module in model.modules())


def expansion_of(model: nn.Module) -> ExpansionSettings | None:
    """Return the settings with which a model was expanded.

    Args:
        model: a model that :func:`expand_temporal_attention` supports.

    Returns:
        The settings, or ``None`` if the model is not expanded.

    Raises:
        UnsupportedModelError: if the model has no supported tower, or several.
    """
    find = find_tower_for_prompts if is_prompted(model) else find_tower
    family, tower = find(model)
    attentions = family.layers(tower) if isinstance(tower, TemporalTower) else []
    views = [_view_of(layer) for layer in attentions]
    wide = {i: view for i, view in enumerate(views) if view is not None and view.window > 0}
    if not wide:
        return None
    first = next(iter(wide.values()))
    layers = None if len(wide) == len(views) else tuple(wide)
    return ExpansionSettings(first.window, first.boundary, layers)


def _view_of(attention: nn.Module) -> FrameView | None:
    """Return the view of an attention module, also if another tool (peft) has wrapped it."""
    views = (getattr(part, "view", None) for part in attention.modules())
    return next((view for view in views if isinstance(view, FrameView)), None)


def encode_video(
    model: nn.Module,
    video: Tensor,
    *,
    normalize: bool = False,
    pooling: Pooling = "unit_frames",
) -> Tensor:
    """Return one feature per clip: the mean of its L2-normalised frame features.

    By default, the mean is not normalised again. The dot product with a normalised text feature is
    therefore the mean over frames of the cosine similarities, as in the paper, without the
    temperature. The mean of different unit vectors is shorter than 1. To store features, or to
    compare clips with each other, set ``normalize=True``: vectors of unit length.

    Args:
        model: an open_clip model, a CLIP or a vision model of transformers, or the image tower of
            such a model. A model that is not expanded encodes each frame
            independently, which is the frame-by-frame baseline of Table 4.
        video: normalised frames ``[B, T, C, H, W]``, floating point.
        normalize: whether the feature of a clip has unit length. Default: False.
        pooling: ``"unit_frames"``, or ``"frames"`` for models that were trained with it, such as
            ViFi-CLIP: the mean of the frame features is taken before the normalisation. A frame
            with a longer feature vector then has more weight, and the feature of a clip always has
            unit length. Default: ``"unit_frames"``.

    Returns:
        Tensor ``[B, D]``.

    Raises:
        VideoShapeError: if the video has the wrong rank, dtype, number of channels or frame size,
            has no clips or no frames, or is a list of clips.
        UsageError: if ``pooling`` is unknown.
        UnsupportedModelError: if the model is of an unknown kind, or does not return a single
            feature for each frame.
    """
    require_pooling(pooling)
    return pool_frames(encode_frames(model, video), pooling, normalize=normalize)


def pool_frames(features: Tensor, pooling: Pooling, *, normalize: bool = False) -> Tensor:
    """Return one feature per clip, from the features of its frames; see :func:`encode_video`.

    Args:
        features: the result of :func:`encode_frames`, ``[B, T, D]``.
        pooling: see :func:`encode_video`.
        normalize: see :func:`encode_video`.

    Returns:
        Tensor ``[B, D]``.
    """
    if pooling == "frames":
        return functional.normalize(features.mean(dim=1), dim=-1)
    mean = functional.normalize(features, dim=-1).mean(dim=1)
    return functional.normalize(mean, dim=-1) if normalize else mean


def encode_frames(model: nn.Module, video: Tensor) -> Tensor:
    """Return one feature per frame, neither normalised nor pooled.

    Args:
        model: a model that :func:`encode_video` supports.
        video: normalised frames ``[B, T, C, H, W]``, floating point.

    Returns:
        Tensor ``[B, T, D]``.

    Raises:
        VideoShapeError: see :func:`encode_video`.
        UnsupportedModelError: see :func:`encode_video`.
    """
    require_video(video)
    encode = _encoder(model)
    expanded = is_expanded(model)
    # The check imports the files of families, which torch.compile can't trace.
    if not expanded and not torch.compiler.is_compiling():
        _require_video_of_tower(model, video)
    features = encode(model, video if expanded else video.flatten(0, 1))
    if not isinstance(features, Tensor) or features.ndim != (3 if expanded else 2):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no single feature vector for each frame; "
            "expected a model whose tower pools its tokens."
        )
    return features if expanded else features.unflatten(0, video.shape[:2])


def encode_images(model: nn.Module, images: Tensor) -> Tensor:
    """Return one feature per image, not normalised: plain CLIP, also if the model is expanded.

    An image differs from a clip of one frame. With ``boundary="zero"`` or prompts, the frame of a
    clip also attends to tokens outside of the frame.

    Args:
        model: a model that :func:`encode_video` supports.
        images: normalised images ``[B, C, H, W]``, floating point.

    Returns:
        Tensor ``[B, D]``.

    Raises:
        VideoShapeError: if the images have the wrong rank, dtype, number of channels or size.
        UnsupportedModelError: see :func:`encode_video`.
    """
    require_images(images)
    if not torch.compiler.is_compiling():
        _require_video_of_tower(model, images[:, None])
    return _encoder(model)(model, images)


def _require_video_of_tower(model: nn.Module, video: Tensor) -> None:
    """Check the video for the plain tower of ``model``. Expanded towers check it themselves.

    Without this check the tower would fail with another error, or crop the frames. Models that are
    not defined in the library of a family are not checked, since they may resize the frames.
    """
    inner = _without_compile(model)
    if is_library_model(inner):
        for family in families_in_use():
            for tower in family.find_towers(inner):
                family.require(tower, video)


def _encoder(model: nn.Module) -> Encoder:
    if hasattr(model, "encode_image"):
        return lambda model, pixels: model.encode_image(pixels)
    for family in families_in_use():
        encode = family.encoder(_without_compile(model))
        if encode is not None:
            return encode
    if hasattr(model, "get_image_features"):  # transformers, also a tower that can't be expanded
        return image_features
    raise UnsupportedModelError(
        f"{type(model).__name__} has no encode_image() and is not a Hugging Face CLIP or SigLIP "
        "or a supported image tower. Pass a supported model. DistributedDataParallel must wrap a "
        "classifier that holds the model, not the model itself."
    )


def _without_compile(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` wraps, or ``model`` itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _layer_indices(layers: Iterable[int] | slice | None, n_layers: int) -> set[int]:
    if layers is None:
        return set(range(n_layers))
    if isinstance(layers, slice):
        return set(range(n_layers)[layers])
    if not isinstance(layers, Iterable):
        raise ExpansionOptionError(f"layers={layers!r}: expected a list of indices or a slice.")
    indices = list(layers)
    if not all(isinstance(i, int) and -n_layers <= i < n_layers for i in indices):
        raise ExpansionOptionError(
            f"layers={indices}: expected indices from {-n_layers} to {n_layers - 1}; the tower has "
            f"{n_layers} layers."
        )
    return {i % n_layers for i in indices}
