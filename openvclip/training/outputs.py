"""The files of a finished run: weights or prompts, with the accuracy, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openvclip import prompting
from openvclip.checkpoints.api import save_checkpoint
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.models.folders import StoredModel
from openvclip.models.saving import describe_folder
from openvclip.processes import Processes
from openvclip.training.checkpoints import load_whole
from openvclip.training.model_card import ModelCard
from openvclip.training.recipe import PROMPT_METHODS, Recipe
from openvclip.training.validation import Validation
from openvclip.weights.averaging import SWATracker
from openvclip.weights.interpolation import interpolate
from openvclip.weights.shards import full_state

WEIGHTS = {
    "finetuned": "the last weights",
    "averaged": "the average of the weights along the run",
    "final": "interpolated with the original CLIP: the weights to use",
}
"""The files of weights, and a description of each."""

PROMPTS = {"prompts": "the prompts alone, for `openvclip.prompting.load`"}
"""The file of a method that learns prompts, and its description."""


@dataclass(frozen=True)
class RunOutputs:
    """The results of a run, for :func:`write_outputs`.

    Attributes:
        model: the trained model, whole or sharded.
        clip: state dict of the original CLIP.
        swa: the average of the weights; ``None`` if the method averages nothing.
        shapes: shape of each entry of the model before the model was sharded.
        recipe: the recipe of the training.
        validation: computes the accuracy of the weights that the model holds.
        processes: the processes of the run. The first process writes.
        described: how the weights are used, of
            :func:`openvclip.training.trial.described_run`; ``None`` if the run learned prompts.
    """

    model: nn.Module
    clip: Mapping[str, Tensor]
    swa: SWATracker | None
    shapes: Mapping[str, Sequence[int]]
    recipe: Recipe
    validation: Validation
    processes: Processes
    described: StoredModel | None = None


@dataclass(frozen=True)
class RunDescription:
    """The facts about a run that its model card shows.

    Attributes:
        name: name of the original model.
        settings: settings of the run, by name.
        data: facts about the training videos, by name.
        files: description of files that are in the folder already, by name.
        commands: commands that try the model, by what they do.
    """

    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)


def write_outputs(folder: Path, outputs: RunOutputs, description: RunDescription) -> None:
    """Write the weights or the prompts of a run and a model card. All processes call this.

    The model holds the final weights afterwards.

    Args:
        folder: folder of the files.
        outputs: the results of the run.
        description: facts about the run, for the model card.
    """
    prompted = outputs.recipe.method in PROMPT_METHODS
    lam = None if prompted else outputs.recipe.lam
    if prompted:
        files, results = write_prompts(folder, outputs)
        message = f"Wrote {folder / 'prompts.safetensors'}: the prompts alone."
    else:
        files, results = write_weights(folder, outputs)
        message = f"Wrote {folder / 'final.safetensors'}: interpolated at lambda {lam}."
    if outputs.processes.is_first:
        contract = _describe(folder, outputs, description, results)
        files |= description.files
        card = ModelCard(
            description.name,
            lam,
            description.settings,
            description.data,
            results,
            files,
            description.commands,
            contract,
        )
        card.write(folder / "README.md")
        print(message)
        for title, command in description.commands.items():
            print(f"To see the {title}:\n  {command}")


def _describe(
    folder: Path,
    outputs: RunOutputs,
    description: RunDescription,
    results: Mapping[str, float],
) -> Contract | None:
    """Write how the final weights are used, and what is needed to load them from the folder."""
    stored = outputs.described
    if stored is None:
        return None
    contract = stored.contract.with_(
        lam=outputs.recipe.lam, data=dict(description.data), results=dict(results)
    )
    describe_folder(replace(stored, contract=contract), folder, "final.safetensors")
    return contract


def final_weights(
    model: nn.Module, clip: Mapping[str, Tensor], swa: SWATracker | None, lam: float
) -> dict[str, Tensor]:
    """Return the original CLIP interpolated with the average of the weights (Equation 10).

    Args:
        model: the trained model. Its weights are used if there is no average.
        clip: state dict of the original CLIP.
        swa: the average of the weights.
        lam: weight of ``clip``.
    """
    theta = swa.averaged_state_dict() if swa is not None else model.state_dict()
    return interpolate(clip, full_state(theta), lam)


def write_weights(folder: Path, outputs: RunOutputs) -> tuple[dict[str, str], dict[str, float]]:
    """Write the last, the averaged and the final weights. All processes call this.

    The model holds the final weights afterwards.

    Returns:
        The description of each file, and the accuracies by name.
    """
    model, swa, lam = outputs.model, outputs.swa, outputs.recipe.lam
    states = {"finetuned": full_state(model.state_dict())}
    if swa is not None:
        states["averaged"] = full_state(swa.averaged_state_dict())
    states["final"] = final_weights(model, outputs.clip, swa, lam)
    # The last weights are the tensors of the model: they are written before the model changes.
    for name, weights in states.items() if outputs.processes.is_first else ():
        save_checkpoint(
            {key: value.reshape(outputs.shapes[key]) for key, value in weights.items()},
            folder / f"{name}.safetensors",
            metadata=_texts(outputs.described, lam if name == "final" else 0.0),
        )
    results = _named(outputs.validation.accuracy(), "last weights")
    load_whole(model, states["final"])
    results |= _named(outputs.validation.accuracy(), "final weights")
    return {f"`{name}.safetensors`": WEIGHTS[name] for name in states}, results


def _texts(described: StoredModel | None, lam: float) -> dict[str, str]:
    """Return the texts of a file of weights."""
    texts = {"lambda": str(lam)}
    if described is not None:
        texts[CONTRACT_KEY] = described.contract.with_(lam=lam).to_json()
    return texts


def write_prompts(folder: Path, outputs: RunOutputs) -> tuple[dict[str, str], dict[str, float]]:
    """Write the prompts of a frozen model. All processes call this.

    Returns:
        The description of the file, and the accuracies by name.
    """
    results = _named(outputs.validation.accuracy(), "last prompts")
    if outputs.processes.is_first:
        prompting.save(outputs.model, folder / "prompts.safetensors")
    return {f"`{name}.safetensors`": text for name, text in PROMPTS.items()}, results


def _named(accuracy: Mapping[str, float], what: str) -> dict[str, float]:
    return {f"{name}, {what}": value for name, value in accuracy.items()}
