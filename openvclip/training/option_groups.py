"""The groups of command-line options of ``examples/finetune.py``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from openvclip.training.recipe import Recipe, Run
from openvclip.training.shared_options import (
    add_device_options,
    add_frame_options,
    add_model_options,
    add_template_option,
    positive,
    share_of_one,
)
from openvclip.training.validation import TEST_SAMPLERS

LARGE_LAM = 0.6
"""Weight of CLIP for ViT-L/14 in the paper. Smaller models have the default of the recipe."""

PROMPT_NUMBERS = {
    "vision_prompts": "number of prompts in a frame (bridge; default: 16) or of global prompts in "
    "a layer (vita; default: 8)",
    "text_prompts": "number of prompts in a text (default: 16 for bridge, 8 for vita)",
    "vision_depth": "layers of the image tower that have prompts (default: 9, bridge)",
    "text_depth": "layers of the text tower that have prompts (default: 9, bridge)",
}
"""The options that give numbers and depths of prompts, with their help texts."""


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of a training run but ``--preset``."""
    model = parser.add_argument_group("model")
    add_model_options(model)
    _add_start_options(model)
    _add_video_options(parser)
    _add_recipe_options(parser)
    _add_method_options(parser)
    _add_device_options(parser)
    _add_output_options(parser)


def _add_start_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hf",
        metavar="NAME|FOLDER",
        help="a CLIP of Hugging Face, loaded with transformers, in place of --model",
    )
    group.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE",
        help="fine-tuned weights that replace the weights of the original CLIP (bridge needs them)",
    )


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos (--annotations and --videos, or --shards)")
    group.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="lines of path and class, or the official lists of a data set; for --objective "
        "contrastive: captions, as lines of path,caption or as a retrieval data set has them",
    )
    group.add_argument(
        "--train-list",
        type=Path,
        metavar="FILE",
        help="the training videos, one on each line, if the captions in --annotations are also of "
        "other videos (contrastive)",
    )
    group.add_argument("--videos", type=Path, metavar="FOLDER", help="folder of the videos")
    group.add_argument(
        "--shards",
        metavar="PATTERN",
        help='WebDataset shards with .mp4 and .cls files, such as "k400-{0000..0999}.tar"',
    )
    group.add_argument(
        "--shard-index",
        type=Path,
        metavar="FILE",
        help="labels of the shards, a file that python -m openvclip.training.shards writes",
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a class name on each line (default: the names in --annotations)",
    )
    group.add_argument(
        "--zero-shot-classes",
        type=Path,
        metavar="FILE",
        help="a class name on each line; a warning lists the names that are also training classes",
    )
    add_frame_options(group)
    group.add_argument(
        "--sampler",
        choices=tuple(TEST_SAMPLERS),
        default="dense",
        help="dense: frames at --sampling-rate from a random start; uniform: the centres of "
        "--frames equal segments of the video",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the clips; use --no-flip if classes tell left from right",
    )
    group.add_argument(
        "--color-jitter",
        type=float,
        default=0.0,
        help="range of the change of brightness, contrast and saturation",
    )
    group = parser.add_argument_group(
        "validation on the training classes, or on pairs of video and caption, after each epoch"
    )
    group.add_argument(
        "--val-annotations",
        type=Path,
        metavar="FILE",
        help="lines of path and class; captions for --objective contrastive",
    )
    group.add_argument(
        "--val-list",
        type=Path,
        metavar="FILE",
        help="the validation videos, one on each line, if the captions in --val-annotations are "
        "also of other videos (contrastive)",
    )
    group.add_argument(
        "--val-videos",
        type=Path,
        metavar="FOLDER",
        help="folder of the validation videos (default: --videos)",
    )


def _add_fields(group: argparse._ArgumentGroup, settings: type[Recipe | Run]) -> None:
    """Add a flag for each field of a dataclass that has a help text."""
    for setting in fields(settings):
        if "help" not in setting.metadata:
            continue
        flag: dict[str, Any] = {"default": setting.default, **setting.metadata}
        if flag.pop("at_least", None) == 1:
            flag["type"] = positive
        elif flag.pop("is_share", False):
            flag["type"] = share_of_one
        elif isinstance(setting.default, bool):
            flag["action"] = "store_true"
        elif isinstance(setting.default, tuple):
            flag["type"] = type(setting.default[0])
        else:
            flag["type"] = type(setting.default)
        if setting.name == "lam":
            flag["default"] = None
            flag["help"] += f" (default: {setting.default}; {LARGE_LAM} for ViT-L)"
        group.add_argument("--" + setting.name.replace("_", "-"), **flag)


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--objective",
        choices=("classification", "contrastive"),
        default="classification",
        help="classification: the class of each video; contrastive: which caption belongs to which "
        "video of the batch, for retrieval and search",
    )
    _add_fields(group, Recipe)
    group = parser.add_argument_group("run")
    _add_fields(group, Run)
    group.add_argument(
        "--frame-by-frame",
        action="store_true",
        help="do not expand the temporal attention (the curve CLIP of Figure 2)",
    )


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts and prompts")
    add_template_option(group)
    for name, text in PROMPT_NUMBERS.items():
        group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=text)
    group.add_argument(
        "--class-prompts",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="learn text prompts for each class (vita); they work for no other classes",
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices and speed")
    add_device_options(group)
    group.add_argument(
        "--per-device-batch",
        type=positive,
        default=8,
        help="videos at a time on a device; a step accumulates gradients up to --batch-size",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the layers with torch.compile (--compile without BACKEND uses inductor)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output; the same command resumes from the last checkpoint")
    group.add_argument(
        "--out", required=True, type=Path, metavar="FOLDER", help="folder of all outputs"
    )
    group.add_argument(
        "--save-every",
        type=positive,
        metavar="STEPS",
        help="steps between two checkpoints (default: an epoch)",
    )
    group.add_argument("--keep", type=positive, default=2, help="number of checkpoints to keep")
    group.add_argument(
        "--log-every",
        type=positive,
        default=10,
        metavar="STEPS",
        help="steps between two lines of the log",
    )
