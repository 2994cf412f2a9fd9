r"""Zero-shot over closed-set accuracy along lambda: Figures 2 and 3 for any checkpoints and data.

    python examples/tradeoff.py --model ViT-B-16-quickgelu --pretrained openai \
        --curve "VCLIP=plain/finetuned.safetensors" --curve "Open-VCLIP=run/averaged.safetensors" \
        --closed-set annotations=k400/val.csv videos=k400/val \
        --zero-shot protocol=ucf101-ep2 annotations=ucfTrainTestlist videos=UCF-101 \
        --mark "Open-VCLIP=0.5" --out figure2/

A data set is given in the words of ``openvclip evaluate``: ``annotations=FILE`` stands for its
option ``--annotations FILE``, a word without ``=`` for a flag. Beyond these, ``split=N`` takes one
split of a protocol, and ``label=TEXT`` is what tables and figures call the data set.

lambda weighs the original CLIP. Each video is decoded once for all lambdas of a curve. Results are
kept as they come: the same command goes on where it was stopped, with further curves or data sets
too, and a folder that holds results of other settings is refused. Out come ``results.json``,
``table.md`` and a figure for each zero-shot set. On several GPUs: ``torchrun --nproc-per-node 8``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if __package__ in (None, ""):  # started by its path: let it find the files beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import tradeoff_options as options
from examples.tradeoff_options import Line, file_name
from openvclip import expand_temporal_attention, restore_spatial_attention
from openvclip.checkpoints import atomic_path, write_errors
from openvclip.cli.options import data, models
from openvclip.errors import OpenVCLIPError, UsageError
from openvclip.evaluation import (
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
from openvclip.models.loading import LoadedModel, fine_tuned
from openvclip.processes import Processes, joined_processes
from openvclip.video.protocols import Split

Results = dict[str, dict[str, ProtocolEvaluation]]
"""By the label of the curve, then by that of the data set; the closed set comes first."""


def read_splits(chosen: argparse.Namespace) -> list[Split]:
    """The splits of a data set, or the one that ``split=N`` says.

    Raises:
        OpenVCLIPError: lists, class names and videos don't fit together, or there is no such split.
    """
    splits = data.splits_of(chosen)
    if chosen.split is None:
        return splits
    if not 1 <= chosen.split <= len(splits):
        raise UsageError(
            f"split={chosen.split}: {chosen.annotations} gives {len(splits)}, counted from 1."
        )
    return [splits[chosen.split - 1]]


def load(args: argparse.Namespace) -> LoadedModel:
    """The original CLIP on its device; its frames are on their own."""
    if not args.hf:
        return models.load(args)
    from openvclip.models.hugging_face import load as load_hugging_face

    model, tokenizer, pixels = load_hugging_face(args.hf)
    pixels = pixels.with_(name=args.transform)
    return LoadedModel(Path(args.hf).name, model.to(models.device_of(args)), tokenizer, pixels)


def load_tuned(clip: LoadedModel, path: Path, args: argparse.Namespace) -> dict[str, Tensor]:
    """A checkpoint's weights under the names of the model, on the CPU.

    Raises:
        CheckpointError, StateMismatchError: it can't be read, or is of another backbone.
    """
    if not args.hf:
        patterns = {"allow_missing": args.allow_missing, "allow_unexpected": args.allow_unexpected}
        return {n: v.cpu() for n, v in fine_tuned(clip.model, path, **patterns).items()}
    from openvclip.checkpoints.formats import read_weights
    from openvclip.weights.names import canonical_state, named_state, require_match

    state = canonical_state(read_weights(path).weights)  # load_checkpoint gives open_clip's names
    require_match(named_state(clip.model), state, f"{path} does not fit {args.hf}.")
    return state


def evaluate(
    line: Line,
    tuned: dict[str, Tensor] | None,
    clip: LoadedModel,
    chosen: argparse.Namespace,
    splits: Sequence[Split],
    args: argparse.Namespace,
) -> ProtocolEvaluation:
    """The accuracies of a curve on a data set; what an earlier run has encoded is taken from it."""
    device = next(clip.model.parameters()).device
    if line.temporal:
        expand_temporal_attention(clip.model, window=args.window, boundary=args.boundary)
    moved = None if tuned is None else {n: v.to(device) for n, v in tuned.items()}
    try:
        return evaluate_protocol(
            clip.model,
            clip.tokenizer,
            splits,
            chosen.videos,
            mixture=Mixture(moved, args.lams if tuned is not None else ()),
            transform=clip.transform,
            sampling=models.sampling_of(args),
            templates=models.templates_of(args),
            out=args.out / "records" / file_name(line.label) / file_name(chosen.label),
            run=RunOptions(
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                amp=models.amp_of(args),
                description=f"{line.label} on {chosen.label}",
                leave_out_broken=chosen.leave_out_broken,
                allow_missing=chosen.allow_missing_videos,
            ),
        )
    finally:
        if line.temporal:
            restore_spatial_attention(clip.model)


def write_results(results: Results, out: Path) -> None:
    """``results.json``: what is known so far, beside what earlier runs have left there."""
    path = out / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for line, row in results.items():
        found.setdefault(line, {}).update({name: as_json(result) for name, result in row.items()})
    write_text(path, json.dumps(found, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file, atomically."""
    with write_errors(path), atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def table(results: Results) -> str:
    """Top-1 accuracy in % of each curve at each lambda; mean ± deviation where there are splits."""
    columns = list(next(iter(results.values())))
    rows = []
    for line, row in results.items():
        for lam in row[columns[0]].scores:
            cells = [mean_and_std(row[column].top(1, lam)) for column in columns]
            rows.append([line, "" if lam is None else f"{lam:g}", *cells])
    return markdown_table(["curve", "λ", *columns], rows)


