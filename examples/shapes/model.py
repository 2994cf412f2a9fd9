"""The CLIPs of the shapes world: open_clip models with configuration files of their own."""

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

#: The sizes of the image tower, from the smallest; the text tower is the same.
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)

#: The model of size ``"small"``, as open_clip knows it from its configuration file.
MODEL_NAME = "shapes-clip"

#: The names of all three.
MODEL_NAMES: dict[Backbone, str] = {
    "tiny": "shapes-clip-tiny",
    "small": MODEL_NAME,
    "wider": "shapes-clip-wider",
}

_FOLDER = Path(__file__).parent

#: The committed weights: a whole model for ``"small"``, image towers beside its text tower for the
#: others.
COMMITTED: dict[Backbone, Path] = {
    backbone: _FOLDER / "weights" / f"{name}.safetensors" for backbone, name in MODEL_NAMES.items()
}

#: The committed weights of the model of size ``"small"``.
WEIGHTS = COMMITTED["small"]

#: Mean and standard deviation of the RGB channels, as CLIP uses them.
MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

Tokenizer = Callable[[list[str]], Tensor]


def create_model(
    weights: str | os.PathLike[str] | Literal["committed"] | None = "committed",
    *,
    backbone: Backbone = "small",
) -> tuple[CLIP, Tokenizer]:
    """Make a CLIP of the shapes world through open_clip's model-config mechanism.

    Args:
        weights: a safetensors file of a whole model or of an image tower (:func:`image_tower`),
            which is put beside the text tower of :data:`WEIGHTS`; ``"committed"`` for the weights
            that come with the project, ``None`` for a freshly initialised model.
        backbone: size of the image tower.

    Returns:
        The model (float32, on the CPU, in eval mode) and open_clip's tokenizer for it.

    Raises:
        FileNotFoundError: if the file of weights does not exist.
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
    """The part of a model's state that is not its text tower's: image tower and logit scale."""
    return {name: value for name, value in state.items() if _is_image_towers(name)}


def text_tower() -> dict[str, Tensor]:
    """The text tower of the committed model of size ``"small"``, which all sizes share."""
    state = load_checkpoint(WEIGHTS)
    return {name: value for name, value in state.items() if not _is_image_towers(name)}


def _is_image_towers(name: str) -> bool:
    return name.startswith("visual.") or name == "logit_scale"


def normalise(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Turn drawn pixels ``[..., H, W, 3]`` of 0..255 into model input ``[..., 3, H, W]``."""
    values = torch.as_tensor(pixels).float().div(255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3).contiguous()
