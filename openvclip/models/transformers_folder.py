"""The folder of a model of transformers: weights, configuration, image processor and tokenizer.

transformers is imported inside the functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from openvclip.checkpoints.api import load_checkpoint
from openvclip.checkpoints.contract_sections import Pixels
from openvclip.checkpoints.formats import read_weights
from openvclip.checkpoints.model_files import require_shard_size
from openvclip.errors import StateMismatchError, UsageError
from openvclip.models.loading import require_finite_weights
from openvclip.models.tokenizers import as_tokenizer, same_tokens, tokenizer_of_folder

CONFIG_FILE = "config.json"
"""The name of the file in which transformers stores the configuration of a model."""
PIXELS_FILE = "preprocessor_config.json"
"""The name of the file in which transformers stores how images are processed."""
STANDARD_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files of weights that transformers loads, the first that exists."""

_BILINEAR, _BICUBIC = 2, 3  # of Pillow
# SigLIP resizes an image to a square. CLIP and its relatives cut out the centre.
_SQUARE = {"siglip": "SiglipImageProcessor"}


def load_model(folder: Path, weights: Path) -> Any:
    """Return the CLIP model of a folder with its weights, in float32 and in eval mode.

    Args:
        folder: a folder with a ``config.json``.
        weights: the file of weights.

    Raises:
        ModelNameError: transformers can't build the model of the configuration.
        CheckpointError, UnsafeCheckpointError: the weights can't be read.
        StateMismatchError: the weights do not fit the model.
        NonFiniteWeightsError: a weight is NaN or infinite.
        UnsupportedModelError: the model is not a CLIP.
    """
    from openvclip.models import hugging_face

    read_weights(weights, sizes_only=True)  # raises for files that are damaged or not safe
    if weights.name in STANDARD_WEIGHTS:
        model, unexpected = hugging_face.load_clip(str(folder))
        if unexpected:
            raise StateMismatchError(
                f"{weights} does not fit the {type(model).__name__} of {folder / CONFIG_FILE}.",
                unexpected=unexpected,
                hint="Give a folder whose weights and configuration belong together.",
            )
        require_finite_weights(model, str(weights))
    else:
        model = hugging_face.empty_clip(str(folder))
        load_checkpoint(weights, model)
    return model


def write_config(model: nn.Module, tokenizer: Any, folder: Path, pixels: Pixels) -> None:
    """Write the configuration, the image processor and the tokenizer of a model.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer.
        folder: an existing folder.
        pixels: the pixels of a frame that the model is given.

    Raises:
        UsageError: ``tokenizer`` is not a tokenizer of transformers, or transformers would load
            another one from the folder.
    """
    config = cast(Any, model).config
    config.save_pretrained(folder)
    _name_class(model, folder)
    (folder / PIXELS_FILE).write_text(json.dumps(_processor(config, pixels), indent=2) + "\n")
    tokenizer_of_transformers(tokenizer).save_pretrained(folder)
    function = as_tokenizer(tokenizer, model)
    if not same_tokens(tokenizer_of_folder(model, str(folder)), function):
        raise UsageError(
            f"tokenizer is a {type(tokenizer_of_transformers(tokenizer)).__name__}, which can't be "
            f"saved for a {type(model).__name__}: transformers loads another tokenizer from its "
            "files. Create the VideoCLIP with the tokenizer that AutoTokenizer loads for the model."
        )


def write_weights(model: nn.Module, folder: Path, max_shard_size: int | None) -> str:
    """Write the weights of a model as transformers does.

    Args:
        model: a model of transformers.
        folder: an existing folder.
        max_shard_size: bytes of the entries of a shard. Default: one file.

    Returns:
        The name of the file that stands for the weights.

    Raises:
        UsageError: ``max_shard_size`` is not a number of bytes.
    """
    from openvclip.models.hugging_face import without_progress

    require_shard_size(max_shard_size)
    size = max_shard_size or sum(value.nbytes for value in model.state_dict().values()) + 1
    with without_progress():
        cast(Any, model).save_pretrained(folder, max_shard_size=size)
    _name_class(model, folder)
    return next(name for name in STANDARD_WEIGHTS if (folder / name).is_file())


def tokenizer_of_transformers(tokenizer: Any) -> Any:
    """Return the tokenizer of transformers that a tokenizer of a model calls.

    Raises:
        UsageError: there is none.
    """
    for candidate in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if hasattr(candidate, "save_pretrained") and hasattr(candidate, "model_max_length"):
            return candidate
    raise UsageError(
        f"tokenizer is a {type(tokenizer).__name__}, which can't be saved; expected a tokenizer of "
        "transformers. Create the VideoCLIP with tokenizer=AutoTokenizer.from_pretrained(name)."
    )


def _processor(config: Any, pixels: Pixels) -> dict[str, Any]:
    kind = _SQUARE.get(config.model_type)
    square = {"height": pixels.size, "width": pixels.size}
    cropped: dict[str, Any] = {
        "do_center_crop": True,
        "crop_size": square,
        "size": {"shortest_edge": pixels.short_side or pixels.size},
    }
    is_square = kind is not None or pixels.name in ("squash", "squash_bilinear")
    return {
        "image_processor_type": kind or "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": _BILINEAR if pixels.name == "squash_bilinear" else _BICUBIC,
        "rescale_factor": 1 / 255,
        **({"do_center_crop": False, "size": square} if is_square else cropped),
    }


def _name_class(model: nn.Module, folder: Path) -> None:
    """Name the class of transformers in the configuration, not a class that derives from it."""
    names = [k.__name__ for k in type(model).__mro__ if k.__module__.startswith("transformers.")]
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    if names and content.get("architectures") != names[:1]:
        content["architectures"] = names[:1]
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
