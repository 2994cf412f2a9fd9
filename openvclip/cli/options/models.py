"""Options of the subcommands that run a model on videos."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from openvclip.cli.options.outputs import add_override_option
from openvclip.cli.options.types import add_allow_options
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError, listed
from openvclip.models.text_weights import TextSource
from openvclip.towers.view import Boundary
from openvclip.video.sampling import BACKENDS

if TYPE_CHECKING:
    import torch

    from openvclip.models.loading import LoadedModel
    from openvclip.towers.view import Pooling
    from openvclip.video import Sampling


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    checkpoint: bool = True,
    labels: bool = True,
    about: str | None = None,
    default: str = "%(default)s, or the model that the checkpoint was trained from",
) -> None:
    """Add the options for the model, its weights, its templates and its device.

    Args:
        parser: the parser.
        checkpoint: whether to add ``--checkpoint`` and ``--expand``. Without them the model has the
            weights of the original CLIP and is not expanded.
        labels: whether to add the options for the texts of labels.
        about: what the help says about all of these options.
        default: what the help says about the default of ``--model``.
    """
    parser.set_defaults(contract=None)  # use_contract sets it
    group = parser.add_argument_group("model", about)
    group.add_argument(
        "--model",
        default="ViT-B-16-quickgelu",
        metavar="NAME|FILE|FOLDER",
        help="name of an open_clip model, a JSON file with an open_clip model configuration, the "
        "folder of a model, local-dir:... or hf-hub:...; or a CLIP of transformers: its folder, or "
        f"transformers:NAME for a name on the Hugging Face Hub (default: {default})",
    )
    group.add_argument(
        "--pretrained",
        metavar="TAG|FILE",
        help="weights of the original CLIP: a tag of open_clip, or a file (default: openai; "
        "hf-hub:..., local-dir:... and models of transformers have weights already)",
    )
    if checkpoint:
        _add_checkpoint_options(group)
    else:
        parser.set_defaults(checkpoint=None, expand=False, override=False)
    add_allow_options(group)
    group.add_argument(
        "--window",
        type=int,
        default=1,
        help="number of frames on either side that a frame attends to (default: %(default)s)",
    )
    group.add_argument(
        "--boundary",
        choices=get_args(Boundary),
        default="zero",
        help="treatment of frames outside the clip: zero uses zero vectors as their keys and "
        "values, mask gives them no attention weight, replicate repeats the first or the last "
        "frame (default: %(default)s, as in the released code)",
    )
    if labels:
        _add_label_options(group)
    else:
        parser.set_defaults(templates=None, text="own", no_cache=False)
    group.add_argument(
        "--device", help="device, such as cuda or cpu (default: cuda if available, else cpu)"
    )
    group.add_argument(
        "--amp",
        choices=("bfloat16", "float16"),
        help="dtype for autocast while encoding (default: no autocast)",
    )


def _add_label_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="file with one template on each line, with {} for the class name (default: the 28 "
        "templates of the released code)",
    )
    group.add_argument(
        "--text",
        choices=get_args(TextSource),
        default="own",
        help="weights that encode the class names: own are the weights that are evaluated, "
        "original are those of the original CLIP. If fine-tuning left the text tower as it was, "
        "both are equal (default: %(default)s)",
    )
    group.add_argument(
        "--no-cache",
        action="store_true",
        help="encode the texts again (default: text features are kept in the user's folder for "
        "caches, or in the folder that OPENVCLIP_CACHE names)",
    )


def _add_checkpoint_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="fine-tuned weights, or a folder of peft with a LoRA fine-tune of the original CLIP "
        "(default: none, the model is the original CLIP)",
    )
    group.add_argument(
        "--expand",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether frames attend to neighbouring frames; with --no-expand CLIP is applied frame "
        "by frame (default: --expand with --checkpoint, --no-expand without)",
    )
    add_override_option(
        group,
        "use an option that contradicts the contract of the model: the settings that the model "
        "was trained with",
    )


def add_lam_option(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add ``--lam``.

    Args:
        parser: the parser.
        several: whether the option takes several values.
    """
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+" if several else None,
        default=[] if several else None,
        help=f"interpolation weight{'s' if several else ''} of the original CLIP; 0 is the "
        "checkpoint itself (default: 0)",
    )


def require_effects(options: argparse.Namespace) -> None:
    """Check that the options for the model and the frames that are given have an effect.

    Raises:
        UsageError: an option has no effect with the other options.
    """
    from openvclip.training.shared_options import unused_frame_options, unused_weight_options

    is_tuned = options.checkpoint is not None or options.contract is not None
    if options.lam not in (None, []) and not is_tuned:
        raise UsageError(
            "--lam interpolates the original CLIP with fine-tuned weights: give --checkpoint too."
        )
    whole = "on a model with a contract, whose weights are whole" if options.contract else ""
    refuse_unused(
        options.given,
        {
            **unused_model_options(has_checkpoint=is_tuned, is_expanded=_is_expanded(options)),
            **({"allow_missing": whole, "allow_unexpected": whole} if whole else {}),
            **({} if options.contract else unused_weight_options(options)),
            **unused_frame_options(options),
        },
    )


