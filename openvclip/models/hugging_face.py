"""Load CLIP models of transformers, with their tokenizers and image processors.

Importing this module imports transformers. Import this module inside a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPModel
from transformers.utils import logging

from openvclip.errors import ModelNameError, StateMismatchError, UnsupportedModelError, reason_of
from openvclip.models.building import building
from openvclip.models.features import require_clip
from openvclip.models.hub import is_offline
from openvclip.models.preprocess import image_processor_of, transform_for
from openvclip.models.tokenizers import Tokenizer, tokenizer_of_folder
from openvclip.video.transforms import Transform


class HuggingFaceCLIP(CLIPModel):  # type: ignore[misc]
    """A ``CLIPModel`` with the methods ``encode_image`` and ``encode_text`` of open_clip.

    Use this class with code that calls these two methods, for example an evaluation script that
    was written for open_clip. openvclip itself takes a plain ``CLIPModel`` too. The names of the
    weights are those of ``CLIPModel``, so transformers can load them.
    """

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the projected features of images or videos.

        Args:
            pixels: images ``[B, C, H, W]``, or videos ``[B, T, C, H, W]`` for an expanded model.

        Returns:
            ``[B, D]`` for images, ``[B, T, D]`` for videos.
        """
        features: Tensor = self.get_image_features(pixel_values=pixels).pooler_output
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the projected features ``[B, D]`` of texts, given as token ids ``[B, L]``."""
        features: Tensor = self.get_text_features(input_ids=tokens).pooler_output
        return features


def load(name: str, transform: str = "train") -> tuple[Any, Tokenizer, Transform]:
    """Load a CLIP model of transformers, its tokenizer and its transform.

    Args:
        name: the name of a model on the Hugging Face Hub, or a folder that ``save_pretrained``
            wrote.
        transform: the name of the transform; see :func:`openvclip.video.transforms.build`. Its mean
            and standard deviation are those of the image processor in the folder. Without an image
            processor, they are those of the kind of the model.

    Returns:
        The model in eval mode and in float32, a function from texts to a tensor, and the transform.

    Raises:
        ModelNameError: there is no such model or no tokenizer, or they can't be loaded.
        StateMismatchError: weights of the model are missing in the file.
        UnsupportedModelError: the model is not a CLIP. The error says what to do.
    """
    offline = is_offline(name)  # one request for the three parts
    model, _ = load_clip(name, offline=offline)
    processor = image_processor_of(name, offline=offline)
    pixels = transform_for(model, transform, processor=processor)
    return model, tokenizer_of_folder(model, name, offline=offline), pixels


def load_clip(name: str, *, offline: bool | None = None) -> tuple[Any, list[str]]:
    """Load a CLIP model of transformers.

    Args:
        name: see :func:`load`.
        offline: whether the Hub can't be reached. Default: the Hub is asked.

    Returns:
        The model in eval mode and in float32, and the names of weights that it has no place for.

    Raises:
        ModelNameError, StateMismatchError, UnsupportedModelError: see :func:`load`.
    """
    offline = is_offline(name) if offline is None else offline
    where: dict[str, Any] = {"local_files_only": offline}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        with without_progress():
            model, about = AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, **where
            )
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = reason_of(error)
        if "size" in reason and isinstance(error, RuntimeError):
            raise StateMismatchError(
                f"{name}: the weights do not fit the model of config.json: {reason}.",
                hint="Give a folder whose weights and configuration belong together.",
            ) from error
        raise ModelNameError(
            f"transformers can't load {name}: {reason}. Expected a folder that save_pretrained "
            "wrote, or the name of a model on the Hugging Face Hub"
            f"{', which can not be reached from here' if offline else ''}."
        ) from error
    try:
        require_clip(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    missing = sorted(about["missing_keys"])
    if missing:
        raise StateMismatchError(
            f"{name}: weights of {type(model).__name__} are missing, so they would be random.",
            missing=missing,
        )
    unexpected = [n for n in about["unexpected_keys"] if not n.endswith("position_ids")]
    return model.eval(), sorted(unexpected)


def empty_clip(folder: str) -> Any:
    """Return the model of a ``config.json`` in eval mode, without trained weights.

    Args:
        folder: a folder with the file.

    Raises:
        ModelNameError: transformers can't build the model.
        UnsupportedModelError: the model is not a CLIP.
    """
    try:
        with without_progress():
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = reason_of(error)
        raise ModelNameError(f"transformers can't build the model of {folder}: {reason}.") from (
            error
        )
    require_clip(model)
    return model.eval()


@contextmanager
def without_progress() -> Iterator[None]:
    """Hide transformers' progress bar and its report of the names in the file."""
    with building():
        shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shown:
                logging.enable_progress_bar()
