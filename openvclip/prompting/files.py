"""Prompts in files of their own, which name the backbone that they fit."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.api import save_checkpoint
from openvclip.checkpoints.formats import read_weights
from openvclip.errors import CheckpointError, OpenVCLIPError, PromptBackboneWarning
from openvclip.prompting.attach import (
    NAMESPACE,
    Model,
    detach,
    load_state_dict,
    prompts_of,
    require_unprompted,
)
from openvclip.prompting.text import find_text_tower
from openvclip.prompting.vifi import attach_vifi
from openvclip.prompting.vita import attach_vita
from openvclip.towers.prompted import find_tower
from openvclip.weights.names import unwrap

_METHODS: dict[str, Callable[..., Any]] = {"vifi": attach_vifi, "vita": attach_vita}

_SAMPLE, _SAMPLE_TOLERANCE = 32, 0.1
"""Values of a backbone that a file keeps. In half precision they are still the same within the
tolerance, relative to their norm; those of another pretraining have nothing in common with them."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save the prompts of a model, and nothing else, as a safetensors file, atomically.

    The header says how they were attached, and the sizes of the towers that they fit.

    Args:
        model: a model with prompts, or a module that holds one.
        path: the file to write.

    Raises:
        PromptingError: the model has no prompts.
        CheckpointError: the file could not be written; an older file is left as it was.
    """
    prompts = prompts_of(model)
    root = next(m for m in unwrap(model).modules() if getattr(m, NAMESPACE, None) is prompts)
    towers = [name for name in ("vision", "text") if getattr(prompts, name) is not None]
    about = {
        "method": prompts.method,
        "settings": prompts.settings,
        "backbone": {name: _SIZES[name](root) for name in towers},
        "sample": {name: _SAMPLES[name](root) for name in towers},
    }
    save_checkpoint(prompts.state_dict(), path, metadata={NAMESPACE: json.dumps(about)})


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Attach the prompts of a file to a model, in place.

    Args:
        model: a model without prompts, of the same sizes as the one that they were learned with;
            whether open_clip, timm or Hugging Face built the image tower makes no difference.
            Expand it in time first if that one was.
        path: a file that :func:`save` wrote.

    Returns:
        ``model`` itself, frozen but for its prompts.

    Raises:
        CheckpointError: the file holds no prompts, or those of another backbone; the model is as
            it was.
        StateMismatchError: the entries are not those that the file's header tells of.
        PromptingError: the model has prompts already.

    Warns:
        PromptBackboneWarning: the sizes fit, but the model has other weights than the backbone
            that the prompts were learned with.
    """
    file = read_weights(path)
    about = _about(file.metadata, str(file.path))
    require_unprompted(model)
    root = unwrap(model)
    for tower, sizes in about["backbone"].items():
        _require_sizes(sizes, _SIZES[tower](root), f"{file.path}: the prompts", tower)
    try:
        _METHODS[about["method"]](model, **about["settings"])
    except OpenVCLIPError as error:
        raise CheckpointError(f"{file.path} can't be attached: {error}") from error
    try:
        load_state_dict(root, {f"{NAMESPACE}.{n}": v for n, v in file.weights.items()})
    except OpenVCLIPError:
        detach(model)
        raise
    for tower, sample in about["sample"].items():
        _compare_weights(sample, _SAMPLES[tower](root), str(file.path))
    return model


def _about(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """What the header says, once it is known to be of a form that can be used."""
    if NAMESPACE not in metadata:
        raise CheckpointError(
            f"{path} holds no prompts: its header has no entry {NAMESPACE!r}. Give a file that "
            "openvclip.prompting.save wrote."
        )
    try:
        about = json.loads(metadata[NAMESPACE])
        method, settings = about["method"], dict(about["settings"])
        known = set(inspect.signature(_METHODS[method]).parameters)
        right = settings.keys() <= known and all(
            isinstance(about[part], dict) and about[part].keys() <= _SIZES.keys()
            for part in ("backbone", "sample")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the entry {NAMESPACE!r} of its header is damaged."
        ) from error
    if not right:
        raise CheckpointError(
            f"{path}: the entry {NAMESPACE!r} of its header has parts that this version of "
            "openvclip does not know."
        )
    checked: dict[str, Any] = about
    return checked


def _require_sizes(
    file: Mapping[str, Any], model: Mapping[str, Any], what: str, tower: str
) -> None:
    # Not every tower tells all of its sizes.
    unlike = [name for name in model if name in file and file[name] != model[name]]
    if unlike:
        rows = [("", "file", "model")] + [
            (name, str(file[name]), str(model[name])) for name in unlike
        ]
        table = "".join(f"\n  {title:<16}{a:<14}{b}".rstrip() for title, a, b in rows)
        raise CheckpointError(
            f"{what} were learned with another {tower} tower.{table}\n"
            "Build the model that they were learned with."
        )


def _compare_weights(file: list[float], model: list[float], path: str) -> None:
    a, b = torch.tensor(file), torch.tensor(model)
    if a.shape != b.shape or (a - b).norm() > _SAMPLE_TOLERANCE * b.norm():
        warnings.warn(
            f"{path}: the prompts were learned with a backbone of the same sizes and other weights "
            "than the model's. Load its weights first.",
            PromptBackboneWarning,
            stacklevel=3,
        )


# --- the backbone ------------------------------------------------------------------------------


def _vision_sizes(model: nn.Module) -> dict[str, Any]:
    tower = find_tower(model).facts
    sizes: dict[str, Any] = {
        "width": tower.width,
        "layers": tower.layers,
        "heads": tower.heads,
        "patch size": tower.patch_size,
        "image size": tower.image_size,
        "feature size": tower.feature_size,
    }
    told = {name: size for name, size in sizes.items() if size is not None}
    return {name: size if isinstance(size, int) else list(size) for name, size in told.items()}


def _text_sizes(model: nn.Module) -> dict[str, Any]:
    tower = find_text_tower(model)
    if tower is None:
        raise CheckpointError(
            f"{type(model).__name__} has no text tower of open_clip's, and the file holds text "
            "prompts. Give the whole CLIP."
        )
    return {
        "width": tower.transformer.width,
        "layers": len(tower.transformer.resblocks),
        "context length": tower.context_length,
        "vocabulary": tower.vocab_size,
    }


def _sample(weight: Tensor) -> list[float]:
    values: list[float] = weight.detach().flatten()[:_SAMPLE].float().tolist()
    return values


def _vision_sample(model: nn.Module) -> list[float]:
    return _sample(find_tower(model).facts.first_weight)


def _text_sample(model: nn.Module) -> list[float]:
    tower = find_text_tower(model)
    return _sample(tower.positional_embedding)


_SIZES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vision": _vision_sizes,
    "text": _text_sizes,
}
_SAMPLES: dict[str, Callable[[Any], list[float]]] = {
    "vision": _vision_sample,
    "text": _text_sample,
}
