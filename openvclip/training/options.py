"""The command line of :mod:`examples.finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from openvclip.processes import Processes
from openvclip.training.presets import PRESETS, Preset, overview
from openvclip.training.recipe import METHODS, PROMPTED, Recipe, Run
from openvclip.training.validation import TESTED


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; every field of the recipe is a flag."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else --pres would set the preset's name and not what it stands for
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
    _require_consistent(args, parser.error)
    return args


def add_preset_option(parser: argparse.ArgumentParser, arguments: list[str] | None) -> Preset:
    """Add ``--preset`` and look for it among the arguments, before the others are read."""
    options: Any = {
        "choices": PRESETS,
        "default": "open-vclip",
        "help": "a published recipe, for what is not given (%(default)s)",
    }
    parser.add_argument("--preset", **options)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", **options)
    return PRESETS[early.parse_known_args(arguments)[0].preset]


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments give."""
    given = {setting.name: getattr(args, setting.name) for setting in fields(Recipe)}
    if args.lam is None:
        large = "vit-l" in (args.hf or args.model).lower()  # openai/clip-vit-large-patch14, too
        given["lam"] = _LARGE_LAM if large else Recipe.lam
    return Recipe(**given)


_LARGE_LAM = 0.6
"""The paper's for ViT-L/14; smaller models have the recipe's default."""


def run_of(args: argparse.Namespace, accumulate: int, device: torch.device) -> Run:
    """How the recipe is to be run."""
    return Run(
        every=args.every,
        alpha_min=args.alpha_min,
        betas=tuple(args.betas),
        steps=args.steps,
        accumulate=accumulate,
        amp=amp_of(args, device),
        checkpointing=args.checkpointing,
        compiler=args.compile,
        fsdp=args.fsdp,
    )


