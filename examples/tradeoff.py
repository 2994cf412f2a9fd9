r"""Plot zero-shot against closed-set accuracy along lambda (Figures 2 and 3), for any weights.

    python tradeoff.py --model ViT-B-16-quickgelu --pretrained openai \
        --curve "VCLIP=plain/finetuned.safetensors" --curve "Open-VCLIP=run/averaged.safetensors" \
        --closed-set annotations=k400/val.csv videos=k400/val \
        --zero-shot protocol=ucf101-ep2 annotations=ucfTrainTestlist videos=UCF-101 \
        --mark "Open-VCLIP=0.5" --out figure2/

A data set is given by the options of ``openvclip evaluate``: ``annotations=FILE`` means
``--annotations FILE``, and a word without ``=`` is a flag. There are two more options: ``split=N``
takes one split of a protocol, and ``label=TEXT`` names the data set in tables and figures.

If training wrote how a model is used (a contract), its curve uses the model in this way: with its
attention, frames, pixels, templates and pooling. A flag that contradicts a contract is an error,
unless ``--override`` is given. The other curves and the baseline use the flags or their defaults.

lambda weighs the original CLIP. Each video is decoded once for all lambdas of a curve. The same
command resumes after a stop, also with more curves or data sets. A folder with results of other
settings raises an error. The output folder holds ``results.json``, ``table.md`` and a figure for
each zero-shot set. On several GPUs: ``torchrun --nproc-per-node 8 tradeoff.py ...``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from openvclip import expand_temporal_attention, restore_spatial_attention
from openvclip.checkpoints import Contract, atomic_path, write_errors
from openvclip.cli.options import models
from openvclip.cli.options.contract import options_for_files, require_base
from openvclip.cli.options.named_data import chosen_splits, data_set_of
from openvclip.cli.options.outputs import add_override_option
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.errors import OpenVCLIPError, RecordsError, UsageError
from openvclip.evaluation import (
    FIGURE_LAMBDAS,
    Curve,
    Mixture,
    ProtocolEvaluation,
    RunOptions,
    as_json,
    evaluate_protocol,
    markdown_table,
    mean_and_std,
    tradeoff_figure,
)
from openvclip.models.drawing import require_matplotlib
from openvclip.models.loading import LoadedModel, fine_tuned, name_of_transformers
from openvclip.models.usage import expand_as, transform_of
from openvclip.processes import Processes, joined_processes
from openvclip.training.shared_options import (
    HelpFormatter,
    unused_frame_options,
    unused_weight_options,
)
from openvclip.video.protocols import Split

BASELINE = "CLIP, frame by frame"
Results = dict[str, dict[str, ProtocolEvaluation]]  # by curve, then by data set, closed set first
Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class Line:
    """A curve to compute.

    Attributes:
        label: name of the curve in the legend.
        path: the fine-tuned weights; ``None`` for the original CLIP, which is a single point.
        temporal: whether frames attend to neighbouring frames.
        star: lambda of the reported point.
    """

    label: str
    path: Path | None
    temporal: bool
    star: float | None = None


# --- command line ------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Returns:
        The arguments with ``lines`` (a :class:`Line` for each curve), and with the options of each
        data set in ``closed_set`` and ``zero_shot``.
    """
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("curves and data sets").add_argument
    curve: Any = {"metavar": "LABEL=FILE", "action": "append", "default": []}
    text = "fine-tuned weights with temporal attention, in any supported format; repeatable"
    add("--curve", **curve, help=text)
    text = "fine-tuned weights without temporal attention; repeatable"
    add("--frame-curve", **curve, help=text)
    add("--baseline", action="store_true", help="mark the original CLIP, applied frame by frame")
    words: Any = {"metavar": "NAME=VALUE", "nargs": "+", "required": True}
    text = "videos of the training classes"
    add("--closed-set", **words, help=text)
    text = "videos of other classes; repeatable, each set gives a figure"
    add("--zero-shot", **words, action="append", help=text)
    text = "values of lambda, the weight of CLIP (default: those of the paper's figures)"
    add("--lam", type=float, nargs="+", default=list(FIGURE_LAMBDAS), help=text)
    text = "draw this curve thick, with a star at the reported lambda; repeatable"
    add("--mark", metavar="LABEL=LAM", action="append", default=[], help=text)
    models.add_model_options(parser, checkpoint=False)
    add_override_option(parser, "use options that contradict the contract of a curve")
    text = "name or folder of a CLIP of transformers, in place of --model"
    parser.add_argument("--hf", metavar="NAME|FOLDER", help=text)
    models.add_frame_options(parser)
    add = parser.add_argument_group("run and results").add_argument
    add("--batch-size", type=int, default=8, help="videos at a time")
    add("--num-workers", type=int, default=4, help="processes that read videos")
    add("--out", type=Path, metavar="FOLDER", required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    for lam in args.lam:
        if not 0 <= lam <= 1:
            parser.error(f"--lam {lam:g}: expected weights of the original CLIP in [0, 1]")
    args.lines = _lines(args, parser.error)
    args.closed_set = data_set_of(args.closed_set, f"{parser.prog} --closed-set")
    args.zero_shot = [data_set_of(words, f"{parser.prog} --zero-shot") for words in args.zero_shot]
    problem = unused_option(args.given, _unused(args))
    if problem:
        parser.error(problem)
    for group in (args.lines, [args.closed_set, *args.zero_shot]):
        _require_distinct([entry.label for entry in group], parser.error)
    return args


def _unused(args: argparse.Namespace) -> dict[str, str]:
    """Return why options have no effect."""
    in_place = "with --hf, which replaces it" if args.hf else ""
    unused = models.unused_model_options(has_checkpoint=True, is_expanded=bool(args.curve))
    unused |= {**unused_weight_options(args), **unused_frame_options(args)}
    unused |= {"model": in_place}
    return {**unused, "pretrained": in_place or unused["pretrained"]}


def _lines(args: argparse.Namespace, fail: Fail) -> list[Line]:
    """The curves in the order in which they are drawn."""
    stars = dict(_pair(text, "--mark", "LABEL=LAM", fail) for text in args.mark)
    lines = [Line(BASELINE, None, temporal=False)] if args.baseline else []
    for flag, texts in (("--frame-curve", args.frame_curve), ("--curve", args.curve)):
        for text in texts:
            label, path = _pair(text, flag, "LABEL=FILE", fail)
            star = next((lam for lam in args.lam if f"{lam:g}" == stars.get(label)), None)
            lines.append(Line(label, Path(path), flag == "--curve", star))
    if not args.curve and not args.frame_curve:
        fail("give --curve LABEL=FILE, a checkpoint to interpolate with the original CLIP")
    starred = {line.label for line in lines if line.star is not None}
    for label, lam in stars.items():
        if label not in starred:
            fail(f"--mark {label}={lam}: expected the label of a curve and one of --lam")
    return lines


def _pair(text: str, flag: str, expected: str, fail: Fail) -> tuple[str, str]:
    label, _, value = text.partition("=")
    if not label or not value:
        fail(f"{flag} {text}: expected {expected}")
    return label, value


def _require_distinct(labels: list[str], fail: Fail) -> None:
    """Fail if two labels give the same name of a file or a folder."""
    names = [file_name(label) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if names.count(name) > 1:
            fail(f"{label!r} labels two curves or data sets; give each its own label")


def file_name(label: str) -> str:
    """Return a label as a part of a path."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-.").lower() or "-"


# --- evaluation --------------------------------------------------------------------------------


def load_clip(args: argparse.Namespace, contracts: Sequence[Contract]) -> LoadedModel:
    """Return the original CLIP on its device, not expanded.

    Args:
        args: the arguments. ``--model`` and ``--pretrained`` come from the contracts if they are
            not given.
        contracts: the contracts of the curves.

    Raises:
        UsageError: the curves were trained from another original CLIP.
    """
    chosen = argparse.Namespace(**vars(args))
    bases = [contract.base for contract in contracts if contract.base is not None]
    if args.hf:
        chosen.model = name_of_transformers(args.hf)
    elif bases and "model" not in args.given:
        chosen.model = bases[0].name
        if "pretrained" not in args.given:
            chosen.pretrained = bases[0].pretrained
    clip = models.load(chosen)
    for contract in contracts if not args.override else ():
        require_base(clip.model, contract, "The weights of the original CLIP")
    return clip


def load_tuned(clip: LoadedModel, path: Path, args: argparse.Namespace) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of the model, on the CPU.

    Raises:
        CheckpointError, StateMismatchError: the file can't be read, or does not fit the model.
    """
    patterns = {"allow_missing": args.allow_missing, "allow_unexpected": args.allow_unexpected}
    return {n: v.cpu() for n, v in fine_tuned(clip.model, path, **patterns).items()}


def evaluate(
    line: Line,
    tuned: dict[str, Tensor] | None,
    clip: LoadedModel,
    data_set: tuple[argparse.Namespace, Sequence[Split]],
    args: argparse.Namespace,
) -> ProtocolEvaluation:
    """Evaluate a curve on a data set. Records of earlier runs are reused.

    ``args`` are the options of the curve, with the contract of its weights.
    """
    options, splits = data_set
    device = next(clip.model.parameters()).device
    moved = None if tuned is None else {n: v.to(device) for n, v in tuned.items()}
    if args.contract is not None:
        expand_as(clip.model, args.contract)
    elif line.temporal:
        expand_temporal_attention(clip.model, window=args.window, boundary=args.boundary)
    try:
        return evaluate_protocol(
            clip.model,
            clip.tokenizer,
            splits,
            options.videos,
            mixture=Mixture(moved, args.lam if tuned is not None else (), args.text),
            transform=clip.transform if args.contract is None else transform_of(args.contract),
            sampling=models.sampling_of(args),
            templates=models.templates_of(args),
            out=args.out / "records" / file_name(line.label) / file_name(options.label),
            run=RunOptions(
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                amp=models.amp_of(args),
                pooling=models.pooling_of(args),
                description=f"{line.label} on {options.label}",
                leave_out_broken=options.leave_out_broken,
                allow_missing=options.allow_missing_videos,
            ),
        )
    finally:
        if line.temporal:
            restore_spatial_attention(clip.model)


# --- results -----------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file, atomically."""
    with write_errors(path), atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of earlier runs, by curve and data set.

    Raises:
        RecordsError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise RecordsError(
            f"{path} does not hold the results of earlier runs{reason}. Move the file away: the "
            "same command writes it again from the records beside it, without decoding videos."
        )
    return content


def write_results(results: Results, out: Path) -> None:
    """Add the results to ``results.json``, which keeps the results of earlier runs."""
    path = out / "results.json"
    content = read_results(path)
    for line, row in results.items():
        content.setdefault(line, {}).update({name: as_json(result) for name, result in row.items()})
    write_text(path, json.dumps(content, indent=1))


def table(results: Results) -> str:
    """Return a Markdown table: top-1 accuracy in % of each curve at each lambda."""
    columns = list(next(iter(results.values())))
    rows = []
    for line, row in results.items():
        for lam in row[columns[0]].scores:
            cells = [mean_and_std(row[column].top(1, lam)) for column in columns]
            rows.append([line, "" if lam is None else f"{lam:g}", *cells])
    return markdown_table(["curve", "λ", *columns], rows)


def curve_of(line: Line, closed: ProtocolEvaluation, zero_shot: ProtocolEvaluation) -> Curve:
    """Return the points of a curve: means over the splits. The original CLIP is at lambda 1."""
    lams = [1.0 if lam is None else lam for lam in closed.scores]
    chosen = None if line.star is None else lams.index(line.star)
    x, y = _means(closed), _means(zero_shot)
    return Curve(line.label, lams, x, y, chosen, highlighted=chosen is not None)


def _means(result: ProtocolEvaluation) -> NDArray[np.float64]:
    """Top-1 accuracy, the mean over the splits, ``[1, L]``."""
    return np.array([[np.mean(result.top(1, lam)) for lam in result.scores]])


def draw(results: Results, lines: Sequence[Line], out: Path) -> list[Path]:
    """Draw a figure for each zero-shot set, and return their paths."""
    closed, *zero_shot = next(iter(results.values()))
    paths = [out / f"tradeoff-{file_name(label)}.png" for label in zero_shot]
    for label, path in zip(zero_shot, paths, strict=True):
        rows = [(line, results[line.label]) for line in lines]
        tradeoff_figure(
            [curve_of(line, row[closed], row[label]) for line, row in rows],
            path,
            closed_set_label=f"closed set: {closed} (%)",
            zero_shot_label=f"zero-shot: {label} (%)",
        )
    return paths


def report(results: Results, lines: Sequence[Line], out: Path) -> None:
    """Print and write the table, list the videos that could not be read, and draw the figures."""
    text = table(results)
    write_text(out / "table.md", text)
    print(f"\nTop-1 accuracy in %; λ weighs the original CLIP:\n\n{text}\n")
    evaluations = [evaluation for row in results.values() for evaluation in row.values()]
    for reason in sorted({failure.reason for e in evaluations for failure in e.failures}):
        print(f"can't be read: {reason}", file=sys.stderr)
    for path in (out / "results.json", out / "table.md", *draw(results, lines, out)):
        print(f"wrote {path}")


def run(args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate all curves on all data sets, then report."""
    require_matplotlib()
    read_results(args.out / "results.json")  # a damaged file is an error before the first video
    data_sets = [
        (options, chosen_splits(options)) for options in (args.closed_set, *args.zero_shot)
    ]
    lines = args.lines
    # The curves share one original CLIP, so no contract decides its name and its weights alone.
    ignored = ["model", "pretrained"]
    options_by_line = {
        line: options_for_files(
            args, [line.path] if line.path else [], expand=line.temporal, ignored=ignored
        )
        for line in lines
    }
    contracts = [options.contract for options in options_by_line.values() if options.contract]
    if args.override and not contracts:
        raise UsageError("--override has no effect: no curve has a contract. Leave it out.")
    clip = load_clip(args, contracts)
    # All checkpoints are read before the first video, so that a wrong checkpoint fails at once.
    tuned = {line: load_tuned(clip, line.path, args) for line in lines if line.path is not None}
    results: Results = {line.label: {} for line in lines}
    for line in lines:
        for data_set in data_sets:
            options = options_by_line[line]
            evaluation = evaluate(line, tuned.get(line), clip, data_set, options)
            results[line.label][data_set[0].label] = evaluation
            if processes.is_first:
                write_results(results, args.out)
    if processes.is_first:
        report(results, lines, args.out)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    args = parse_arguments(arguments)
    try:
        with joined_processes() as processes:
            run(args, processes)
    except OpenVCLIPError as error:
        raise SystemExit(f"tradeoff.py: error: {error}") from error


if __name__ == "__main__":
    main()
