"""The options of the subcommands that run a model on videos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.types import add_allow_options
from openvclip.errors import UsageError

if TYPE_CHECKING:
    import torch

    from openvclip.models.loading import LoadedModel
    from openvclip.video import Sampling

_AMP = ("bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser, *, checkpoint: bool = True) -> None:
    """Which model, with which weights, where; without ``checkpoint`` the original CLIP's alone."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="ViT-B-16-quickgelu",
        help="name of an open_clip model, a JSON file with an open_clip model configuration, or "
        "local-dir:... or hf-hub:... (%(default)s)",
    )
    group.add_argument(
        "--pretrained",
        default=None,
        metavar="TAG|FILE",
        help="the original CLIP's weights: a tag of open_clip, or a file (openai)",
    )
    if checkpoint:
        _add_checkpoint_options(group)
    else:
        parser.set_defaults(checkpoint=None, expand=False)
    add_allow_options(group)
    group.add_argument(
        "--window", type=int, default=1, help="frames in view on either side (%(default)s)"
    )
    group.add_argument(
        "--boundary",
        choices=("zero", "mask", "replicate"),
        default="zero",
        help="what stands for frames outside the clip (%(default)s, as released)",
    )
    group.add_argument(
        "--templates", type=Path, metavar="FILE", help="a prompt with {} on each line (the 28)"
    )
    group.add_argument("--device", default=None, help="such as cuda or cpu (a GPU if there is one)")
    group.add_argument("--amp", choices=_AMP, help="encode under autocast to this dtype")


def _add_checkpoint_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="fine-tuned weights, of any known family"
    )
    group.add_argument(
        "--expand",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let frames attend to their neighbours, or not: CLIP frame by frame (with a "
        "checkpoint they do)",
    )


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    """Which frames of a video."""
    group = parser.add_argument_group("frames")
    group.add_argument("--frames", type=int, default=8, help="frames of a clip (%(default)s)")
    group.add_argument(
        "--sampling-rate",
        type=int,
        default=16,
        help="distance of two frames, at 30 a second (%(default)s)",
    )
    group.add_argument(
        "--views", type=int, default=3, help="clips taken from a video (%(default)s)"
    )
    group.add_argument(
        "--sampler",
        choices=("released", "uniform"),
        default="released",
        help="which frames make a clip (%(default)s)",
    )
    group.add_argument(
        "--transform",
        choices=("released", "clip"),
        default="released",
        help="from 8-bit frames to pixels (%(default)s)",
    )
    group.add_argument(
        "--backend",
        choices=("pyav", "torchcodec"),
        default="pyav",
        help="the decoder (%(default)s)",
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The frames that the options ask for."""
    from openvclip.video import Sampling

    return Sampling(
        num_frames=options.frames,
        sampling_rate=options.sampling_rate,
        views=options.views,
        sampler=options.sampler,
        backend=options.backend,
    )


def load(options: argparse.Namespace) -> LoadedModel:
    """The model that the options describe; its weights are the original CLIP's."""
    from openvclip.models.loading import brings_weights, load_model

    pretrained = options.pretrained
    if pretrained is None and not brings_weights(options.model):
        pretrained = "openai"
    return load_model(
        options.model,
        pretrained,
        checkpoint=options.checkpoint,
        expand=options.expand,
        window=options.window,
        boundary=options.boundary,
        transform=options.transform,
        device=device_of(options),
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """Where to run: the accelerator of this process, or the CPU, where nothing is said."""
    import torch

    from openvclip.processes import local_rank

    if options.device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        return torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"--device {options.device} can't be used here: {first}") from error


def amp_of(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype of ``--amp``."""
    import torch

    return getattr(torch, options.amp) if options.amp else None


def templates_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The templates of ``--templates``, or the released ones."""
    from openvclip.models.classifier import VIDEO_TEMPLATES
    from openvclip.models.labels import read_labels

    return tuple(read_labels(options.templates)) if options.templates else VIDEO_TEMPLATES
