"""Expand the attention of a CLIP's image tower over time, without a new parameter, and back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ExpansionError, ExpansionOptionError, UnsupportedModelError
from openvclip.towers.attention import TemporalTower, require_video
from openvclip.towers.family import Encoder, Family
from openvclip.towers.view import Boundary, FrameView

Model = TypeVar("Model", bound=nn.Module)

# A family's module is imported only where one of the modules that its towers come from is in use.
_FAMILIES = {
    "openvclip.towers.open_clip": ("open_clip",),
    "openvclip.towers.timm": ("timm",),
    "openvclip.towers.hf": (
        "transformers.models.clip.modeling_clip",
        "transformers.models.siglip.modeling_siglip",
    ),
}
_EXPANDABLE = (
    "open_clip's VisionTransformer; timm's VisionTransformer (SigLIP, ViTamin, MobileCLIP-B) and "
    "Eva (EVA01, EVA02, PE), in open_clip or alone; the vision models of Hugging Face's CLIP and "
    "SigLIP (transformers 5)"
)


def expand_temporal_attention(
    model: Model,
    *,
    window: int = 1,
    boundary: Boundary = "zero",
    layers: Iterable[int] | slice | None = None,
) -> Model:
    r"""Let the tokens of each frame attend to the neighbouring frames too, in place.

    Equation 3 of Open-VCLIP, in every self-attention layer of the image tower:

    .. math:: y_{s,t} = \mathrm{Softmax}\left(\frac{q_{s,t}\,[K_{(t-w)\sim(t+w)}]^T}
              {\sqrt{d}}\right)[V_{(t-w)\sim(t+w)}]

    Nothing is added: the parameters are the same objects under the same names, optimizers made
    before keep working, and image batches ``[B, C, H, W]`` give bit for bit what they gave. A
    video ``[B, T, C, H, W]`` gives one feature a frame: ``model.encode_image(video)`` is
    ``[B, T, D]`` (``model.get_image_features(pixel_values=video).pooler_output`` with Hugging
    Face); :func:`encode_video` pools them. The clip's length is read from the tensor,
    so clips of any length, and images and videos in one step, need no setting. A single clip
    needs its batch axis: ``[T, C, H, W]`` is a batch of T images.

    Args:
        model: an open_clip model (with a tower of its own or one of timm's), a Hugging Face
            ``CLIPModel`` or ``SiglipModel``, the image tower of one of these, or a module that
            holds one such tower.
        window: frames in view on either side (``w``), 1 or more. The paper uses 1.
        boundary: what stands for frames outside the clip.
            ``"zero"`` (what the released code does): zero key and value vectors, which take
            their share of the softmax. ``"mask"``: no weight. ``"replicate"``: the end frame
            again. With the last two a clip of equal frames gives what the image gives (the
            static videos of Lemma 4.1).
        layers: indices (negative ones count from the end) or a slice of the layers to expand;
            in the others each frame attends to itself alone. Default: all.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModelError: there is no tower in the model that can be expanded, or several.
        ExpansionError: the model is expanded already, or has prompts.
        ExpansionOptionError: an argument is out of range.

    Example:
        >>> import open_clip, torch
        >>> model = open_clip.create_model("ViT-B-32-quickgelu")
        >>> model = expand_temporal_attention(model)
        >>> model.encode_image(torch.zeros(1, 8, 3, 224, 224)).shape
        torch.Size([1, 8, 512])
    """
    if not isinstance(window, int) or window < 1:
        raise ExpansionOptionError(
            f"window={window!r}: expected a number of frames on either side, 1 or more."
        )
    view = FrameView(window, boundary)
    family, tower = find_tower(model)
    if isinstance(tower, TemporalTower):
        raise ExpansionError(
            "The model is expanded already. Call restore_spatial_attention(model) first to expand "
            "it with other settings."
        )
    n_layers = family.n_layers(tower)
    chosen = _layer_indices(layers, n_layers)
    views = [view if i in chosen else FrameView(0, boundary) for i in range(n_layers)]
    family.expand(tower, views)
    return model


def restore_spatial_attention(model: Model) -> Model:
    """Undo :func:`expand_temporal_attention`, in place: the model is exactly what it was.

    Returns:
        ``model`` itself, with its weights as they are now.

    Raises:
        ExpansionError: the model is not expanded, or has prompts.
        UnsupportedModelError: there is no tower in the model that could be.
    """
    family, tower = find_tower(model)
    if not isinstance(tower, TemporalTower):
        raise ExpansionError("The model is not expanded, so there is nothing to restore.")
    family.restore(tower)
    return model


def encode_video(model: nn.Module, video: Tensor) -> Tensor:
    """Pooled feature of each clip: the mean of its L2-normalised frame features.

    The dot product with a normalised text feature is the mean over frames of their cosine
    similarities, the paper's frame-averaged logit up to the scale. The mean itself is not
    normalised again.

    Args:
        model: an open_clip model, a Hugging Face ``CLIPModel``, ``SiglipModel`` or one of their
            vision models, or the image tower of either. One that is not expanded encodes each
            frame on its own, which is CLIP applied frame by frame (the baseline of Table 4).
        video: normalised frames ``[B, T, C, H, W]``, floating point.

    Returns:
        ``[B, D]``.

    Raises:
        VideoShapeError: wrong rank, dtype, channels or frame size, no clips, no frames, or a list
            of clips.
        UnsupportedModelError: the model has no known way to encode images, or gives no single
            feature for an image.
    """
    return functional.normalize(encode_frames(model, video), dim=-1).mean(dim=1)


def encode_frames(model: nn.Module, video: Tensor) -> Tensor:
    """Feature of each frame of each clip, as the tower projects it: not normalised, not pooled.

    Args:
        model: what :func:`encode_video` takes.
        video: normalised frames ``[B, T, C, H, W]``, floating point.

    Returns:
        ``[B, T, D]``.

    Raises:
        VideoShapeError, UnsupportedModelError: as for :func:`encode_video`.
    """
    require_video(video)
    encode = _encoder(model)
    expanded = is_expanded(model)
    # The families are imported where they are needed, which can't be put into a compiled graph.
    if not expanded and not torch.compiler.is_compiling():
        _require_video_of_tower(model, video)
    frames = encode(model, video if expanded else video.flatten(0, 1))
    if not isinstance(frames, Tensor) or frames.ndim != (3 if expanded else 2):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no single feature vector for each frame; expected a "
            "model whose tower pools its tokens."
        )
    return frames if expanded else frames.unflatten(0, video.shape[:2])


def _require_video_of_tower(model: nn.Module, video: Tensor) -> None:
    """Raise where the tower would fail on a video, or crop it: what expanded ones do themselves.

    Models of the user's own are left alone, since they may change the frames before their tower.
    """
    inner = getattr(model, "_orig_mod", model)
    library = type(inner).__module__.partition(".")[0]
    if library in ("open_clip", "timm", "transformers"):
        for family in _families()[0]:
            for tower in family.find_towers(inner):
                family.require(tower, video)


def _encoder(model: nn.Module) -> Encoder:
    if hasattr(model, "encode_image"):
        return lambda model, pixels: model.encode_image(pixels)
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for family in _families()[0]:
        encode = family.encoder(inner)
        if encode is not None:
            return encode
    raise UnsupportedModelError(
        f"{type(model).__name__} has no encode_image() and is no Hugging Face CLIP or SigLIP, nor "
        "an image tower of a known kind. Under DistributedDataParallel wrap the classifier that "
        "holds the model instead of the model."
    )


def is_expanded(model: nn.Module) -> bool:
    """Whether ``model`` holds an expanded tower."""
    return any(isinstance(module, TemporalTower) for module in model.modules())


def _families() -> tuple[list[Family], list[str]]:
    """The families whose library is loaded, and what keeps others of these from being used."""
    found: list[Family] = []
    problems: list[str] = []
    for path, modules in _FAMILIES.items():
        if any(name in sys.modules for name in modules):
            # A library too old for its adapter must not keep the towers of other libraries from
            # being expanded.
            try:
                found.append(importlib.import_module(path).FAMILY)
            except ImportError as error:
                problems.append(f"{path} can't be used with what is installed: {error}")
    return found, problems


def find_tower(model: nn.Module, purpose: str = "be expanded in time") -> tuple[Family, nn.Module]:
    """The one tower of ``model`` that can be expanded, and its family.

    Args:
        model: where to look; the tower may be expanded already.
        purpose: what the tower is wanted for, for the error text.

    Raises:
        UnsupportedModelError: there is no such tower, or there are several.
        ExpansionError: the tower has prompts.
    """
    families, problems = _families()
    found = [(family, tower) for family in families for tower in family.find_towers(model)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnsupportedModelError(
            f"The model holds {len(found)} towers that can {purpose}; expected one. Pass the "
            "tower itself, for example model.visual."
        )
    if is_expanded(model):  # but not by a family: the class that prompts gave the tower
        raise ExpansionError(
            "The tower has prompts, which go onto it after its expansion. Call "
            "openvclip.prompting.detach(model) first."
        )
    visual = getattr(model, "visual", getattr(model, "vision_model", model))
    inner = getattr(visual, "trunk", None)
    name = type(visual).__name__ + (f" around {type(inner).__name__}" if inner is not None else "")
    raise UnsupportedModelError(
        " ".join(
            [
                f"The image tower is a {name}, which can't {purpose}. Towers that can: "
                f"{_EXPANDABLE}.",
                *problems,
            ]
        )
    )


def _layer_indices(layers: Iterable[int] | slice | None, n: int) -> set[int]:
    if layers is None:
        return set(range(n))
    if isinstance(layers, slice):
        return set(range(n)[layers])
    if not isinstance(layers, Iterable):
        raise ExpansionOptionError(f"layers={layers!r}: expected a list of indices or a slice.")
    given = list(layers)
    outside = [i for i in given if not (isinstance(i, int) and -n <= i < n)]
    if outside:
        raise ExpansionOptionError(
            f"layers={given}: expected indices from {-n} to {n - 1}; the tower has {n} layers."
        )
    return {i % n for i in given}
