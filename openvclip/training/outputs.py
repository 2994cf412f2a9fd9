"""What a run leaves: files of weights, or of prompts, and what they were measured to be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import openvclip
from openvclip import prompting
from openvclip.checkpoints import save_checkpoint
from openvclip.processes import Processes
from openvclip.training.checkpoints import load_whole
from openvclip.training.model_card import ModelCard
from openvclip.training.recipe import PROMPTED, Recipe
from openvclip.training.validation import Validation
from openvclip.weights.shards import full_state

WEIGHTS = {
    "finetuned": "the last weights",
    "averaged": "the average of the weights along the run",
    "final": "interpolated with the original CLIP: the weights to use",
}
"""The files of weights."""

PROMPTS = {"prompts": "the prompts alone, for `openvclip.prompting.load`"}
"""The file of a method that learns prompts."""


def final_weights(
    model: nn.Module, clip: dict[str, Tensor], swa: openvclip.SWATracker | None, lam: float
) -> dict[str, Tensor]:
    """Equation 10: CLIP interpolated with the average, or with the last weights without one."""
    theta = swa.averaged_state_dict() if swa is not None else model.state_dict()
    return openvclip.interpolate(clip, full_state(theta), lam)


def leave(
    out: Path,
    name: str,
    recipe: Recipe,
    model: nn.Module,
    clip: dict[str, Tensor],
    swa: openvclip.SWATracker | None,
    shapes: Mapping[str, Sequence[int]],
    validation: Validation,
    processes: Processes,
    settings: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """Write what the method gives, weights or prompts, and a model card; say what to use.

    Args:
        out: folder of the files.
        name: of the model, for the card.
        recipe: how it was trained.
        model: as training left it.
        clip: the original CLIP.
        swa: the average, where the method averages.
        shapes: of the entries as the model had them before it was sharded.
        validation: of the weights.
        processes: the processes; all of them call this.
        settings: for the card.
        data: which videos, for the card.
    """
    prompted = recipe.method in PROMPTED
    if prompted:
        files, results = write_prompts(out, model, validation, processes)
        said = f"Wrote {out / 'prompts.safetensors'}: the prompts alone."
    else:
        files, results = write_weights(
            out, model, clip, swa, recipe.lam, shapes, validation, processes
        )
        said = f"Wrote {out / 'final.safetensors'}: lambda {recipe.lam} on the original CLIP."
    if processes.is_first:
        lam = None if prompted else recipe.lam
        ModelCard(name, lam, settings, data, results, files).write(out / "README.md")
        print(said)


def write_weights(
    out: Path,
    model: nn.Module,
    clip: dict[str, Tensor],
    swa: openvclip.SWATracker | None,
    lam: float,
    shapes: Mapping[str, Sequence[int]],
    validation: Validation,
    processes: Processes,
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the last, the average and the final weights; the model has the final ones afterwards.

    Args:
        out: folder of the files, which the first process writes; all of them call this.
        model: as training left it, whole or sharded.
        clip: the original CLIP.
        swa: the average, where the method averages.
        lam: weight of ``clip`` in the final weights.
        shapes: of the entries as the model had them before it was sharded.
        validation: of the last and of the final weights.
        processes: the processes.

    Returns:
        What the folder holds, and the accuracies by name.
    """
    states = {"finetuned": full_state(model.state_dict())}
    if swa is not None:
        states["averaged"] = full_state(swa.averaged_state_dict())
    states["final"] = final_weights(model, clip, swa, lam)
    # Before the model changes: the last weights are its own tensors.
    for name, weights in states.items() if processes.is_first else ():
        save_checkpoint(
            {key: value.reshape(shapes[key]) for key, value in weights.items()},
            out / f"{name}.safetensors",
            metadata={"lambda": str(lam)} if name == "final" else None,
        )
    results = {f"{name}, last weights": value for name, value in validation.accuracy().items()}
    load_whole(model, states["final"])
    results |= {f"{name}, final weights": v for name, v in validation.accuracy().items()}
    return {f"`{name}.safetensors`": WEIGHTS[name] for name in states}, results


def write_prompts(
    out: Path, model: nn.Module, validation: Validation, processes: Processes
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the prompts of a frozen model; arguments and results as :func:`write_weights`."""
    results = {f"{name}, last prompts": value for name, value in validation.accuracy().items()}
    if processes.is_first:
        prompting.save(model, out / "prompts.safetensors")
    return {f"`{name}.safetensors`": text for name, text in PROMPTS.items()}, results
