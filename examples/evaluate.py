r"""Evaluate a checkpoint on the protocols of the paper, and compare it with the paper.

    python evaluate.py --checkpoint run/averaged.safetensors --lam 0.5 \
        --ucf101 ucfTrainTestlist UCF-101 --hmdb51 testTrainMulti_7030_splits hmdb51 \
        --kinetics600 k600/val.csv k600/val --kinetics400 k400/val.csv k400/val --out tables/
    torchrun --nproc-per-node 8 evaluate.py ...

Each data set is given by its official lists and the folder of its videos. Each video is encoded
once for all protocols, and the same command resumes after a stop. --checkpoint takes any file of
finetune.py, and the released checkpoints. --lam is the weight of the original CLIP; use 0 for
final.safetensors, which is interpolated already. Without --checkpoint the original CLIP is
evaluated frame by frame. ``openvclip evaluate`` has more options; this script shows how to use
the library.

A checkpoint of finetune.py has a contract: the model is then evaluated with the attention, the
frames, the pixels and the templates of its training. A flag that contradicts the contract is an
error. A checkpoint without a contract is evaluated with the settings of the paper. With --model
the folder of a model can be given, in place of --checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from openvclip.checkpoints import atomic_path, write_errors
from openvclip.cli.options.contract import load_with_contract, use_contract
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.errors import OpenVCLIPError, UsageError
from openvclip.evaluation import (
    Mixture,
    ProtocolEvaluation,
    RunOptions,
    as_json,
    evaluate_protocol,
    markdown_table,
    mean_and_std,
)
from openvclip.models.classifier import VIDEO_TEMPLATES
from openvclip.models.loading import LoadedModel, brings_weights, load_model
from openvclip.models.text_weights import TextSource
from openvclip.models.usage import pooling_of, sampling_of
from openvclip.processes import Processes, joined_processes, local_rank
from openvclip.training.shared_options import (
    HelpFormatter,
    add_model_options,
    unused_weight_options,
)
from openvclip.video import class_names, protocols, read_annotations
from openvclip.video.protocols import Split
from openvclip.video.sampling import PAPER_SAMPLING

DATA_SETS = ("ucf101", "hmdb51", "kinetics600", "kinetics400")

ENCODERS = {
    "ViT-B-32-quickgelu": "ViT-B/32",
    "ViT-B-16-quickgelu": "ViT-B/16",
    "ViT-L-14-quickgelu": "ViT-L/14",
}
"""The name in the paper of each open_clip model with OpenAI's weights."""

COLUMNS = (
    *("ucf101-ep1", "ucf101-ep2", "ucf101-ep3"),
    *("hmdb51-ep1", "hmdb51-ep2", "hmdb51-ep3"),
    *("kinetics600", "kinetics600 top-5", "kinetics400"),
)

# Top-1 accuracy in % unless the column says top-5. Tables 1 to 3 of the paper have Open-VCLIP on
# all protocols. Table 4 adds CLIP frame by frame and plain fine-tuning, Table 5 the L2 penalty and
# Kinetics-400.
_ROWS = """
CLIP       ViT-B/32 -        69.1 -        -        45.4 -        64.8     -        -
CLIP       ViT-B/16 -        74.2 -        -        47.6 -        68.1     -        -
CLIP       ViT-L/14 -        80.5 -        -        55.0 -        76.2     -        -
FINE-TUNE  ViT-B/32 -        78.0 -        -        47.3 -        62.8     -        -
FINE-TUNE  ViT-B/16 -        79.7 -        -        49.2 -        65.9     -        -
FINE-TUNE  ViT-L/14 -        85.0 -        -        51.9 -        74.9     -        -
L2         ViT-B/16 -        82.3 -        -        51.2 -        72.0±0.7 -        76.7
Open-VCLIP ViT-B/32 87.1±2.4 79.5 79.4±1.1 62.3±4.0 49.9 50.6±0.3 69.5±0.6 91.7±0.1 -
Open-VCLIP ViT-B/16 89.9±1.7 83.5 83.4±1.2 64.5±4.5 53.2 53.9±1.2 73.0±0.8 93.2±0.1 78.9
Open-VCLIP ViT-L/14 93.1±1.9 87.9 87.6±1.2 68.5±4.0 58.3 59.0±0.6 81.1±0.8 96.3±0.3 -
"""

PUBLISHED: dict[tuple[str, str], dict[str, str]] = {
    (method, encoder): dict(zip(COLUMNS, values, strict=True))
    for method, encoder, *values in map(str.split, _ROWS.strip().splitlines())
}
"""The paper's accuracies by method and encoder, then by column; ``"-"``: not in the paper."""

METHODS = tuple(dict.fromkeys(method for method, _ in PUBLISHED))