def draw(results: Results, lines: Sequence[Line], out: Path) -> list[Path]:
    """A figure for each zero-shot set; returns their paths."""
    closed, *zero_shot = next(iter(results.values()))
    paths = []
    for label in zero_shot:
        path = out / f"tradeoff-{file_name(label)}.png"
        curves = [
            curve(line, results[line.label][closed], results[line.label][label]) for line in lines
        ]
        tradeoff_figure(
            curves,
            path,
            closed_set_label=f"closed set: {closed} (%)",
            zero_shot_label=f"zero-shot: {label} (%)",
        )
        paths.append(path)
    return paths


def curve(line: Line, closed: ProtocolEvaluation, zero_shot: ProtocolEvaluation) -> Curve:
    """Means over the splits; the original CLIP is at lambda 1."""
    lams = [1.0 if lam is None else lam for lam in closed.scores]
    chosen = None if line.star is None else lams.index(line.star)
    x, y = _means(closed), _means(zero_shot)
    return Curve(line.label, lams, x, y, chosen, highlighted=chosen is not None)


def _means(result: ProtocolEvaluation) -> NDArray[np.float64]:
    """Top-1 accuracy over the splits, ``[1, L]``."""
    return np.array([[np.mean(result.top(1, lam)) for lam in result.scores]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate all curves on all data sets, then draw."""
    args = options.parse_arguments(__doc__ or "", arguments)
    try:
        with joined_processes() as processes:
            _run(args, processes)
    except OpenVCLIPError as error:
        raise SystemExit(f"tradeoff.py: error: {error}") from error


def _run(args: argparse.Namespace, processes: Processes) -> None:
    require_matplotlib()
    datasets = [(chosen, read_splits(chosen)) for chosen in (args.closed_set, *args.zero_shot)]
    clip = load(args)
    lines: list[Line] = args.lines
    # All of them before the first video, so that one that does not fit is told at once.
    tuned = {line: load_tuned(clip, line.path, args) for line in lines if line.path is not None}
    results: Results = {line.label: {} for line in lines}
    for line in lines:
        for chosen, splits in datasets:
            found = evaluate(line, tuned.get(line), clip, chosen, splits, args)
            results[line.label][chosen.label] = found
            if processes.is_first:
                write_results(results, args.out)
    if processes.is_first:
        _report(results, lines, args.out)


def _report(results: Results, lines: Sequence[Line], out: Path) -> None:
    text = table(results)
    write_text(out / "table.md", text)
    print(f"\nTop-1 accuracy in %; λ weighs the original CLIP:\n\n{text}\n")
    found = [result for row in results.values() for result in row.values()]
    for reason in sorted({failure.reason for result in found for failure in result.failures}):
        print(f"can't be read: {reason}", file=sys.stderr)
    for path in (out / "results.json", out / "table.md", *draw(results, lines, out)):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