def unused_model_options(*, has_checkpoint: bool, is_expanded: bool) -> dict[str, str]:
    """Return why options of the checkpoint and its model have no effect; see ``refuse_unused``."""
    without_file = "" if has_checkpoint else "without --checkpoint, the file that it is for"
    frame_by_frame = "" if is_expanded else "on CLIP frame by frame; give --expand to use it"
    return {
        "text": without_file,
        "allow_missing": without_file,
        "allow_unexpected": without_file,
        "window": frame_by_frame,
        "boundary": frame_by_frame,
    }


def _is_expanded(options: argparse.Namespace) -> bool:
    if options.expand is None:
        return options.checkpoint is not None
    return bool(options.expand)


def add_frame_options(parser: argparse.ArgumentParser, *, views: bool = True) -> None:
    """Add the options for the frames of a video.

    Args:
        parser: the parser.
        views: whether to add the options that choose the views of a video.
    """
    group = parser.add_argument_group("frames")
    group.add_argument(
        "--frames", type=int, default=8, help="frames in a clip (default: %(default)s)"
    )
    group.add_argument(
        "--sampling-rate",
        type=int,
        default=16,
        metavar="N",
        help="take every N-th frame of a video with 30 frames per second (default: %(default)s)",
    )
    group.add_argument(
        "--transform",
        choices=("released", "clip"),
        default="released",
        help="how frames are resized and cropped: as in the released code of Open-VCLIP, or as in "
        "CLIP (default: %(default)s)",
    )
    if views:
        _add_view_options(group)
    else:
        parser.set_defaults(views=3, sampler="released", backend="pyav")


def _add_view_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--views", type=int, default=3, help="clips from each video (default: %(default)s)"
    )
    group.add_argument(
        "--sampler",
        choices=("released", "uniform"),
        default="released",
        help="how the frames of a clip are chosen: as in the released code of Open-VCLIP, or "
        "evenly from the whole video (default: %(default)s)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="pyav",
        help="library that decodes (default: %(default)s)",
    )


def sampling_of(options: argparse.Namespace) -> Sampling:
    """Return the sampling that the options and the contract describe."""
    from openvclip.models import usage
    from openvclip.video import Sampling

    if options.contract is not None:
        return usage.sampling_of(options.contract, options.backend)
    return Sampling(
        num_frames=options.frames,
        sampling_rate=options.sampling_rate,
        views=options.views,
        sampler=options.sampler,
        backend=options.backend,
    )


def pooling_of(options: argparse.Namespace) -> Pooling:
    """Return the pooling of the contract. Default: the pooling of Open-VCLIP."""
    from openvclip.models import usage

    return "unit_frames" if options.contract is None else usage.pooling_of(options.contract)


def load(options: argparse.Namespace) -> LoadedModel:
    """Load the model that the options describe, with the weights of the original CLIP.

    If the model has a contract, see :func:`load_with_contract`.
    """
    from openvclip.cli.options.contract import load_with_contract
    from openvclip.models.loading import load_model

    if options.contract is not None:
        return load_with_contract(options, options.contract, device_of(options))
    return load_model(
        options.model,
        pretrained_of(options),
        checkpoint=options.checkpoint,
        expand=options.expand,
        window=options.window,
        boundary=options.boundary,
        transform=options.transform,
        device=device_of(options),
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )


def pretrained_of(options: argparse.Namespace) -> str | None:
    """Return the weights of the original CLIP: ``--pretrained``, or the default for the model.

    Raises:
        UsageError: ``--pretrained`` is not given, and there is no default for the model.
    """
    from openvclip.models.loading import brings_weights

    model: str = options.model
    if options.pretrained is not None or brings_weights(model):
        pretrained: str | None = options.pretrained
        return pretrained
    is_missing = options.checkpoint is not None and not options.checkpoint.exists()
    if Path(model).suffix == ".json" and Path(model).is_file() and not is_missing:
        text = (
            f"--model {model} is a configuration without weights: give --pretrained FILE, the "
            "weights of the original CLIP."
        )
        if options.checkpoint is not None:
            text += (
                f" --checkpoint {options.checkpoint} holds the fine-tuned weights only. If you "
                f"have no other file, give --pretrained {options.checkpoint} --expand in place of "
                "--checkpoint."
            )
        raise UsageError(text)
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if tags and "openai" not in tags:
        raise UsageError(
            f"--model {model} has no weights openai, which are the default of --pretrained. Give "
            f"--pretrained with a file of weights, or with a tag of open_clip: {listed(tags, 10)}."
        )
    return "openai"


def cache_of(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Return a context manager that caches text features, unless ``--no-cache`` is given."""
    from openvclip.models.text_cache import cache_folder, text_cache

    return text_cache(None if options.no_cache else cache_folder())


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device of ``--device``. Default: the GPU of this process, or the CPU.

    Raises:
        UsageError: the device can't be used.
    """
    import torch

    from openvclip.processes import local_rank

    if options.device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    try:
        return torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {options.device} can't be used here: {reason}") from error


def amp_of(options: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype of ``--amp``."""
    import torch

    return getattr(torch, options.amp) if options.amp else None


def templates_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the templates of ``--templates``. Default: the templates of the released code."""
    from openvclip.models.classifier import VIDEO_TEMPLATES
    from openvclip.models.labels import read_labels

    if isinstance(options.templates, tuple):  # of the contract of the model
        return options.templates
    return tuple(read_labels(options.templates)) if options.templates else VIDEO_TEMPLATES
