"""The tiny CLIP of the shapes world: an open_clip model with a configuration file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from open_clip import CLIP

__all__ = [
    "MEAN",
    "MODEL_NAME",
    "STD",
    "WEIGHTS",
    "Tokenizer",
    "create_model",
    "normalise",
]

MODEL_NAME = "shapes-clip"

#: The committed weights of the pretrained model.
WEIGHTS = Path(__file__).parent / "weights" / "shapes-clip.safetensors"

#: Mean and standard deviation of the RGB channels, as CLIP uses them.
MEAN: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
STD: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

Tokenizer = Callable[[list[str]], Tensor]


def create_model(weights: str | os.PathLike[str] | None = WEIGHTS) -> tuple[CLIP, Tokenizer]:
    """Make the tiny CLIP through open_clip's model-config mechanism.

    Args:
        weights: a safetensors file of weights, or ``None`` for a freshly initialised model.

    Returns:
        The model (float32, on the CPU, in eval mode) and open_clip's tokenizer for it.

    Raises:
        FileNotFoundError: if the file of weights does not exist.
    """
    import open_clip

    open_clip.add_model_config(Path(__file__).with_name(f"{MODEL_NAME}.json"))
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"no weights at {weights}: make them with "
            f"`python -m examples.shapes.pretrain --out {weights}`"
        )
    pretrained = None if weights is None else os.fspath(weights)
    model: CLIP = open_clip.create_model(MODEL_NAME, pretrained=pretrained)
    tokenizer: Tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    return model.eval(), tokenizer


def normalise(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Turn drawn pixels ``[..., H, W, 3]`` of 0..255 into model input ``[..., 3, H, W]``."""
    values = torch.as_tensor(pixels).float().div(255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3).contiguous()
