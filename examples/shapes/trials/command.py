"""The methods of this library beside each other in the shapes world.

Without --full: one cell (three trained actions of six, one seed), the main methods with the
settings of the published results, in under 4 minutes on 2 cores. With --full: all methods, at
settings chosen on development classes, over 24 cells, in less than 4 hours. Each result is
printed and saved as it comes. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import openvclip
from examples.shapes.clips import write_clip
from examples.shapes.drawing import draw_video
from examples.shapes.final_model import CLASSES, FINAL, write_averaged, write_final
from examples.shapes.results import Results, only_run
from examples.shapes.trials.cells import QUESTIONS, cell
from examples.shapes.trials.clips import FRAMES, VIDEO_FRAMES
from examples.shapes.trials.registry import METHODS, TRAININGS
from examples.shapes.trials.runner import Runner
from examples.shapes.trials.settings import FULL, QUICK, SMOKE, Sizes
from examples.shapes.trials.store import Choice, key_of
from examples.shapes.trials.tasks import Place
from examples.shapes.trials.workshop import fresh_clip
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.evaluation import markdown_table

__all__ = ["QUICK_METHODS", "main", "parse_arguments"]

#: The methods of the quick mode.
QUICK_METHODS = ("CLIP", "FINE-TUNE", "SWA", "IWR", "Open-VCLIP")

PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "assets" / "shapes-trials.json"
"""The published results, whose settings the quick mode uses."""

AVERAGED = "openvclip-averaged.safetensors"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m examples.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-out"), help="output folder")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="run all methods in all cells")
    size.add_argument("--smoke", action="store_true", help="run all methods for a few steps")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="run only these methods, and those they need"
    )
    parser.add_argument(
        "--cells",
        type=int,
        default=None,
        help=f"number of cells (default: {FULL.cells} with --full, else 1)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="number of processes with one thread each (default: one for each core)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the clips and the weights of finished cells"
    )
    parser.add_argument("--list", action="store_true", help="list the methods and stop")
    args = parser.parse_args(None if arguments is None else list(arguments))
    ignored = "with --list" if args.list else ""
    problem = unused_option(args.given, dict.fromkeys(("full", "only", "cells", "jobs"), ignored))
    if problem:
        parser.error(problem)
    for name in ("cells", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1.")
    unknown = [name for name in args.only or () if name not in METHODS]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: expected one of {', '.join(METHODS)}.")
    return args


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, or the missing part of it, and print its table."""
    args = parse_arguments(arguments)
    if args.list:
        print("\n".join(METHODS))
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    sizes = FULL if args.full else SMOKE if args.smoke else QUICK
    sizes = replace(sizes, cells=args.cells or sizes.cells)
    quick = not (args.full or args.smoke)
    methods = tuple(args.only or (QUICK_METHODS if quick else METHODS))
    choices = quick_choices(methods) if quick else None
    try:
        with only_run(args.out):
            runner = Runner(
                Place(args.out, sizes), methods, jobs=args.jobs, choices=choices, keep=args.keep
            )
            results = runner.run()
    except (openvclip.OpenVCLIPError, FileExistsError, ValueError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(
            "\nStopped. Finished tasks are kept. Run the same command again to go on."
        ) from None
    _finish(results, runner, sizes, time.perf_counter() - started)


def quick_choices(methods: Sequence[str]) -> dict[str, Choice]:
    """Return the settings of the published results, or settings from the middle of each grid."""
    published: dict[str, Any] = {}
    if PUBLISHED.exists():
        published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["chosen"]
    choices = {}
    for name in methods:
        method = METHODS[METHODS[name].like or name]
        grid = TRAININGS[method.needs[0]].grid if method.needs else ({},)
        training = dict(grid[len(grid) // 2])
        lam = 0.5 if 0.5 in METHODS[name].lams else METHODS[name].lams[0]
        own = {"training": training, "params": dict(METHODS[name].params[0]), "lam": lam}
        choices[name] = published.get(name, own)
    return choices


def _finish(results: Results, runner: Runner, sizes: Sizes, seconds: float) -> None:
    place = runner.place
    table = short_table(results, runner.methods)
    cells = "1 cell" if sizes.cells == 1 else f"mean over {sizes.cells} cells"
    print(f"\nTop-1 accuracy in %, {cells}; λ weighs the original CLIP:\n\n{table}")
    with atomic_path(place.out / "table.md") as partial:
        partial.write_text(table + "\n", encoding="utf-8")
    written = ["table.md", "results.json"]
    averaged = _final_model(results, place)
    if averaged:
        written += [FINAL, CLASSES]
    for name in written:
        print(f"wrote {place.out / name}")
    print(f"done in {seconds / 60:.1f} minutes")
    if averaged:
        _invite(place.out)
    failures = runner.report()
    if failures:
        raise SystemExit(failures)


def short_table(results: Results, methods: Sequence[str]) -> str:
    """Return a Markdown table with the mean accuracies of each method at its λ."""
    columns = (*QUESTIONS, "stills")
    rows = []
    for name in methods:
        entries = [
            entry["methods"][name]
            for entry in results["cells"].values()
            if name in entry["methods"]
        ]
        for lam in sorted({p["lam"] for entry in entries for p in entry["points"]}):
            at = [p["accuracy"] for e in entries for p in e["points"] if p["lam"] == lam]
            means = [sum(accuracy[c] for accuracy in at) / len(at) for c in columns]
            rows.append([name, f"{lam:g}", *(f"{100 * mean:.1f}" for mean in means)])
    header = ["method", "λ", "trained classes", "unseen shapes", "unseen shapes and actions"]
    return markdown_table([*header, "CLIP's stills"], rows)


def _final_model(results: Results, place: Place) -> bool:
    """Write the model of Open-VCLIP of the first cell as a folder for ``openvclip predict``."""
    choice = results["chosen"].get("Open-VCLIP")
    if choice is None:
        return False
    key = key_of("iwr", choice["training"])
    if not place.store.path(cell(0), key).exists():
        return False
    ends = place.store.load(cell(0), key, dict(fresh_clip()[0].state_dict()))
    write_averaged(place.out / AVERAGED, ends["swa"], FRAMES)
    write_final(place.out, place.out / AVERAGED, choice["lam"], FRAMES)
    return True


def _invite(out: Path) -> None:
    """Write a clip of an unseen shape, and print the command that classifies it."""
    import numpy as np

    first = cell(0)
    shape, action = first.pairs("shapes")[0]
    clip = out / f"{shape}-{action}.mp4"
    rng = np.random.default_rng(0)
    write_clip(clip, draw_video(shape, "red", action, rng, frames=VIDEO_FRAMES))
    labels = ["--labels-file", str(out / CLASSES)]
    words = ["openvclip", "predict", str(clip), "--model", str(out), *labels]
    print(f"try the model on a clip of a shape that it was not trained on:\n  {shlex.join(words)}")
