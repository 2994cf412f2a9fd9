"""What a CLIP of any library offers: the features of texts, and the logits of cosines.

A CLIP is a model of open_clip, which has the methods ``encode_image`` and ``encode_text``, or a
model of transformers, which has the methods ``get_image_features`` and ``get_text_features``.
:mod:`openvclip.towers` computes the features of images and videos. This file alone knows the rest,
so that the classifiers, the commands and the trainer take the models of both libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UnsupportedModelError, UsageError
from openvclip.towers.family import pooled
from openvclip.towers.temporal import encode_images, encode_video
from openvclip.towers.view import Pooling
from openvclip.weights.arguments import A_DEVICE, require_device


@dataclass(frozen=True)
class TextRules:
    """How a kind of models of transformers reads texts.

    Attributes:
        mask: whether the text tower needs the attention mask of the tokenizer. A tower does not
            need the mask if its attention is causal and the end token is pooled (CLIP), or if the
            tower was trained with padding in view (SigLIP).
        lower: whether the texts are written in lower case.
    """

    mask: bool = True
    lower: bool = False


_CAUSAL = TextRules(mask=False)
_PADDED = TextRules(mask=False, lower=True)
_RULES: dict[str, TextRules] = {
    "clip": _CAUSAL,
    "clipseg": _CAUSAL,
    "metaclip_2": _CAUSAL,
    "groupvit": _CAUSAL,
    "owlvit": _CAUSAL,
    "owlv2": _CAUSAL,
    "siglip": _PADDED,
    "siglip2": _PADDED,
}

_CALL = "Call it through transformers, or load the CLIP that it was trained from"
_REFUSED = {
    "XCLIPModel": "is a video model whose text features change with the video, so class names "
    f"have no features of their own. {_CALL}",
    "FlavaModel": "returns features of tokens, not one feature for an image or a text. Load a "
    "CLIPModel or SiglipModel",
    "ClapModel": "encodes audio, so it can't encode videos. Load a CLIPModel or SiglipModel",
    "Blip2Model": "generates text and has no features of texts. Load a CLIPModel or SiglipModel",
    "CLIPSegForImageSegmentation": "returns masks. Pass its attribute clip, a CLIPSegModel",
    "OwlViTForObjectDetection": "returns boxes. Pass its attribute owlvit, an OwlViTModel",
    "Owlv2ForObjectDetection": "returns boxes. Pass its attribute owlv2, an Owlv2Model",
    **dict.fromkeys(
        ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
        "has no text tower. Load the whole CLIPModel",
    ),
    **dict.fromkeys(
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        "has no image tower. Load the whole CLIPModel",
    ),
    **dict.fromkeys(
        ("SiglipVisionModel", "SiglipForImageClassification"),
        "has no text tower. Load the whole SiglipModel",
    ),
    **dict.fromkeys(
        ("Siglip2VisionModel", "Siglip2ForImageClassification"),
        "has no text tower. Load the whole Siglip2Model",
    ),
}
"""Classes of transformers that are no CLIP, and what to do. The names are those of the classes."""


def is_transformers(model: nn.Module) -> bool:
    """Return whether a model has the methods of a CLIP of transformers."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def text_rules(model: nn.Module) -> TextRules:
    """Return how a model of transformers reads texts. Unknown kinds get the attention mask."""
    return _RULES.get(model_type(model), TextRules())


def model_type(model: nn.Module) -> str:
    """Return the ``model_type`` in the configuration of a model of transformers, or ``""``."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def require_clip(model: nn.Module) -> None:
    """Check that a model encodes images and texts, and has a temperature.

    Raises:
        UnsupportedModelError: the model is neither a CLIP of open_clip nor a CLIP of transformers.
            The error says what to do.
    """
    name = _class_name(model)
    if name in _REFUSED:
        raise UnsupportedModelError(f"{name} {_REFUSED[name]}.")
    lacking = _lacking(model)
    if lacking:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks {', '.join(lacking)}; expected an open_clip model, or a "
            "model of transformers such as CLIPModel or SiglipModel. Pass the model itself, not a "
            "wrapper around it."
        )


def _class_name(model: nn.Module) -> str:
    """Return the name of the class of transformers that a model is, or derives from, or ``""``."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers."):
            return kind.__name__
    return ""


