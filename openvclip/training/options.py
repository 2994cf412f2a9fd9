"""The command-line options of ``examples/finetune.py``, and the typed values that they give."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from openvclip.commands.parsing import Parser
from openvclip.models.labels import read_labels
from openvclip.processes import Processes
from openvclip.training.batches import Batching, class_warnings
from openvclip.training.captions import CaptionedVideos, find_captioned
from openvclip.training.consistency import require_consistent
from openvclip.training.inputs import (
    TrainingVideos,
    videos_from_captions,
    videos_from_files,
    videos_from_shards,
)
from openvclip.training.presets import overview
from openvclip.training.recipe import PROMPT_METHODS, Recipe, Run
from openvclip.training.shared_options import (
    HelpFormatter,
    add_device_options,
    add_frame_options,
    add_model_options,
    add_preset_option,
    add_template_option,
    amp_of,
    positive,
    sampling_of,
    share_of_one,
)
from openvclip.training.validation import (
    TEST_SAMPLERS,
    SharedAccuracy,
    SharedRetrieval,
    shared_validation,
)
from openvclip.video import VideoDataset
from openvclip.video.transforms import Transform

_LARGE_LAM = 0.6
"""Weight of CLIP for ViT-L/14 in the paper. Smaller models have the default of the recipe."""

_PROMPT_NUMBERS = {
    "vision_prompts": "number of prompts in a frame (bridge; default: 16) or of global prompts in "
    "a layer (vita; default: 8)",
    "text_prompts": "number of prompts in a text (default: 16 for bridge, 8 for vita)",
    "vision_depth": "layers of the image tower that have prompts (default: 9, bridge)",
    "text_depth": "layers of the text tower that have prompts (default: 9, bridge)",
}


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line of ``examples/finetune.py``.

    Args:
        description: the first part of the help text.
        arguments: the words of the command line. Default: those of the process.
    """
    parser = Parser(
        description=description,
        epilog=overview(),
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # add_preset_option does not see "--pres", an abbreviation of --preset
    )
    preset = add_preset_option(parser, arguments)
    model = parser.add_argument_group("model")
    add_model_options(model)
    _add_start_options(model)
    _add_video_options(parser)
    _add_recipe_options(parser)
    _add_method_options(parser)
    _add_device_options(parser)
    _add_output_options(parser)
    parser.set_defaults(**preset.training)
    args = parser.parse_args(arguments)
    require_consistent(args, parser.error)
    return args


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the arguments give."""
    values = {setting.name: getattr(args, setting.name) for setting in fields(Recipe)}
    if args.lam is None:
        # The large model is ViT-L-14 in open_clip, openai/clip-vit-large-patch14 in Hugging Face.
        is_large = "vit-l" in (args.hf or args.model).lower()
        values["lam"] = _LARGE_LAM if is_large else Recipe.lam
    return Recipe(**values)


def run_of(args: argparse.Namespace, accumulate: int, device: torch.device) -> Run:
    """Return the options of the run.

    Args:
        args: the arguments.
        accumulate: number of micro-batches of a process in a step.
        device: the device, which decides on the default of ``--amp``.
    """
    return Run(
        every=args.every,
        share=args.share,
        alpha_min=args.alpha_min,
        betas=tuple(args.betas),
        steps=args.steps,
        accumulate=accumulate,
        amp=amp_of(args, device),
        checkpointing=args.checkpointing,
        compiler=args.compile,
        fsdp=args.fsdp,
    )


def load_videos(
    args: argparse.Namespace,
    recipe: Recipe,
    transform: Transform,
    processes: Processes,
    device: torch.device,
) -> TrainingVideos:
    """Return the training videos, from an annotation file, from captions or from shards.

    Args:
        args: the arguments.
        recipe: gives the batch size and the seed.
        transform: transform for training.
        processes: the processes that train together.
        device: the device of this process.

    Raises:
        AnnotationError, ClassNamesError: the lists, the index and the class names do not fit.
        VideoNotFoundError: none of the videos with captions exists.
        UsageError: the class names are missing, or the processes can't share the batch.
    """
    names = read_labels(args.classes) if args.classes else None
    sampling = sampling_of(args, args.sampler)
    batching = Batching(
        batch_size=recipe.batch_size,
        micro_batch=args.per_device_batch,
        processes=processes,
        seed=recipe.seed,
        num_workers=args.num_workers,
        pin=device.type == "cuda",
    )
    if args.shards:
        return videos_from_shards(
            args.shards, args.shard_index, names or [], transform, sampling, batching
        )
    if args.objective == "contrastive":
        return videos_from_captions(
            args.annotations, args.videos, args.train_list, transform, sampling, batching
        )
    return videos_from_files(args.annotations, args.videos, names, transform, sampling, batching)


def validation_videos(
    args: argparse.Namespace, names: Sequence[str], transform: Transform
) -> VideoDataset | CaptionedVideos | None:
    """Return the validation videos, one view of each; ``None`` without ``--val-annotations``.

    The videos have captions if the objective is contrastive.

    Args:
        args: the arguments.
        names: names of the training classes.
        transform: transform for training. The validation uses the same size, mean and
            standard deviation.
    """
    if args.val_annotations is None:
        return None
    folder = args.val_videos or args.videos
    clips: dict[str, Any] = {
        "transform": transform.with_(name="released"),
        "sampling": sampling_of(args, TEST_SAMPLERS[args.sampler]),
        "details": True,
    }
    if args.objective == "contrastive":
        paths, captions, _ = find_captioned(args.val_annotations, folder, args.val_list)
        samples = [(path, position) for position, path in enumerate(paths)]
        return CaptionedVideos(VideoDataset(samples, folder, **clips), captions)
    return VideoDataset(args.val_annotations, folder, class_names=names, **clips)


def shared_tests(
    args: argparse.Namespace,
    names: Sequence[str],
    transform: Transform,
    processes: Processes,
    amp: torch.dtype | None,
) -> SharedAccuracy | SharedRetrieval | None:
    """Return the validation that all processes compute; ``None`` without ``--val-annotations``.

    Args:
        args: the arguments.
        names: see :func:`validation_videos`.
        transform: see :func:`validation_videos`.
        processes: the processes that train together.
        amp: dtype of autocast; ``None`` if autocast is off.
    """
    videos = validation_videos(args, names, transform)
    if not videos:
        return None
    reading = {"batch_size": args.per_device_batch, "num_workers": args.num_workers}
    return shared_validation(videos, processes, amp=amp, **reading)


def notes(
    args: argparse.Namespace,
    recipe: Recipe,
    run: Run,
    processes: Processes,
    videos: TrainingVideos,
) -> list[str]:
    """Return what a run prints before the first step: warnings, and a line about the batch.

    Args:
        args: the arguments.
        recipe: the recipe.
        run: options of the run.
        processes: the processes that train together.
        videos: the training videos.
    """
    unseen = read_labels(args.zero_shot_classes) if args.zero_shot_classes else []
    warnings = class_warnings(videos.labels, videos.names, unseen)
    return [
        *videos.warnings,
        *warnings,
        plan(args, recipe, run, processes, videos.batches.batch_size),
    ]


def prompt_numbers_of(args: argparse.Namespace) -> dict[str, int]:
    """Return the numbers and depths of prompts that are given."""
    numbers = {name: getattr(args, name) for name in _PROMPT_NUMBERS}
    return {name: number for name, number in numbers.items() if number is not None}


def settings_of(args: argparse.Namespace, recipe: Recipe, run: Run) -> dict[str, Any]:
    """Return the settings that the weights depend on, without the videos, by name."""
    model = {"hf": args.hf} if args.hf else {"model": args.model, "pretrained": args.pretrained}
    amp = str(run.amp or "off").removeprefix("torch.")
    how = {"every": run.every, "alpha_min": run.alpha_min, "amp": amp, "fsdp": run.fsdp}
    how |= {"betas": list(run.betas), "steps": run.steps, "template": args.template}
    how |= {"frame_by_frame": args.frame_by_frame}
    how |= {} if run.share == 1 else {"share": run.share}
    how |= {} if args.objective == "classification" else {"objective": args.objective}
    how |= {"start_from": None if args.start_from is None else str(args.start_from)}
    pixels = ("frames", "sampling_rate", "target_fps", "sampler", "short_side")
    clips = {name: getattr(args, name) for name in (*pixels, "flip", "color_jitter", "backend")}
    settings = {**model, **asdict(recipe), **how, **clips}
    for name in ("text_tower", "distill", "text_energy"):
        if not settings[name]:  # folders that were written before there was this option go on
            del settings[name]
    if recipe.method in PROMPT_METHODS:
        settings |= {**prompt_numbers_of(args), "class_prompts": args.class_prompts}
    del settings["lam"]  # it changes the final interpolation alone: another value needs no new run
    if run.steps is not None:
        del settings["epochs"]
    return settings


def plan(
    args: argparse.Namespace, recipe: Recipe, run: Run, processes: Processes, batch_size: int
) -> str:
    """Return a line about the batch and the learning rate of the run."""
    at_a_time = min(args.per_device_batch, -(-batch_size // processes.world_size))
    parts = [f"{processes.world_size} processes" if processes.world_size > 1 else "one device"]
    parts += [f"{at_a_time} at a time"]
    if run.accumulate > 1:
        parts += [f"{run.accumulate} accumulation steps"]
    return (
        f"{batch_size} videos a step ({', '.join(parts)}); learning rate {recipe.lr:g}, which is "
        "not scaled to the batch."
    )


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
            flag["help"] += f" (default: {setting.default}; {_LARGE_LAM} for ViT-L)"
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
    for name, text in _PROMPT_NUMBERS.items():
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
