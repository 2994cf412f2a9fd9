r"""The rows of the paper's tables for a checkpoint, with the paper's figures beside them.

    python examples/evaluate.py --checkpoint run/averaged.safetensors --lam 0.5 \
        --ucf101 ucfTrainTestlist UCF-101 --hmdb51 testTrainMulti_7030_splits hmdb51 \
        --kinetics600 k600/val.csv k600/val --kinetics400 k400/val.csv k400/val --out tables/
    torchrun --nproc-per-node 8 examples/evaluate.py ...

Each data set is given by its official lists and the folder of its videos. Its videos are encoded
once for all protocols; the same command goes on where it was stopped. Any checkpoint of
``examples/finetune.py`` and the released ones will do: lambda, the weight of the original CLIP, is
0 for one that is interpolated already (``final.safetensors``). Without one, CLIP is applied frame
by frame. ``openvclip evaluate`` has more options; here is how the parts go together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if __package__ in (None, ""):  # started by its path: let it find the files beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.published import METHODS, published
from openvclip.checkpoints import atomic_path, write_errors
from openvclip.errors import OpenVCLIPError
from openvclip.evaluation import (
    Mixture,
    ProtocolEvaluation,
    RunOptions,
    as_json,
    evaluate_protocol,
    markdown_table,
    mean_and_std,
)
from openvclip.models.loading import load_model
from openvclip.processes import Processes, joined_processes, local_rank
from openvclip.video import class_names, protocols, read_annotations
from openvclip.video.protocols import Split

DATA_SETS = ("ucf101", "hmdb51", "kinetics600", "kinetics400")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="of open_clip (%(default)s)")
    parser.add_argument(
        "--pretrained", default="openai", help="the original weights: a tag, or a file"
    )
    parser.add_argument("--checkpoint", type=Path, help="fine-tuned weights, of any known family")
    parser.add_argument("--lam", type=float, default=0.0, help="weight of the original CLIP (0)")
    for name in DATA_SETS:
        help_text = "official lists and videos; the validation set for Kinetics"
        parser.add_argument(f"--{name}", nargs=2, metavar=("LISTS", "VIDEOS"), help=help_text)
    parser.add_argument("--published", choices=METHODS, help="which of the paper's rows to show")
    parser.add_argument(
        "--leave-out-missing",
        action="store_true",
        help="do not count videos that are missing or can't be read; otherwise missing ones are an "
        "error, and broken ones wrong",
    )
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="encode under autocast")
    parser.add_argument("--device", help="default: cuda where there is one, or cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at a time (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=4, help="that decode (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    args = parser.parse_args(arguments)
    if not any(getattr(args, name) for name in DATA_SETS):
        parser.error(f"give a data set: {', '.join(f'--{name}' for name in DATA_SETS)}")
    if not 0 <= args.lam <= 1 or (args.lam and args.checkpoint is None):
        parser.error(f"--lam {args.lam:g}: expected a weight in [0, 1], with --checkpoint")
    args.published = args.published or ("Open-VCLIP" if args.checkpoint else "CLIP")
    return args


def read_splits(data_set: str, lists: str, videos: str) -> list[Split]:
    """All protocols of a data set; the closed set for Kinetics-400."""
    if data_set == "kinetics400":
        names = class_names(data_set)
        samples = read_annotations(lists, names, root=videos).samples
        return [Split(data_set, names, samples, protocol=data_set)]
    own = [name for name in protocols.PROTOCOLS if name.partition("-")[0] == data_set]
    return [
        split for name in own for split in protocols.load(name, annotations=lists, videos=videos)
    ]


def table(results: Sequence[ProtocolEvaluation], method: str, model: str) -> str:
    """A row for each figure that the paper has, or could have: ours, then the paper's."""
    rows = []
    for result in results:
        for protocol in result.protocols:
            for k in (1, 5) if protocol == "kinetics600" else (1,):
                column = protocol if k == 1 else f"{protocol} top-{k}"
                here = mean_and_std(result.top(k, protocol=protocol))
                videos = sum(split.evaluation.n_clips for split in result.of(protocol=protocol))
                rows.append([column, f"{videos}", here, published(method, model, column)])
    return markdown_table(["protocol", "videos", "here", f"paper, {method}"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate on each data set, then print the table."""
    args = parse_arguments(arguments)
    try:
        with joined_processes() as processes:
            _evaluate(args, processes)
    except OpenVCLIPError as error:
        raise SystemExit(f"evaluate.py: error: {error}") from error


def _evaluate(args: argparse.Namespace, processes: Processes) -> None:
    device = args.device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    given = {name: pair for name in DATA_SETS if (pair := getattr(args, name))}
    splits = {name: read_splits(name, *pair) for name, pair in given.items()}
    clip = load_model(args.model, args.pretrained, checkpoint=args.checkpoint, device=device)
    results = {
        name: evaluate_protocol(
            clip.model,
            clip.tokenizer,
            splits[name],
            videos,
            mixture=Mixture(clip.tuned, [args.lam] if clip.tuned is not None else ()),
            transform=clip.transform,
            out=args.out / name,
            run=RunOptions(
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                amp=getattr(torch, args.amp) if args.amp else None,
                description=name,
                leave_out_broken=args.leave_out_missing,
                allow_missing=args.leave_out_missing,
            ),
        )
        for name, (_, videos) in given.items()
    }
    if processes.is_first:
        text = table(list(results.values()), args.published, clip.name)
        found = json.dumps({name: as_json(result) for name, result in results.items()}, indent=1)
        for path, content in ((args.out / "table.md", text), (args.out / "results.json", found)):
            with write_errors(path), atomic_path(path) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
        print(f"\nTop-1 accuracy in %, mean ± standard deviation over splits:\n\n{text}")


if __name__ == "__main__":
    main()
