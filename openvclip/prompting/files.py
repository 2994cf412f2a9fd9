"""Saving prompts to a file and loading them, with a check that they fit the backbone."""

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
from openvclip.prompting.text_towers import find_text_tower, text_tower
from openvclip.prompting.vifi import attach_vifi
from openvclip.prompting.vita import attach_vita
from openvclip.towers.families import tower_facts
from openvclip.weights.names import unwrap

_METHODS: dict[str, Callable[..., Any]] = {"vifi": attach_vifi, "vita": attach_vita}
_TOWERS = ("vision", "text")

_SAMPLE_SIZE, _SAMPLE_TOLERANCE = 32, 0.1
"""Number of backbone values that a file stores, and their tolerance.

:func:`load` warns if the relative difference between these values and the values of the model is
larger than the tolerance. Rounding to half precision stays within the tolerance. The values of
another pretraining differ completely.
"""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save the prompts of a model, without its backbone, as a safetensors file.

    The file is written atomically. Its metadata store how the prompts were attached, and the sizes
    of the towers.

    Args:
        model: a model with prompts, or a module that holds such a model.
        path: the file to write.

    Raises:
        PromptingError: if the model has no prompts.
        CheckpointError: if the file can't be written. An existing file is not changed then.
    """
    prompts = prompts_of(model)
    root = next(m for m in unwrap(model).modules() if getattr(m, NAMESPACE, None) is prompts)
    towers = [tower for tower in _TOWERS if getattr(prompts, tower) is not None]
    header = {
        "method": prompts.method,
        "settings": prompts.settings,
        "backbone": {tower: _sizes(root, tower) for tower in towers},
        "sample": {tower: _sample(root, tower) for tower in towers},
    }
    save_checkpoint(prompts.state_dict(), path, metadata={NAMESPACE: json.dumps(header)})


def load(model: Model, path: str | os.PathLike[str]) -> Model:
    """Attach the prompts of a file to a model, in place.

    Args:
        model: a model without prompts. It must have the same sizes as the backbone of the prompts.
            Its image tower can be built by open_clip, timm or Hugging Face. If the prompts were
            learned with an expanded model, expand ``model`` first.
        path: a file that :func:`save` wrote.

    Returns:
        ``model``. All its parameters except the prompts are frozen.

    Raises:
        CheckpointError: if the file holds no prompts, or prompts for another backbone. The model is
            not changed then.
        StateMismatchError: if the tensors of the file do not fit its metadata.
        PromptingError: if the model has prompts already.

    Warns:
        PromptBackboneWarning: if the sizes fit, but the weights of the model differ from the
            weights of the backbone that the prompts were learned with.
    """
    file = read_weights(path)
    header = _read_header(file.metadata, str(file.path))
    require_unprompted(model)
    root = unwrap(model)
    for tower, sizes in header["backbone"].items():
        _require_sizes(sizes, _sizes(root, tower), f"{file.path}: the prompts", tower)
    try:
        _METHODS[header["method"]](model, **header["settings"])
    except OpenVCLIPError as error:
        raise CheckpointError(f"{file.path} can't be attached: {error}") from error
    try:
        load_state_dict(root, {f"{NAMESPACE}.{n}": v for n, v in file.weights.items()})
    except OpenVCLIPError:
        detach(model)
        raise
    for tower, sample in header["sample"].items():
        _compare_samples(sample, _sample(root, tower), str(file.path))
    return model


def _read_header(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """Return the metadata entry of :func:`save`.

    Raises:
        CheckpointError: if there is no such entry, or if it is damaged or of an unknown version.
    """
    if NAMESPACE not in metadata:
        raise CheckpointError(
            f"{path} holds no prompts: its metadata have no entry {NAMESPACE!r}. Pass a file that "
            "openvclip.prompting.save wrote."
        )
    try:
        header: dict[str, Any] = json.loads(metadata[NAMESPACE])
        parameters = set(inspect.signature(_METHODS[header["method"]]).parameters)
        known = dict(header["settings"]).keys() <= parameters and all(
            isinstance(header[part], dict) and header[part].keys() <= set(_TOWERS)
            for part in ("backbone", "sample")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the entry {NAMESPACE!r} of its metadata is damaged. Save the prompts again, "
            "or copy the file again."
        ) from error
    if not known:
        raise CheckpointError(
            f"{path}: the entry {NAMESPACE!r} of its metadata has parts that this version of "
            "openvclip does not know. Use the version that wrote the file."
        )
    return header


def _require_sizes(
    file: Mapping[str, Any], model: Mapping[str, Any], prompts: str, tower: str
) -> None:
    # A tower of some libraries does not store all of its sizes.
    different = [name for name in model if name in file and file[name] != model[name]]
    if different:
        rows = [("", "file", "model")]
        rows += [(name, str(file[name]), str(model[name])) for name in different]
        table = "".join(
            f"\n  {name:<16}{in_file:<14}{in_model}" for name, in_file, in_model in rows
        )
        raise CheckpointError(
            f"{prompts} were learned with another {tower} tower.{table}\n"
            "Build the model that they were learned with."
        )


def _compare_samples(file: list[float], model: list[float], path: str) -> None:
    a, b = torch.tensor(file), torch.tensor(model)
    if a.shape != b.shape or (a - b).norm() > _SAMPLE_TOLERANCE * b.norm():
        warnings.warn(
            f"{path}: the prompts were learned with another backbone. It has the same sizes as the "
            "model, but other weights. Load the weights of that backbone first.",
            PromptBackboneWarning,
            stacklevel=3,
        )


# --- the backbone ------------------------------------------------------------------------------


def _sizes(model: nn.Module, tower: str) -> dict[str, Any]:
    return _vision_sizes(model) if tower == "vision" else _text_sizes(model)


def _vision_sizes(model: nn.Module) -> dict[str, Any]:
    facts = tower_facts(model)
    sizes: dict[str, Any] = {
        "width": facts.width,
        "layers": facts.layers,
        "heads": facts.heads,
        "patch size": facts.patch_size,
        "image size": facts.image_size,
        "feature size": facts.feature_size,
    }
    stored = {name: size for name, size in sizes.items() if size is not None}
    return {name: size if isinstance(size, int) else list(size) for name, size in stored.items()}


def _text_sizes(model: nn.Module) -> dict[str, Any]:
    tower = find_text_tower(model)
    if tower is None:
        raise CheckpointError(
            f"{type(model).__name__} has no text tower that takes prompts, and the file holds text "
            "prompts. Pass the whole CLIP."
        )
    return {
        "width": tower.width,
        "layers": tower.layers,
        "context length": tower.context_length,
        "vocabulary": tower.vocab_size,
    }


def _sample(model: nn.Module, tower: str) -> list[float]:
    """Return the first values of a weight of the backbone."""
    weight: Tensor
    if tower == "vision":
        weight = tower_facts(model).first_weight
    else:
        weight = text_tower(model).positional_embedding
    values: list[float] = weight.detach().flatten()[:_SAMPLE_SIZE].float().tolist()
    return values
