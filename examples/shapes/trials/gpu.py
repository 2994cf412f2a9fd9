"""The comparison with an image tower of ten times the size, on a GPU, in under 8 minutes.

First the image tower (5.0 million parameters in place of 0.47 million) is pretrained on stills,
with the frozen text tower of the small CLIP. Then as many cells as fit into the time are run: the
clips of a cell are drawn by all cores while the GPU trains. The settings are those of the published
results of the small model, and λ is 0, 0.3, 0.5 and 0.6 for each method. Each result is printed and
saved in OUT/results.json as it comes. No method is begun after ``--seconds``, also in the first
cell, and a pretraining that takes longer ends the script. ``--cpu --smoke`` runs the same script at
a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as LateError  # another class in Python 3.10
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from examples.shapes.model import Tokenizer, create_model, text_tower
from examples.shapes.pretrain import Batch, draw_batch, pretrain
from examples.shapes.results import Results, save_results
from examples.shapes.run import environment
from examples.shapes.trials.cells import QUESTIONS, Cell, ListName, cell
from examples.shapes.trials.clips import Clips, draw_stills
from examples.shapes.trials.command import quick_choices, short_table
from examples.shapes.trials.registry import METHODS, TRAININGS
from examples.shapes.trials.settings import FULL, SMOKE, Sizes
from examples.shapes.trials.store import Choice, key_of
from examples.shapes.trials.tasks import STILLS, Lists, Place, Test
from examples.shapes.trials.workshop import State, Workshop, use_original
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command

if TYPE_CHECKING:
    from open_clip import CLIP

__all__ = ["GPU_METHODS", "large_model", "main"]

#: The methods, in the order of the runs.
GPU_METHODS = (
    "CLIP",
    "FINE-TUNE",
    "SWA",
    "IWR",
    "Open-VCLIP",
    "Open-VCLIP, share 1/4",
    "FROSTER",
    "Lipsum-FT",
    "MonoSoup",
)

LAMS = (0.0, 0.3, 0.5, 0.6)


def _now() -> float:
    return time.perf_counter()


@dataclass(frozen=True)
class Clock:
    """The time of a run.

    Attributes:
        seconds: the time that there is.
        started: when the run started.
    """

    seconds: float
    started: float = field(default_factory=lambda: _now())

    @property
    def passed(self) -> float:
        """The seconds since the start."""
        return _now() - self.started

    @property
    def left(self) -> float:
        """The seconds that are left, at least 0."""
        return max(0.0, self.seconds - self.passed)


WIDTH, LAYERS, HEAD = 288, 5, 32


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        sizes: the sizes of a cell.
        pretraining: number of steps of the pretraining.
        stills: number of stills of a step of the pretraining.
        width, layers: the size of the image tower.
        batch_size: number of clips of a batch in evaluation.
    """

    sizes: Sizes
    pretraining: int
    stills: int
    width: int = WIDTH
    layers: int = LAYERS
    batch_size: int = 256


FULL_PLAN = Plan(FULL, 2400, 256)
_SMALL = replace(SMOKE, train=24, test=4, stills=2, steps=1, cells=1)
SMOKE_PLAN = Plan(_SMALL, 2, 8, width=64, layers=1, batch_size=16)


def large_model(width: int = WIDTH, layers: int = LAYERS) -> tuple[CLIP, Tokenizer]:
    """Return a CLIP with random weights in the image tower and the text tower of the small CLIP."""
    import open_clip

    _, tokenizer = create_model()
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg=open_clip.CLIPVisionCfg(
            image_size=32, patch_size=8, width=width, layers=layers, head_width=HEAD
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=16, vocab_size=49408, width=64, heads=2, layers=3
        ),
    )
    model.load_state_dict(text_tower(), strict=False)
    return model, tokenizer


def main_plan(plan: Plan, out: Path, device: str, seconds: float, workers: int) -> Results:
    """Pretrain, then run cells until the time is over; return the results.

    Raises:
        SystemExit: the pretraining took longer than ``seconds``.
    """
    clock = Clock(seconds)
    out.mkdir(parents=True, exist_ok=True)
    place = Place(out, plan.sizes)
    choices = quick_choices(GPU_METHODS)
    results: Results = {
        "settings": {"device": _device_name(device), "choices": choices, "lams": LAMS},
        "environments": [{**environment(), "runs": 1}],
        "chosen": choices,
        "cells": {},
    }
    context = get_context("spawn")  # a fork of a process that has used a GPU fails
    with ProcessPoolExecutor(workers, context, _one_thread) as pool:
        try:
            torch.manual_seed(0)
            model, tokenizer = large_model(plan.width, plan.layers)
            pretrain(
                steps=plan.pretraining,
                lr=1e-3,
                model=(model.to(device), tokenizer),
                batches=_ahead(pool, plan.pretraining, plan.stills, 4 * workers, clock),
                progress=False,
            )
            use_original(model.cpu(), tokenizer)
            count = sum(p.numel() for n, p in model.named_parameters() if n.startswith("visual."))
            results["pretraining"] = {"seconds": clock.passed, "parameters": count}
            print(f"pretrained {count:,} parameters in {clock.passed:.0f} s", flush=True)
            _run_cells(pool, place, plan, results, device, clock)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _run_cells(
    pool: ProcessPoolExecutor,
    place: Place,
    plan: Plan,
    results: Results,
    device: str,
    clock: Clock,
) -> None:
    """Run cells until the time is over, and save each result as it comes."""
    cells = [cell(number) for number in range(plan.sizes.cells)]
    clips = {0: _draw(pool, place, cells[0])}
    slowest = 0.0
    for each in cells:
        begun = clock.passed
        if clock.left < slowest:
            return
        try:
            for future in clips.pop(each.number):
                future.result(timeout=clock.left)
        except LateError:
            return
        if each.number + 1 < len(cells):
            clips[each.number + 1] = _draw(pool, place, cells[each.number + 1])
        for name, entry in _run_cell(each, place, plan, results["chosen"], device):
            rows = results["cells"].setdefault(str(each.number), {"methods": {}})["methods"]
            rows[name] = entry
            save_results(results, place.out / "results.json")
            print(_line(each, name, entry, clock.passed), flush=True)
            if not clock.left:
                return
        slowest = max(slowest, clock.passed - begun)