def amp_of(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast."""
    amp = args.amp or ("bfloat16" if device.type == "cuda" else "off")
    return None if amp == "off" else getattr(torch, amp)


def settings_of(args: argparse.Namespace, recipe: Recipe, run: Run) -> dict[str, Any]:
    """What the numbers of a run depend on, apart from its videos."""
    model = {"hf": args.hf} if args.hf else {"model": args.model, "pretrained": args.pretrained}
    amp = str(run.amp or "off").removeprefix("torch.")
    about = {"every": run.every, "alpha_min": run.alpha_min, "amp": amp, "fsdp": run.fsdp}
    about |= {"betas": list(run.betas), "steps": run.steps, "template": args.template}
    about |= {"frame_by_frame": args.frame_by_frame}
    about |= {"start_from": None if args.start_from is None else str(args.start_from)}
    pixels = ("frames", "sampling_rate", "target_fps", "sampler", "short_side")
    named = {name: getattr(args, name) for name in (*pixels, "flip", "color_jitter", "backend")}
    settings = {**model, **asdict(recipe), **about, **named}
    if recipe.method in PROMPTED:
        settings |= {**prompts_of(args), "class_prompts": args.class_prompts}
    del settings["lam"]  # of the last step only: another one needs no other run
    if run.steps is not None:
        del settings["epochs"]
    return settings


def prompts_of(args: argparse.Namespace) -> dict[str, int]:
    """How many prompts, and how deep, where that is not the method's own number."""
    numbers = {name: getattr(args, name) for name in _PROMPT_NUMBERS}
    return {name: number for name, number in numbers.items() if number is not None}


_PROMPT_NUMBERS = {
    "vision_prompts": "prompts of a frame (bridge 16), global prompts of a layer (vita 8)",
    "text_prompts": "prompts of a text (bridge 16, vita 8)",
    "vision_depth": "layers of the image tower with prompts of their own (bridge 9)",
    "text_depth": "layers of the text tower with prompts of their own (bridge 9)",
}


def _positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Where the original CLIP comes from."""
    group.add_argument(
        "--model",
        default="ViT-B-16-quickgelu",
        help="an open_clip model, or a JSON file with its configuration (%(default)s)",
    )
    group.add_argument(
        "--pretrained", default="openai", help="its open_clip tag, or a file (%(default)s)"
    )


def _add_start_options(group: argparse._ArgumentGroup) -> None:
    """Other places for a run to begin."""
    group.add_argument(
        "--hf", metavar="NAME|FOLDER", help="a CLIP of Hugging Face instead, through transformers"
    )
    group.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE",
        help="fine-tuned weights to begin from in place of the original's (bridge needs them)",
    )


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    """What is trained on, and tested on along the way."""
    group = parser.add_argument_group("videos (--annotations and --videos, or --shards)")
    group.add_argument(
        "--annotations", type=Path, help="lines of path,label, or a data set's official lists"
    )
    group.add_argument("--videos", type=Path, help="folder that the paths start from")
    group.add_argument(
        "--shards",
        metavar="PATTERN",
        help='WebDataset shards with .mp4 and .cls, such as "k400-{0000..0999}.tar"',
    )
    group.add_argument(
        "--shard-index",
        type=Path,
        metavar="FILE",
        help="labels of the shards, written by python -m openvclip.training.shards",
    )
    group.add_argument(
        "--classes", type=Path, help="a class name a line; not needed where the lists name them"
    )
    group.add_argument(
        "--zero-shot-classes",
        type=Path,
        metavar="FILE",
        help="class names that must not be trained on; those that are, are listed",
    )
    add_frame_options(group)
    group.add_argument(
        "--sampler",
        choices=tuple(TESTED),
        default="dense",
        help="frames at --sampling-rate from a random start, or from the whole video, the centre "
        "of each of as many parts (%(default)s)",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the clips; --no-flip is for labels that tell left from right",
    )
    group.add_argument(
        "--color-jitter",
        type=float,
        default=0.0,
        help="reach of brightness, contrast and saturation (%(default)s)",
    )
    validation = parser.add_argument_group("validation on the training classes, after each epoch")
    validation.add_argument("--val-annotations", type=Path, help="lines of path,label")
    validation.add_argument("--val-videos", type=Path, help="folder of these videos (--videos)")


def add_frame_options(group: argparse._ArgumentGroup) -> None:
    """Which frames of a video, and how large, beside the sampler."""
    group.add_argument("--frames", type=_positive, default=8, help="frames of a clip (%(default)s)")
    group.add_argument(
        "--sampling-rate",
        type=_positive,
        default=16,
        help="distance of two frames, at --target-fps (%(default)s)",
    )
    group.add_argument(
        "--target-fps",
        type=float,
        default=30.0,
        help="frames a second that --sampling-rate counts in (%(default)s)",
    )
    group.add_argument(
        "--short-side",
        type=_positive,
        metavar="PIXELS",
        help="of the frames before they are cropped (in training drawn from the size of the crop "
        "to 8/7 of it, in tests the size of the crop)",
    )
    group.add_argument(
        "--backend",
        choices=("pyav", "torchcodec"),
        default="pyav",
        help="the decoder (%(default)s)",
    )


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """The recipe, field by field, and variations of the regulariser."""
    group = parser.add_argument_group("recipe")
    for setting in fields(Recipe):
        kind: Any = type(setting.default)
        by_model = setting.name == "lam"
        default = f"{setting.default}; {_LARGE_LAM} for ViT-L" if by_model else "%(default)s"
        group.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=kind,
            default=None if by_model else setting.default,
            choices=METHODS if setting.name == "method" else None,
            help=f"{setting.metadata['help']} ({default})",
        )
    group.add_argument(
        "--every",
        type=_positive,
        default=1,
        help="steps from one with the regulariser to the next (%(default)s)",
    )
    group.add_argument(
        "--alpha-min", type=float, default=0.0, help="lower end of alpha's interval (%(default)s)"
    )
    group.add_argument(
        "--frame-by-frame",
        action="store_true",
        help="leave the attention as it is, within a frame (the curve CLIP of Figure 2)",
    )
    group.add_argument(
        "--betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW's (%(default)s)"
    )
    group.add_argument(
        "--steps", type=_positive, help="optimizer steps of the run, in place of --epochs"
    )


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """The texts and the prompts of ViFi-CLIP and Vita-CLIP."""
    group = parser.add_argument_group("texts and prompts")
    add_template_option(group)
    for name, text in _PROMPT_NUMBERS.items():
        group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=text)
    group.add_argument(
        "--class-prompts",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="text prompts of each class's own (vita), which serve no other classes",
    )


def add_template_option(group: argparse._ArgumentGroup) -> None:
    """The text of a class."""
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="with {} for the class name, in place of the method's own: 28 templates, \"a photo of "
        'a {}." for vifi, the learned prompts',
    )


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    """How the work is done; the batch stays that of the recipe."""
    group = parser.add_argument_group("devices and speed")
    add_reading_options(group)
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute activations again in the backward pass instead of keeping them",
    )
    group.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile the layers (inductor)",
    )
    group.add_argument(
        "--fsdp", action="store_true", help="shard the model among the processes (FSDP2)"
    )


def add_reading_options(group: argparse._ArgumentGroup) -> None:
    """On what device, in what dtype, and how many videos at a time."""
    group.add_argument("--device", default=None, help="default: cuda where there is one, or cpu")
    group.add_argument(
        "--per-device-batch",
        type=_positive,
        default=8,
        help="videos at a time on a device; a step of training adds up as many as --batch-size "
        "needs (%(default)s)",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        default=4,
        help="processes that read videos, per device (%(default)s)",
    )
    group.add_argument(
        "--amp",
        choices=("bfloat16", "float16", "off"),
        default=None,
        help="autocast (bfloat16 on a GPU, else off)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="how long a process waits for the others (%(default)s)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """What is kept of a run."""
    group = parser.add_argument_group("output; the same command goes on from the last checkpoint")
    group.add_argument("--out", required=True, type=Path, help="folder for everything")
    group.add_argument(
        "--save-every", type=_positive, metavar="STEPS", help="between checkpoints (an epoch)"
    )
    group.add_argument(
        "--keep", type=_positive, default=2, help="checkpoints that are kept (%(default)s)"
    )
    group.add_argument(
        "--log-every",
        type=_positive,
        default=10,
        metavar="STEPS",
        help="between lines of the log (%(default)s)",
    )


def plan(
    args: argparse.Namespace, recipe: Recipe, run: Run, processes: Processes, batch_size: int
) -> str:
    """The batch and the learning rate, as they come out."""
    at_a_time = min(args.per_device_batch, -(-batch_size // processes.world_size))
    parts = [f"{processes.world_size} processes" if processes.world_size > 1 else "one device"]
    parts += [f"{at_a_time} at a time"]
    if run.accumulate > 1:
        parts += [f"{run.accumulate} times added up"]
    return (
        f"{batch_size} videos a step ({', '.join(parts)}); learning rate {recipe.lr:g}, as "
        "given, not scaled to the batch."
    )


def _require_consistent(args: argparse.Namespace, fail: Callable[[str], object]) -> None:
    """Call ``fail`` with a text where options contradict each other or one is missing."""
    if (args.annotations is None) == (args.shards is None):
        fail("give --annotations (with --videos), or --shards")
    if args.annotations is not None and args.videos is None:
        fail("--annotations needs --videos, the folder that its paths start from")
    if args.shards is not None and args.classes is None:
        fail("--shards needs --classes, a class name a line")
    if args.val_annotations is not None and args.val_videos is None and args.videos is None:
        fail("--val-annotations needs --val-videos, the folder that its paths start from")
    if args.method == "bridge" and args.start_from is None:
        fail(
            "--method bridge needs --start-from, the fine-tuned weights that it learns prompts for"
        )
    if args.method in PROMPTED and args.fsdp:
        fail("--fsdp shards what is trained, and prompts are small: leave it out")
    if args.num_workers < 0:
        fail(f"--num-workers {args.num_workers}: expected at least 0")
