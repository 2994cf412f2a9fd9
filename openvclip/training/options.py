"""The command-line options of ``examples/finetune.py``, and the typed values that they give."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
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
from openvclip.training.option_groups import (
    LARGE_LAM,
    PROMPT_NUMBERS,
    add_training_options,
)
from openvclip.training.presets import overview
from openvclip.training.recipe import PROMPT_METHODS, Recipe, Run, recipe_settings
from openvclip.training.shared_options import (
    HelpFormatter,
    add_preset_option,
    amp_of,
    sampling_of,
)
from openvclip.training.validation import (
    TEST_SAMPLERS,
    SharedAccuracy,
    SharedRetrieval,
    shared_validation,
)
from openvclip.video import VideoDataset
from openvclip.video.transforms import Transform


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
    add_training_options(parser)
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
        values["lam"] = LARGE_LAM if is_large else Recipe.lam
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
    numbers = {name: getattr(args, name) for name in PROMPT_NUMBERS}
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
    settings = {**model, **recipe_settings(recipe), **how, **clips}
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
