"""The final model of the experiment, in a folder that ``openvclip predict --model`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import openvclip
from examples.shapes.experiment import FRAMES, classes_of
from examples.shapes.model import MEAN, MODEL_NAME, STD, WEIGHTS, create_model
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.world import TEMPLATES
from openvclip.checkpoints import Base, Contract, load_checkpoint, save_checkpoint
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.models.folders import StoredModel
from openvclip.models.saving import describe_folder
from openvclip.models.usage import contract_of
from openvclip.video import Sampling, transforms
from openvclip.weights import weights_hash

FINAL = "openvclip-shapes.safetensors"
CLASSES = "classes.txt"


def write_final(folder: Path, averaged: Path, lam: float, frames: int = FRAMES) -> None:
    """Write the final weights, how they are used, and the names of all classes.

    Args:
        folder: the folder of the experiment.
        averaged: file of the average of the weights along the fine-tuning.
        lam: weight of the original CLIP in the final weights.
        frames: number of frames of a clip.
    """
    model, tokenizer = create_model()
    contract = contract_of_final(openvclip.expand_temporal_attention(model), lam, frames)
    final = openvclip.interpolate(model.state_dict(), load_checkpoint(averaged), lam)
    metadata = {"lambda": f"{lam:g}", CONTRACT_KEY: contract.to_json()}
    save_checkpoint(final, folder / FINAL, dtype=torch.float16, metadata=metadata)
    describe_folder(StoredModel(model, tokenizer, contract), folder, FINAL)
    names = "".join(f"{name}\n" for name in classes_of("all"))
    (folder / CLASSES).write_text(names, encoding="utf-8")


def write_averaged(path: Path, averaged: Mapping[str, Tensor], frames: int = FRAMES) -> None:
    """Write the average of the weights along the fine-tuning, and how it is used.

    Args:
        path: the file to write.
        averaged: the weights.
        frames: number of frames of a clip.
    """
    model, _ = create_model()
    contract = contract_of_final(openvclip.expand_temporal_attention(model), 0.0, frames)
    save_checkpoint(averaged, path, metadata={"lambda": "0", CONTRACT_KEY: contract.to_json()})


def contract_of_final(model: nn.Module, lam: float, frames: int = FRAMES) -> Contract:
    """Return how the final weights are used.

    Args:
        model: the original shapes CLIP of size ``"small"``, expanded.
        lam: weight of the original CLIP in the final weights.
        frames: number of frames of a clip.
    """
    return contract_of(
        model,
        MODEL_NAME,
        transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        sampling=Sampling(num_frames=frames, sampler="uniform"),
        templates=TEMPLATES,
        method="openvclip",
        lam=lam,
        base=Base(MODEL_NAME, WEIGHTS.name, weights_hash(model.state_dict())),
    )
