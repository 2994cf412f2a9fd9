r"""Compute the accuracy of a fine-tuned or prompted CLIP on lists of videos.

    python accuracy.py --preset vifi-base-to-novel --checkpoint run/final.safetensors \
        --annotations lists/base.csv lists/novel.csv --videos hmdb51 --harmonic-mean
    torchrun --nproc-per-node 8 accuracy.py ...

Each list has its own classes. Use this script for what ``openvclip evaluate`` does not know: the
texts, the pooling and the prompts of ViFi-CLIP and Vita-CLIP. Give the --preset of the training: it
sets the method, the frames and the views of the test. A checkpoint with a contract says them
itself, and a flag that contradicts the contract is an error. With --prompts the contract of the
checkpoint is not used: prompts are trained and tested in another way. The script prints a table
with top-1 and top-5 accuracy in % for each list.
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
from openvclip.cli.options.contract import use_contract
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.errors import UsageError
from openvclip.evaluation import markdown_table
from openvclip.models.loading import LoadedModel, brings_weights, load_model
from openvclip.models.usage import expand_as
from openvclip.processes import Processes
from openvclip.training import shared_options as options
from openvclip.training.methods import fixed_text, is_expanded, make_classifier
from openvclip.training.processes import training_processes
from openvclip.training.recipe import METHODS, PROMPT_METHODS
from openvclip.training.validation import TEST_SAMPLERS, SharedAccuracy
from openvclip.video import VideoDataset

HARMONIC_MEAN = "harmonic mean"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=options.HelpFormatter, allow_abbrev=False)
    preset = options.add_preset_option(parser, arguments)
    model = parser.add_argument_group("model")
    options.add_model_options(model)
    model.add_argument(
        "--method", choices=METHODS, default="openvclip", help="the method of the training"
    )
    model.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="fine-tuned weights (default: the weights of the original CLIP)",
    )
    model.add_argument(
        "--override", action="store_true", help="use flags that contradict the file's contract"
    )
    model.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of bridge or vita")
    _add_test_options(parser)
    parser.set_defaults(**preset.testing)
    args = parser.parse_args(arguments)
    if args.method in PROMPT_METHODS and args.prompts is None:
        parser.error(f"--method {args.method} needs --prompts, the file that finetune.py wrote")
    if args.harmonic_mean and len(args.annotations) < 2:
        parser.error("--harmonic-mean needs several lists, such as base.csv novel.csv")
    names = [path.stem for path in args.annotations]
    if len(set(names)) < len(names):  # the table and the file have one row for each name
        parser.error(f"--annotations: expected lists with different names, got {' '.join(names)}")
    one_view = "on one view" if args.views == args.crops == 1 else ""
    unused = {**options.unused_weight_options(args), **options.unused_frame_options(args)}
    problem = unused_option(args.given, {"average": one_view, **unused})
    if problem:
        parser.error(problem)
    return args


def _add_test_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos")
    group.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        metavar="FILE",
        required=True,
        help="lists with lines of path and class name",
    )
    group.add_argument(
        "--videos", type=Path, metavar="FOLDER", required=True, help="folder of the videos"
    )
    options.add_frame_options(group)
    group.add_argument(
        "--sampler",
        choices=tuple(TEST_SAMPLERS.values()),
        default="released",
        help="released: frames at --sampling-rate; uniform: the centres of --frames equal segments",
    )
    group.add_argument("--views", type=int, default=1, help="clips taken from a video")
    group.add_argument(
        "--crops",
        type=int,
        choices=(1, 3),
        default=1,
        help="crops of each clip: 1: the centre; 3: also the two ends of the long side",
    )
    group.add_argument(
        "--average",
        choices=("logits", "probabilities"),
        default="logits",
        help="the values that are averaged over the views",
    )
    options.add_template_option(group)
    group = parser.add_argument_group("devices and output")
    options.add_device_options(group)
    group.add_argument("--batch-size", type=options.positive, default=8, help="videos at a time")
    group.add_argument(
        "--harmonic-mean", action="store_true", help="also print the harmonic mean over the lists"
    )
    group.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write the accuracies in [0, 1] as JSON"
    )


def build_model(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    """Return the model to test, with its prompts."""
    weights = None if brings_weights(args.model) else args.pretrained
    loaded = load_model(args.model, weights, expand=False)
    if args.checkpoint is not None:
        load_checkpoint(args.checkpoint, loaded.model)
    if args.contract is not None:
        expand_as(loaded.model, args.contract)
    elif is_expanded(args.method):
        openvclip.expand_temporal_attention(loaded.model)
    if args.prompts is not None:
        prompting.load(loaded.model, args.prompts)
    loaded.model.to(device)
    return loaded


def accuracy(
    args: argparse.Namespace, loaded: LoadedModel, path: Path, processes: Processes
) -> dict[str, float]:
    """Return ``top1`` and ``top5`` in [0, 1] on a list, among the classes of the list.

    Raises:
        UsageError: the list has class indices in place of class names.
    """
    dataset = VideoDataset(
        path,
        args.videos,
        transform=loaded.transform.with_(
            name="released", short_side=args.short_side, crops=args.crops
        ),
        sampling=options.sampling_of(args, args.sampler, args.views),
        details=True,
    )
    if dataset.class_names is None:
        raise UsageError(f"{path} has class indices; expected lines of path and class name.")
    classifier = make_classifier(
        loaded.model, loaded.tokenizer, dataset.class_names, args.method, args.template
    )
    shared = SharedAccuracy(
        dataset,
        processes,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        amp=options.amp_of(args, next(loaded.model.parameters()).device),
    )
    # The views of a video are averaged after the last layer: over logits or over probabilities.
    probabilities = nn.Sequential(classifier, nn.Softmax(dim=-1))
    with fixed_text(classifier):
        model = probabilities if args.average == "probabilities" else classifier
        return shared.of(model, description=path.stem)


def as_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table with a row for each list, in %."""
    rows = [
        [name, *(f"{100 * top[k]:.1f}" if k in top else "" for k in ("top1", "top5"))]
        for name, top in results.items()
    ]
    return markdown_table(["list", "top-1", "top-5"], rows)


@command
def main(arguments: list[str] | None = None) -> None:
    """Test on each list, and print the accuracies."""
    args = parse_arguments(arguments)
    args.contract = None
    if args.prompts is None:  # prompts belong to a frozen model, which was trained in another way
        use_contract(args, ignored=["pretrained"])
    with training_processes(args.device, args.timeout) as (processes, device):
        loaded = build_model(args, device)
        results = {path.stem: accuracy(args, loaded, path, processes) for path in args.annotations}
        if args.harmonic_mean:
            top1 = [top["top1"] for top in results.values()]
            results[HARMONIC_MEAN] = {"top1": statistics.harmonic_mean(top1)}
        if not processes.is_first:
            return
        if args.output is not None:
            with atomic_path(args.output) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"Accuracy in %:\n\n{as_table(results)}")


if __name__ == "__main__":
    main()
