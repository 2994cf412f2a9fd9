"""Command-line options that ``examples/finetune.py`` and ``examples/accuracy.py`` share."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from openvclip.models.loading import brings_weights
from openvclip.training.presets import PRESETS, Preset
from openvclip.video.sampling import BY_NUMBER, Sampler, Sampling


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and adds "(default: ...)" to the help of each option.

    Nothing is added if the option has no default, if a switch is off by default, or if the help
    text already has "default:".
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if default is None or default is False or default == [] or "default:" in text:
            return text
        if default is argparse.SUPPRESS:
            return text
        if isinstance(default, (tuple, list)):
            default = " ".join(map(str, default))
        return text + f" (default: {default})".replace("%", "%%")


def positive(text: str) -> int:
    """Read a whole number of at least 1, as an ``argparse`` type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def share_of_one(text: str) -> float:
    """Read a number above 0 and at most 1, as an ``argparse`` type."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0 and at most 1")
    return number


def add_preset_option(parser: argparse.ArgumentParser, arguments: list[str] | None) -> Preset:
    """Add ``--preset``, and return the preset that the arguments name.

    Pass its flags to ``parser.set_defaults`` before the arguments are parsed.
    """
    options: Any = {
        "choices": PRESETS,
        "default": "open-vclip",
        "help": "a published recipe, which sets the defaults of other flags",
    }
    parser.add_argument("--preset", **options)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", **options)
    return PRESETS[early.parse_known_args(arguments)[0].preset]


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the original CLIP."""
    group.add_argument(
        "--model",
        default="ViT-B-16-quickgelu",
        help="an open_clip model, a JSON file with an open_clip model configuration, a folder of a "
        "CLIP of transformers, or transformers:NAME for a name on the Hugging Face Hub",
    )
    group.add_argument(
        "--pretrained",
        default="openai",
        metavar="TAG|FILE",
        help="weights of the original CLIP: a tag of open_clip, or a file",
    )


def unused_weight_options(args: argparse.Namespace) -> dict[str, str]:
    """Return why options of weights have no effect, for ``openvclip.commands.parsing``."""
    reason = "with a model that has weights already" if brings_weights(args.model) else ""
    return {"pretrained": reason}


def add_frame_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of frames, except the sampler and the views."""
    group.add_argument("--frames", type=positive, default=8, help="frames of a clip")
    group.add_argument(
        "--sampling-rate",
        type=positive,
        default=16,
        help="distance between two frames of a clip, in frames at --target-fps",
    )
    group.add_argument(
        "--target-fps",
        type=float,
        default=30.0,
        help="frame rate for which --sampling-rate is given, in frames per second",
    )
    group.add_argument(
        "--short-side",
        type=positive,
        metavar="PIXELS",
        help="short side of the frames before the crop (default: in tests, the crop size; in "
        "training, a random size from the crop size to 8/7 of the crop size)",
    )
    group.add_argument(
        "--backend", choices=("pyav", "torchcodec"), default="pyav", help="the decoder"
    )


def unused_frame_options(args: argparse.Namespace) -> dict[str, str]:
    """Return why options of frames have no effect, for ``openvclip.commands.parsing``."""
    whole = f"with --sampler {args.sampler}: its frames span the whole video"
    return dict.fromkeys(
        ("sampling_rate", "target_fps"), whole if args.sampler in BY_NUMBER else ""
    )


def add_template_option(group: argparse._ArgumentGroup) -> None:
    """Add the option for the text of a class."""
    group.add_argument(
        "--template",
        metavar="TEXT",
        help='text of a class, with {} for the class name (default: 28 templates; "a photo of a '
        '{}." for vifi; the learned prompts for bridge and vita)',
    )


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the device, the precision, the workers and the other processes."""
    group.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    group.add_argument(
        "--num-workers", type=int, default=4, help="processes that read videos, for each device"
    )
    group.add_argument(
        "--amp",
        choices=("bfloat16", "float16", "off"),
        help="dtype of autocast (default: bfloat16 on a GPU, else off)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="how long a process waits for other processes",
    )


def amp_of(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast; ``None`` if autocast is off."""
    amp = args.amp or ("bfloat16" if device.type == "cuda" else "off")
    return None if amp == "off" else getattr(torch, amp)


def sampling_of(args: argparse.Namespace, sampler: Sampler, views: int = 1) -> Sampling:
    """Return the sampling options of the arguments, with a sampler and a number of views."""
    return Sampling(
        num_frames=args.frames,
        sampling_rate=args.sampling_rate,
        target_fps=args.target_fps,
        views=views,
        sampler=sampler,
        backend=args.backend,
    )
