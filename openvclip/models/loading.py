"""A CLIP by name with its weights, its tokenizer and the pixels it takes, ready for videos."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.api import load_checkpoint
from openvclip.checkpoints.formats import kind_of
from openvclip.errors import ModelNameError
from openvclip.models.preprocess import transform_for
from openvclip.towers.temporal import expand_temporal_attention
from openvclip.towers.view import Boundary
from openvclip.video.transforms import Transform
from openvclip.weights.names import named_state

_SCHEMAS = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class LoadedModel:
    """What an evaluation or a prediction needs of a model.

    Attributes:
        name: what it is called in tables.
        model: holds the original CLIP's weights, in eval mode.
        tokenizer: of its text tower.
        transform: from 8-bit frames to the pixels that its image tower takes.
        tuned: state dict of the fine-tuned model, or ``None``.
    """

    name: str
    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    transform: Transform
    tuned: dict[str, Tensor] | None = None


def load_model(
    name: str,
    clip: str | os.PathLike[str] | None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    expand: bool | None = None,
    window: int = 1,
    boundary: Boundary = "zero",
    transform: str = "released",
    device: str | torch.device = "cpu",
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> LoadedModel:
    """Build an open_clip model, load the original CLIP into it, and read a fine-tuned one.

    Args:
        name: a model of open_clip, such as ``"ViT-B-16-quickgelu"``; a JSON file with an open_clip
            model configuration; or ``"local-dir:..."`` and ``"hf-hub:..."`` as open_clip has them,
            which bring their weights.
        clip: the original CLIP's weights: a tag of open_clip, such as ``"openai"``, or a file for
            :func:`load_checkpoint`. ``None`` where ``name`` brings them.
        checkpoint: a file of fine-tuned weights for :func:`load_checkpoint`.
        expand: let frames attend to their neighbours; without it the model is CLIP applied frame
            by frame. By default where there is a ``checkpoint``: CLIP's own weights have not
            learnt to use it.
        window: see :func:`expand_temporal_attention`.
        boundary: see :func:`expand_temporal_attention`.
        transform: ``"released"`` or ``"clip"``, see :func:`openvclip.video.transforms.build`.
        device: where to put the model.
        allow_missing: see :func:`load_checkpoint`; of ``checkpoint``. The original CLIP's values
            are taken for what is missing.
        allow_unexpected: see :func:`load_checkpoint`; of ``checkpoint``.

    Raises:
        ModelNameError: open_clip has no such model, or no such weights for it.
        CheckpointError, StateMismatchError: a file can't be read, or does not fit the model.
        UnsupportedModelError: the image tower can't be expanded.
    """
    import open_clip

    if checkpoint is not None:
        kind_of(Path(checkpoint))  # told before the original CLIP's weights are downloaded
    known = _registered(name)
    model = _built(known, clip)
    to_pixels = transform_for(model, transform)
    if expand or (expand is None and checkpoint is not None):
        expand_temporal_attention(model, window=window, boundary=boundary)
    tuned = None
    if checkpoint is not None:
        tuned = fine_tuned(
            model, checkpoint, allow_missing=allow_missing, allow_unexpected=allow_unexpected
        )
        tuned = {n: v.to(device) for n, v in tuned.items()}
    model = model.to(device).eval()
    return LoadedModel(Path(known).name, model, open_clip.get_tokenizer(known), to_pixels, tuned)


def fine_tuned(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
) -> dict[str, Tensor]:
    """The state dict that a model would have with the weights of a file; it keeps its own.

    Args:
        model: holds the original CLIP, expanded or not.
        checkpoint: see :func:`load_checkpoint`.
        allow_missing: see :func:`load_checkpoint`; the model's values are taken for these.
        allow_unexpected: see :func:`load_checkpoint`.

    Raises:
        CheckpointError, StateMismatchError: the file can't be read, or does not fit the model.
    """
    original = {n: v.detach().clone() for n, v in named_state(model).items()}
    load_checkpoint(
        checkpoint, model, allow_missing=allow_missing, allow_unexpected=allow_unexpected
    )
    tuned = {n: v.detach().clone() for n, v in named_state(model).items()}
    model.load_state_dict(original)
    return tuned


def brings_weights(name: str) -> bool:
    """Whether the name of a model says where its weights are, too."""
    return name.startswith(_SCHEMAS)


def _registered(name: str) -> str:
    """The name under which open_clip knows the model; a configuration file is registered."""
    import open_clip

    if brings_weights(name):
        return name
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ModelNameError(
                f"{name}: no such file; expected an open_clip model configuration."
            )
        try:
            open_clip.add_model_config(path)
        except ValueError as error:
            raise ModelNameError(f"{name}: is not JSON ({error}).") from error
        if path.stem not in open_clip.list_models():
            raise ModelNameError(
                f"{name}: is no open_clip model configuration; expected the entries embed_dim, "
                "vision_cfg and text_cfg."
            )
        return path.stem
    if name not in open_clip.list_models():
        import difflib

        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        raise ModelNameError(
            f"open_clip has no model {name!r}; did you mean {', '.join(near) or 'another'}? "
            "Expected one of open_clip.list_models(), or a JSON file with a model configuration."
        )
    return name


def _built(name: str, clip: str | os.PathLike[str] | None) -> Any:
    """The model with the original CLIP's weights."""
    import open_clip

    if brings_weights(name):
        return open_clip.create_model(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if clip is None:
        raise ModelNameError(
            f"{name} without weights; give clip: a file, or one of open_clip's for it: "
            f"{', '.join(tags) or 'there are none'}."
        )
    given = os.fspath(clip)
    if given in tags:
        return _downloaded(name, given)
    if not Path(given).is_file():
        raise ModelNameError(
            f"{given!r} is neither a file of weights nor one of open_clip's for {name}: "
            f"{', '.join(tags) or 'there are none'}."
        )
    # A file says nothing of the pixels; all published weights of a model agree about them.
    noted = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    pixels = {key: noted[key] for key in ("mean", "std") if key in noted}
    with _without_warnings():
        model = open_clip.create_model(name, load_weights=False, force_preprocess_cfg=pixels)
    load_checkpoint(given, model)
    return model


def _downloaded(name: str, tag: str) -> Any:
    import open_clip

    try:
        return open_clip.create_model(name, pretrained=tag)
    except (RuntimeError, OSError) as error:
        raise ModelNameError(
            f"The weights {tag!r} of {name} can't be had: {str(error).rstrip('.')}. Without a "
            "connection, give a file of weights instead."
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps open_clip from logging that the model has random weights: they are loaded next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
