"""How the model of a run is used: its contract, and the commands that try the model."""

from __future__ import annotations

import argparse
import copy
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openvclip.checkpoints.atomic import atomic_path
from openvclip.checkpoints.contract import Base, Contract
from openvclip.models.classifier import VIDEO_TEMPLATES
from openvclip.models.folders import StoredModel
from openvclip.models.loading import LoadedModel, brings_weights, name_of_transformers
from openvclip.models.usage import contract_of
from openvclip.prompting.classifier import PHOTO_TEMPLATE
from openvclip.training.methods import is_expanded
from openvclip.training.presets import PRESETS
from openvclip.training.recipe import PROMPT_METHODS
from openvclip.training.shared_options import sampling_of
from openvclip.training.validation import TEST_SAMPLERS
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state

# Options of the training that the test has too, with the same defaults.
_SHARED = ["method", "frames", "sampling_rate", "target_fps", "sampler", "short_side", "template"]


def sees_neighbours(args: argparse.Namespace) -> bool:
    """Return whether frames attend to neighbouring frames in a run with these arguments."""
    return is_expanded(args.method) and not args.frame_by_frame


def write_lists(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Write the class names, which the commands need, to the output folder.

    For the contrastive objective, which has no classes, do nothing.

    Args:
        args: the arguments of the training.
        names: names of the training classes.

    Returns:
        The description of each file, for the model card.
    """
    if args.objective == "contrastive":
        return {}
    with atomic_path(args.out / "classes.txt") as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return {"`classes.txt`": "the names of the training classes"}


def _template(args: argparse.Namespace) -> str | None:
    """Return the template, if it is not the 28 templates of the commands or learned."""
    if args.objective == "contrastive":
        return "{}"  # a sentence is encoded as it is
    if args.template is not None:
        return str(args.template)
    learned = args.method in PROMPT_METHODS
    return None if learned or is_expanded(args.method) else PHOTO_TEMPLATE


def _pools_units(args: argparse.Namespace) -> bool:
    """Return whether frame features are L2-normalised before their mean is computed."""
    return args.objective == "contrastive" or is_expanded(args.method)


def contract_of_run(
    args: argparse.Namespace, loaded: LoadedModel, *, hashed: bool = True
) -> Contract | None:
    """Return how the weights of a run are used.

    They are used as the test of the method uses them: with the views and crops of the preset.

    Args:
        args: the arguments of the training.
        loaded: the model of the run before the first step, expanded if the method expands it, with
            the transform for training.
        hashed: whether to store the hash of the weights of ``loaded``.

    Returns:
        The contract; ``None`` if the run learns prompts, which have a file of their own.
    """
    if args.method in PROMPT_METHODS:
        return None
    testing = PRESETS[args.preset].testing
    template = _template(args)
    source = name_of_transformers(args.hf) if args.hf else args.model
    pretrained = args.start_from or (None if brings_weights(source) else args.pretrained)
    name = loaded.name if Path(source).exists() else source
    return contract_of(
        loaded.model,
        args.hf or name,
        loaded.transform.with_(name="released", crops=testing.get("crops", 1)),
        sampling=sampling_of(args, TEST_SAMPLERS[args.sampler], testing.get("views", 1)),
        templates=VIDEO_TEMPLATES if template is None else [template],
        pooling="unit_frames" if _pools_units(args) else "frames",
        method=args.method,
        base=Base(
            name,
            None if pretrained is None else Path(pretrained).name,
            weights_hash(named_state(loaded.model)) if hashed else None,
        ),
    )


def described_run(
    args: argparse.Namespace, loaded: LoadedModel, *, hashed: bool = True
) -> StoredModel | None:
    """Return what is needed to describe the weights of a run in its folder.

    Call this before the model is wrapped or sharded. The result holds the modules of the model
    without their values.

    Args:
        args: see :func:`contract_of_run`.
        loaded: see :func:`contract_of_run`.
        hashed: see :func:`contract_of_run`.

    Returns:
        The model on the meta device, with its contract; ``None`` if the run learns prompts.
    """
    contract = contract_of_run(args, loaded, hashed=hashed)
    if contract is None:
        return None
    model = loaded.model
    empty: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    empty |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    return StoredModel(copy.deepcopy(model, empty), loaded.tokenizer, contract)


def trial_commands(args: argparse.Namespace) -> dict[str, str]:
    """Return commands that try the result of a run, by what they do.

    ``openvclip predict`` prints the labels of a video. It takes no prompts.
    ``examples/accuracy.py`` repeats the test of the method. After training on captions,
    ``openvclip index`` and ``openvclip search`` find the moments of a sentence.

    Args:
        args: the arguments of the training. VIDEO, LIST and FOLDER stand for files to be chosen,
            TEXT for a sentence.
    """
    if args.objective == "contrastive":
        index = ["openvclip", "index", "FOLDER", "-o", "library.ovx", "--model", str(args.out)]
        return {
            "index of videos for the search": shlex.join(index),
            "moments of a sentence": shlex.join(["openvclip", "search", "library.ovx", "TEXT"]),
        }
    commands = {}
    if args.method not in PROMPT_METHODS:
        labels = ["--labels-file", str(args.out / "classes.txt")]
        predict = ["openvclip", "predict", "VIDEO", "--model", str(args.out), *labels]
        commands["labels of a video"] = shlex.join(predict)
    if args.frame_by_frame and is_expanded(args.method):
        return commands  # examples/accuracy.py expands these methods
    accuracy = ["python", "examples/accuracy.py", "--annotations", "LIST", "--videos", "FOLDER"]
    commands["accuracy"] = shlex.join([*accuracy, *_accuracy_flags(args)])
    return commands


def _model_flags(args: argparse.Namespace) -> list[str]:
    model = name_of_transformers(args.hf) if args.hf else args.model
    weights = [] if brings_weights(model) else ["--pretrained", args.pretrained]
    return ["--model", model, *weights]


def _accuracy_flags(args: argparse.Namespace) -> list[str]:
    """Return the preset, and the given flags that differ from it."""
    flags = [*_model_flags(args), "--preset", args.preset]
    if args.method in PROMPT_METHODS:
        flags += ["--prompts", str(args.out / "prompts.safetensors")]
        flags += [] if args.start_from is None else ["--checkpoint", str(args.start_from)]
    else:
        flags += ["--checkpoint", str(args.out / "final.safetensors")]
    preset = PRESETS[args.preset].training
    for name in _SHARED:
        value = getattr(args, name)
        if name in args.given and value != preset.get(name):
            text = TEST_SAMPLERS[value] if name == "sampler" else str(value)
            flags += ["--" + name.replace("_", "-"), text]
    return flags
