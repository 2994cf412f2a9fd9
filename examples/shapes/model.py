"""The CLIPs of the shapes world: open_clip models with a configuration file for each size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvclip.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from open_clip import CLIP

__all__ = [
    "BACKBONES",
    "COMMITTED",
    "MEAN",
    "MODEL_NAME",
    "MODEL_NAMES",
    "STD",
    "WEIGHTS",
    "Backbone",
    "Tokenizer",
    "create_model",
    "image_tower",
    "normalise",
    "text_tower",
]

Backbone = Literal["tiny", "small", "wider"]

#: The sizes of the image tower, smallest first. All sizes have the same text tower.
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)

#: The open_clip name of the model of size ``"small"``.
MODEL_NAME = "shapes-clip"

#: The open_clip names of all models.
MODEL_NAMES: dict[Backbone, str] = {
    "tiny": "shapes-clip-tiny",
    "small": MODEL_NAME,
    "wider": "shapes-clip-wider",
}

_FOLDER = Path(__file__).parent

#: The committed weights: a whole model for ``"small"``, and only an image tower for the other
#: sizes, which share the text tower of ``"small"``.
COMMITTED: dict[Backbone, Path] = {
    backbone: _FOLDER / "weights" / f"{name}.safetensors" for backbone, name in MODEL_NAMES.items()
}

#: The committed weights of the model of size ``"small"``.
WEIGHTS = COMMITTED["small"]

#: Mean and standard deviation of the RGB channels in CLIP.
MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

Tokenizer = Callable[[list[str]], Tensor]


def create_model(
    weights: str | os.PathLike[str] | Literal["committed"] | None = "committed",
    *,
    backbone: Backbone = "small",
) -> tuple[CLIP, Tokenizer]:
    """Make a CLIP of the shapes world with open_clip.

    Args:
        weights: a safetensors file of a whole model, or of an image tower (:func:`image_tower`),
            which is combined with the text tower of :data:`WEIGHTS`. ``"committed"``: the weights
            in the repository. ``None``: random weights.
        backbone: size of the image tower.

    Returns:
        The model (float32, on the CPU, in eval mode) and its open_clip tokenizer.

    Raises:
        FileNotFoundError: the file of weights does not exist.
    """
    import open_clip

    name = MODEL_NAMES[backbone]
    open_clip.add_model_config(_FOLDER / f"{name}.json")
    path = COMMITTED[backbone] if weights == "committed" else weights
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"no weights at {path}: make them with `python -m examples.shapes.pretrain "
            f"--backbone {backbone} --out {path}`"
        )
    model = open_clip.CLIP(**open_clip.get_model_config(name))
    if path is not None:
        state = load_checkpoint(path)
        model.load_state_dict(state if "token_embedding.weight" in state else state | text_tower())
    tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    return model.eval(), tokenizer


def image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a state dict that belong to the image tower, and the logit scale."""
    return {name: value for name, value in state.items() if _in_image_tower(name)}


def text_tower() -> dict[str, Tensor]:
    """Return the text tower of the committed model of size ``"small"``, which all sizes share."""
    state = load_checkpoint(WEIGHTS)
    return {name: value for name, value in state.items() if not _in_image_tower(name)}


def _in_image_tower(name: str) -> bool:
    return name.startswith("visual.") or name == "logit_scale"


def normalise(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Convert drawn pixels ``[..., H, W, 3]`` in 0..255 to model input ``[..., 3, H, W]``."""
    values = torch.as_tensor(pixels).float().div(255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3).contiguous()