def _lacking(model: nn.Module) -> list[str]:
    """Return the names that a model lacks to be a CLIP of its library."""
    if is_transformers(model):
        has_scale = hasattr(model, "logit_scale") or hasattr(model, "temperature")
        return [] if has_scale else ["logit_scale"]
    names = ("encode_image", "encode_text", "logit_scale")
    return [name for name in names if not hasattr(model, name)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the temperature of a model."""
    return _temperature(model).device


def usable_device(device: object) -> torch.device:
    """Return a device on which models can run here.

    Args:
        device: a device, or its name such as ``"cuda"``.

    Raises:
        UsageError: there is no such device, or this machine does not have it; or it is the meta
            device, which holds no values.
    """
    if require_device(device, "device").type == "meta":
        raise UsageError(f"device={device!r}: the meta device holds no values; {A_DEVICE}.")
    return torch.device(cast(Any, device))


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the features ``[n, D]`` of texts, not normalised.

    The features are those of ``model.encode_text`` (open_clip) or ``model.get_text_features``
    (transformers), bit for bit.

    Args:
        model: a CLIP model of open_clip or transformers.
        tokens: token ids ``[n, L]``; or ``[n, 2, L]``, the token ids and the attention mask of each
            text. The function :func:`openvclip.models.as_tokenizer` gives both.

    Raises:
        UsageError: a model of open_clip gets an attention mask.
    """
    clip = cast(Any, model)
    tokens = tokens.to(device_of(model))
    if hasattr(model, "encode_text"):
        if tokens.ndim == 3:
            raise UsageError(
                f"Got tokens {list(tokens.shape)} with an attention mask; {type(model).__name__} "
                "takes token ids [n, L]. Use the tokenizer of this model."
            )
        features: Tensor = clip.encode_text(tokens)
        return features
    ids, mask = (tokens, None) if tokens.ndim == 2 else tokens.unbind(dim=1)
    return pooled(clip.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True))


def similarity_logits(model: nn.Module, features: Tensor, text: Tensor) -> Tensor:
    """Return the logits of features: the scale times the cosines, plus the bias of SigLIP.

    Args:
        model: a CLIP model of open_clip or transformers.
        features: features of images ``[B, D]`` of unit length, or means of such features.
        text: text features ``[K, D]`` of unit length.

    Returns:
        Tensor ``[B, K]``.
    """
    logits: Tensor = scale_of(model) * features @ text.to(features.dtype).T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


@torch.no_grad()
def cosines_of_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """Return the cosines that :func:`similarity_logits` computed logits from.

    Args:
        model: a CLIP model of open_clip or transformers, with the weights that gave the logits.
        logits: logits of any shape, on any device.
    """
    bias = getattr(model, "logit_bias", None)
    cosines = logits if bias is None else logits - bias.to(logits.device)
    return cosines / scale_of(model).to(logits.device)


def scale_of(model: nn.Module) -> Tensor:
    """Return the positive number that the cosines of a CLIP model are multiplied with."""
    temperature = _temperature(model)
    if not hasattr(model, "logit_scale"):  # ALIGN
        return 1 / temperature
    largest = getattr(model, "max_log_logit_scale", None)  # AIMv2
    return (temperature if largest is None else temperature.clamp(0, largest)).exp()


def _temperature(model: nn.Module) -> Tensor:
    name = "logit_scale" if hasattr(model, "logit_scale") else "temperature"
    temperature: Tensor = getattr(cast(Any, model), name)
    return temperature


def video_features(model: nn.Module, video: Tensor, pooling: Pooling = "unit_frames") -> Tensor:
    """Return one feature for each clip, or for each image.

    Args:
        model: a CLIP model of open_clip or transformers.
        video: clips ``[B, T, C, H, W]``, or images ``[B, C, H, W]``. The features of images are
            those of plain CLIP, also if the model is expanded.
        pooling: how the features of frames become the feature of a clip.

    Returns:
        Tensor ``[B, D]``. The rows of images have unit length; for clips see
        :func:`openvclip.encode_video`.
    """
    if isinstance(video, Tensor) and video.ndim == 4:
        return functional.normalize(encode_images(model, video), dim=-1)
    return encode_video(model, video, pooling=pooling)