def _run_cell(
    each: Cell, place: Place, plan: Plan, choices: dict[str, Choice], device: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train and evaluate all methods in a cell. Methods share their trainings."""
    sizes = place.sizes
    workshop = Workshop(
        each, place.load(each, "train"), sizes.steps, sizes.batch_size, device=device
    )
    lists: Lists = {
        name: (each.names(name), _large_batches(place.load(each, name), plan)) for name in QUESTIONS
    }
    stills = replace(draw_stills(sizes.stills), batch_size=plan.batch_size)
    lists[STILLS] = (stills.names, stills)
    trained: dict[str, tuple[dict[str, State], float]] = {}
    for name in GPU_METHODS:
        method, choice = METHODS[name], choices[name]
        begun = time.perf_counter()
        runs, seconds = {}, 0.0
        for need in method.needs:
            key = key_of(need, choice["training"])
            if key not in trained:
                result = TRAININGS[need](workshop, choice["training"])
                trained[key] = (result.ends, sum(result.seconds))
            runs[need], seconds = trained[key][0], seconds + trained[key][1]
        lams = (0.0,) if len(method.lams) == 1 else LAMS
        test = Test(method, workshop.clip, runs, lists, device)
        points = list(test.points([tuple(choice["params"].items())], lams if runs else (1.0,)))
        yield (
            name,
            {
                "settings": choice["training"],
                "points": points,
                "training_seconds": seconds,
                "seconds": time.perf_counter() - begun,
            },
        )


def _large_batches(clips: Clips, plan: Plan) -> Clips:
    return replace(clips, batch_size=plan.batch_size)


def _draw(pool: ProcessPoolExecutor, place: Place, each: Cell) -> list[Future[None]]:
    names: tuple[ListName, ...] = ("train", *QUESTIONS)
    return [pool.submit(_make, place, each, name) for name in names]


def _make(place: Place, each: Cell, name: ListName) -> None:
    place.load(each, name)


def _ahead(
    pool: ProcessPoolExecutor, steps: int, stills: int, ahead: int, clock: Clock
) -> Iterator[Batch]:
    """Yield batches that the processes of a pool draw ahead; the seed is that of the batch."""
    draw = partial(_draw_stills, stills)
    waiting = [pool.submit(draw, step) for step in range(min(ahead, steps))]
    for step in range(steps):
        if not clock.left:
            raise SystemExit(
                f"The pretraining did {step} of {steps} steps in {clock.seconds:g} seconds. Give "
                "more --seconds, or more --workers if the device waits for stills."
            )
        batch = waiting.pop(0).result()
        if step + ahead < steps:
            waiting.append(pool.submit(draw, step + ahead))
        yield batch


def _draw_stills(stills: int, step: int) -> Batch:
    batch = draw_batch(stills, np.random.default_rng([7, step]))
    # A tensor would be passed on in shared memory, with a file for each batch.
    return batch._replace(matches=batch.matches.numpy())  # type: ignore[arg-type]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _line(each: Cell, name: str, entry: dict[str, Any], seconds: float) -> str:
    texts = [
        f"λ={point['lam']:g}: " + " / ".join(f"{100 * v:.1f}" for v in point["accuracy"].values())
        for point in entry["points"]
    ]
    return f"[{seconds:4.0f} s] {each.name}, {name}: {'; '.join(texts)}"


@command
def main(arguments: list[str] | None = None) -> None:
    """Run the script."""
    parser = Parser(
        prog="python -m examples.shapes.trials.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-gpu"), help="output folder")
    parser.add_argument(
        "--seconds", type=float, default=420, help="begin no method later than this"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.add_argument("--smoke", action="store_true", help="run a few steps as a test")
    workers = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes that draw (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit("There is no GPU. --cpu runs on the CPU; add --smoke for a short run.")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1.")
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    plan = SMOKE_PLAN if args.smoke else FULL_PLAN
    started = time.perf_counter()
    device = "cpu" if args.cpu else "cuda"
    results = main_plan(plan, args.out, device, args.seconds, args.workers)
    whole = {n: e for n, e in results["cells"].items() if len(e["methods"]) == len(GPU_METHODS)}
    table = short_table({**results, "cells": whole or results["cells"]}, GPU_METHODS)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")
    cells = f"{len(whole)} complete cell{'s' * (len(whole) != 1)}"
    print(f"\n{cells}, {results['settings']['device']}:\n\n{table}")
    print(json.dumps(results["pretraining"]))
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