def published(method: str, model: str, column: str) -> str:
    """Return the paper's accuracy for an open_clip model; ``"-"`` if it is not in the paper.

    Args:
        method: one of :data:`METHODS`.
        model: name of the model, such as ``"ViT-B-16-quickgelu"``.
        column: one of :data:`COLUMNS`.
    """
    return PUBLISHED.get((method, ENCODERS.get(model, "")), {}).get(column, "-")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add_model_options(parser.add_argument_group("model"))
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="fine-tuned weights, in any supported format",
    )
    parser.add_argument(
        "--override", action="store_true", help="use flags that contradict the file's contract"
    )
    parser.add_argument("--lam", type=float, help="weight of the original CLIP (default: 0)")
    help_text = "weights that encode the class names: those that are evaluated, or the original's"
    parser.add_argument("--text", choices=get_args(TextSource), default="own", help=help_text)
    for name in DATA_SETS:
        help_text = "official lists and folder of videos (Kinetics: the validation set)"
        parser.add_argument(f"--{name}", nargs=2, metavar=("LISTS", "VIDEOS"), help=help_text)
    parser.add_argument(
        "--published",
        choices=METHODS,
        help="the row of the paper to print (default: Open-VCLIP with --checkpoint, else CLIP)",
    )
    parser.add_argument(
        "--allow-missing-videos",
        action="store_true",
        help="start although videos are missing; missing videos count as broken",
    )
    parser.add_argument(
        "--leave-out-broken",
        action="store_true",
        help="do not count videos that can't be read; otherwise they count as wrong",
    )
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="dtype of autocast")
    parser.add_argument("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at a time")
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read videos")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="folder of the results"
    )
    args = parser.parse_args(arguments)
    if not any(getattr(args, name) for name in DATA_SETS):
        parser.error(f"give a data set: {', '.join(f'--{name}' for name in DATA_SETS)}")
    fine_tuned = args.checkpoint is not None or Path(args.model).is_dir()
    if args.lam is not None and (not 0 <= args.lam <= 1 or (args.lam and not fine_tuned)):
        parser.error(f"--lam {args.lam:g}: expected a weight in [0, 1], with --checkpoint")
    alone = "" if fine_tuned else "without --checkpoint: there are no other weights"
    problem = unused_option(args.given, {"text": alone, **unused_weight_options(args)})
    if problem:
        parser.error(problem)
    return args


def read_splits(data_set: str, lists: str, videos: str) -> list[Split]:
    """Return the splits of all protocols of a data set; for Kinetics-400 the closed-set split."""
    if data_set == "kinetics400":
        names = class_names(data_set)
        samples = read_annotations(lists, names, root=videos).samples
        return [Split(data_set, names, samples, protocol=data_set)]
    matching = [name for name in protocols.PROTOCOLS if name.partition("-")[0] == data_set]
    return [
        split
        for name in matching
        for split in protocols.load(name, annotations=lists, videos=videos)
    ]


def table(results: Sequence[ProtocolEvaluation], method: str, model: str) -> str:
    """Return a Markdown table: for each protocol the measured accuracy, then the paper's."""
    rows = []
    for result in results:
        for protocol in result.protocols:
            for k in (1, 5) if protocol == "kinetics600" else (1,):
                column = protocol if k == 1 else f"{protocol} top-{k}"
                here = mean_and_std(result.top(k, protocol=protocol))
                videos = sum(split.evaluation.n_clips for split in result.of(protocol=protocol))
                rows.append([column, f"{videos}", here, published(method, model, column)])
    return markdown_table(["protocol", "videos", "here", f"paper, {method}"], rows)


def load(args: argparse.Namespace, device: str) -> LoadedModel:
    """Return the original CLIP and the fine-tuned weights; with a contract, as it says.

    Raises:
        UsageError: a flag contradicts the contract; or there is no contract and no checkpoint, and
            a flag is for fine-tuned weights.
    """
    use_contract(args)
    if args.contract is not None:
        return load_with_contract(args, args.contract, torch.device(device))
    if args.checkpoint is None and (args.lam or args.text != "own"):
        raise UsageError(
            f"{args.model} has no contract, so it is an original CLIP. --lam and --text are for "
            "fine-tuned weights: give --checkpoint too."
        )
    weights = None if brings_weights(args.model) else args.pretrained
    return load_model(args.model, weights, checkpoint=args.checkpoint, device=device)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate on each data set, and print the table."""
    args = parse_arguments(arguments)
    try:
        with joined_processes() as processes:
            _evaluate(args, processes)
    except OpenVCLIPError as error:
        raise SystemExit(f"evaluate.py: error: {error}") from error


def _evaluate(args: argparse.Namespace, processes: Processes) -> None:
    device = args.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    data_sets = {name: pair for name in DATA_SETS if (pair := getattr(args, name))}
    splits = {name: read_splits(name, *pair) for name, pair in data_sets.items()}
    clip = load(args, device)
    contract = args.contract
    tuned = contract is not None or args.checkpoint is not None
    results = {
        name: evaluate_protocol(
            clip.model,
            clip.tokenizer,
            splits[name],
            videos,
            mixture=Mixture(clip.tuned, [args.lam or 0.0] if clip.tuned else (), args.text),
            sampling=PAPER_SAMPLING if contract is None else sampling_of(contract),
            transform=clip.transform,
            templates=VIDEO_TEMPLATES if contract is None else contract.templates,
            out=args.out / name,
            run=RunOptions(
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                amp=getattr(torch, args.amp) if args.amp else None,
                pooling="unit_frames" if contract is None else pooling_of(contract),
                description=name,
                leave_out_broken=args.leave_out_broken,
                allow_missing=args.allow_missing_videos,
            ),
        )
        for name, (_, videos) in data_sets.items()
    }
    if processes.is_first:
        method = args.published or ("Open-VCLIP" if tuned else "CLIP")
        text = table(list(results.values()), method, clip.name)
        numbers = json.dumps({name: as_json(result) for name, result in results.items()}, indent=1)
        for path, content in ((args.out / "table.md", text), (args.out / "results.json", numbers)):
            with write_errors(path), atomic_path(path) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
        print(f"\nTop-1 accuracy in %, mean ± standard deviation over splits:\n\n{text}")


if __name__ == "__main__":
    main()
