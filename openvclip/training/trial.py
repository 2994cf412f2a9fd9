"""The commands that try the model of a run, with the flags that the training decided on."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from openvclip.checkpoints.atomic import atomic_path
from openvclip.models.loading import brings_weights, name_of_transformers
from openvclip.prompting.classifier import PHOTO_TEMPLATE
from openvclip.training.methods import is_expanded
from openvclip.training.presets import PRESETS
from openvclip.training.recipe import PROMPT_METHODS
from openvclip.training.validation import TEST_SAMPLERS

_FPS = 30  # of openvclip predict
# Options of the training that the test has too, with the same defaults.
_SHARED = ["method", "frames", "sampling_rate", "target_fps", "sampler", "short_side", "template"]


def sees_neighbours(args: argparse.Namespace) -> bool:
    """Return whether frames attend to neighbouring frames in a run with these arguments."""
    return is_expanded(args.method) and not args.frame_by_frame


def write_lists(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Write the texts that the commands need to the output folder.

    Args:
        args: the arguments of the training.
        names: names of the training classes.

    Returns:
        The description of each file, for the model card.
    """
    _write(args.out / "classes.txt", names)
    files = {"`classes.txt`": "the names of the training classes"}
    template = _template(args)
    if template is not None:
        _write(args.out / "templates.txt", [template])
        files["`templates.txt`"] = "the text of a class"
    return files


def _write(path: Path, lines: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _template(args: argparse.Namespace) -> str | None:
    """Return the template, if it is not the 28 templates of the commands or learned."""
    if args.template is not None:
        return str(args.template)
    learned = args.method in PROMPT_METHODS
    return None if learned or is_expanded(args.method) else PHOTO_TEMPLATE


def trial_commands(args: argparse.Namespace) -> dict[str, str]:
    """Return commands that try the result of a run, by what they do.

    ``openvclip predict`` prints the labels of a video. It takes no prompts, and it pools the frames
    as Open-VCLIP does. ``examples/accuracy.py`` repeats the test of the method exactly.

    Args:
        args: the arguments of the training. VIDEO, LIST and FOLDER stand for files to be chosen.
    """
    commands = {}
    if args.method not in PROMPT_METHODS:
        predict = ["openvclip", "predict", "VIDEO", "--labels-file", str(args.out / "classes.txt")]
        commands["labels of a video"] = shlex.join([*predict, *_predict_flags(args)])
    if args.frame_by_frame and is_expanded(args.method):
        return commands  # examples/accuracy.py expands these methods
    accuracy = ["python", "examples/accuracy.py", "--annotations", "LIST", "--videos", "FOLDER"]
    commands["accuracy"] = shlex.join([*accuracy, *_accuracy_flags(args)])
    return commands


def _model_flags(args: argparse.Namespace) -> list[str]:
    model = name_of_transformers(args.hf) if args.hf else args.model
    weights = [] if brings_weights(model) else ["--pretrained", args.pretrained]
    return ["--model", model, *weights]


def _predict_flags(args: argparse.Namespace) -> list[str]:
    flags = [*_model_flags(args), "--checkpoint", str(args.out / "final.safetensors")]
    if not sees_neighbours(args):
        flags += ["--no-expand"]
    if _template(args) is not None:
        flags += ["--templates", str(args.out / "templates.txt")]
    flags += ["--frames", str(args.frames)]
    if args.sampler == "uniform":
        return [*flags, "--sampler", "uniform", "--views", "1"]
    return [*flags, "--sampling-rate", str(round(args.sampling_rate * _FPS / args.target_fps) or 1)]


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
