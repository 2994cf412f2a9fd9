r"""The accuracy of a fine-tuned or prompted CLIP on lists of videos, each with classes of its own.

    python -m examples.accuracy --preset vifi-base-to-novel --weights run/final.safetensors \
        --lists lists/base.csv lists/novel.csv --videos hmdb51 --harmonic-mean
    torchrun --nproc-per-node 8 -m examples.accuracy ...

For what ``openvclip evaluate`` does not: text towers and prompts that were trained, and ViFi-CLIP's
and Vita-CLIP's pooling. ``--preset`` is that of the training, and sets the views of the test.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import openvclip
from openvclip import prompting
from openvclip.checkpoints import atomic_path, load_checkpoint
from openvclip.errors import UsageError
from openvclip.evaluation import markdown_table
from openvclip.models.loading import LoadedModel, load_model
from openvclip.processes import Processes
from openvclip.training import options
from openvclip.training.methods import fixed_text, is_expanded, make_classifier
from openvclip.training.processes import training_processes
from openvclip.training.recipe import METHODS, PROMPTED
from openvclip.training.validation import TESTED, SharedAccuracy, sampling_of
from openvclip.video import VideoDataset

HARMONIC_MEAN = "harmonic mean"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    preset = options.add_preset_option(parser, arguments)
    model = parser.add_argument_group("model")
    options.add_model_options(model)
    model.add_argument("--method", choices=METHODS, default="openvclip", help="(%(default)s)")
    model.add_argument(
        "--weights", type=Path, metavar="FILE", help="fine-tuned weights, in place of the original"
    )
    model.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of bridge or vita")
    _add_test_options(parser)
    parser.set_defaults(**preset.testing)
    args = parser.parse_args(arguments)
    if args.method in PROMPTED and args.prompts is None:
        parser.error(f"--method {args.method} needs --prompts, the file that the training left")
    if args.harmonic_mean and len(args.lists) < 2:
        parser.error("--harmonic-mean is of several lists, such as base.csv novel.csv")
    return args


def _add_test_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos")
    group.add_argument(
        "--lists", type=Path, nargs="+", required=True, help="lines of path,class name"
    )
    group.add_argument(
        "--videos", type=Path, required=True, help="folder that the paths start from"
    )
    options.add_frame_options(group)
    group.add_argument("--sampler", choices=tuple(TESTED), default="dense", help="(%(default)s)")
    group.add_argument("--views", type=int, default=1, help="clips of a video (%(default)s)")
    group.add_argument(
        "--crops",
        type=int,
        choices=(1, 3),
        default=1,
        help="of each clip: the middle, or also the ends of the long side (%(default)s)",
    )
    group.add_argument(
        "--average",
        choices=("logits", "probabilities"),
        default="logits",
        help="what is averaged over the views (%(default)s)",
    )
    options.add_template_option(group)
    group = parser.add_argument_group("devices and output")
    options.add_reading_options(group)
    group.add_argument(
        "--harmonic-mean", action="store_true", help="of the lists, as from base to novel"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the accuracies, in [0, 1]")


def build_model(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    """The model that is tested, with its prompts."""
    loaded = load_model(args.model, args.pretrained, expand=False)
    if args.weights is not None:
        load_checkpoint(args.weights, loaded.model)
    if is_expanded(args.method):
        openvclip.expand_temporal_attention(loaded.model)
    if args.prompts is not None:
        prompting.load(loaded.model, args.prompts)
    loaded.model.to(device)
    return loaded


def accuracy(
    args: argparse.Namespace, loaded: LoadedModel, path: Path, processes: Processes
) -> dict[str, float]:
    """``top1`` and ``top5`` in [0, 1] on a list, among its own classes.

    Raises:
        UsageError: the list numbers its classes.
    """
    pixels = loaded.transform
    dataset = VideoDataset(
        path,
        args.videos,
        transform=pixels.with_(name="released", short_side=args.short_side, crops=args.crops),
        sampling=sampling_of(args, TESTED[args.sampler], args.views),
        details=True,
    )
    if dataset.class_names is None:
        raise UsageError(f"{path} numbers its classes; expected their names, as in path,name.")
    classifier = make_classifier(
        loaded.model, loaded.tokenizer, dataset.class_names, args.method, args.template
    )
    answers = nn.Sequential(classifier, nn.Softmax(dim=-1))
    shared = SharedAccuracy(
        dataset,
        processes,
        batch_size=args.per_device_batch,
        num_workers=args.num_workers,
        amp=options.amp_of(args, next(loaded.model.parameters()).device),
    )
    with fixed_text(classifier):
        shown = answers if args.average == "probabilities" else classifier
        return shared.of(shown, description=path.stem)


def as_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each list, in %."""
    rows = [
        [name, *(f"{100 * found[k]:.1f}" if k in found else "" for k in ("top1", "top5"))]
        for name, found in results.items()
    ]
    return markdown_table(["list", "top-1", "top-5"], rows)


def main(arguments: list[str] | None = None) -> None:
    """Test on each list and print the accuracies."""
    args = parse_arguments(arguments)
    with training_processes(args.device, args.timeout) as (processes, device):
        loaded = build_model(args, device)
        results = {path.stem: accuracy(args, loaded, path, processes) for path in args.lists}
        if args.harmonic_mean:
            top1 = [found["top1"] for found in results.values()]
            results[HARMONIC_MEAN] = {"top1": statistics.harmonic_mean(top1)}
        if not processes.is_first:
            return
        if args.json is not None:
            with atomic_path(args.json) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"Accuracy in %:\n\n{as_table(results)}")


if __name__ == "__main__":
    main()
