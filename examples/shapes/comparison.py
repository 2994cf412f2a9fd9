"""Open-VCLIP beside ViFi-CLIP and Vita-CLIP in the shapes world.

This command trains every method on the same clips for the same number of steps: on all clips of the
seen shapes (closed-set and zero-shot), on 16 clips of each base class (base-to-novel; half of the
classes are base classes), and on 2, 4, 8 and 16 clips of each class (few-shot). Each result is
saved in OUT/results.json at once. After a stop, run the same command again to continue. Every run
has one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import TensorDataset

import openvclip
from examples.shapes.clips import LISTS, ClipSettings, make_clips
from examples.shapes.comparison_methods import Run
from examples.shapes.comparison_settings import (
    CANDIDATES,
    FULL,
    LAMBDAS,
    METHODS,
    RATES,
    SMOKE,
    TUNING_SEED,
    VIFI_PROMPTS,
    Family,
    Setting,
    Sizes,
)
from examples.shapes.experiment import clips_folder, load_clips
from examples.shapes.results import Results, count_run, load_results, save_results
from examples.shapes.run import environment
from examples.shapes.schedule import Report, side_by_side
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command


@dataclass(frozen=True)
class Job:
    """A run, and the place of its result: ``results["seeds"][seed][group][name]``."""

    seed: int
    setting: str
    method: str
    group: str
    name: str
    rates: tuple[tuple[Family, float], ...] = tuple(RATES.items())

    def setting_in(self, sizes: Sizes) -> Setting:
        """Return the setting of the run; ``"tuning"`` means ``sizes.tuning``."""
        return sizes.tuning if self.setting == "tuning" else sizes.settings[self.setting]


def jobs_of(sizes: Sizes, seeds: int) -> list[Job]:
    """Return all runs, ordered by seed and then by setting."""
    return [
        Job(seed, setting, method, setting, method)
        for seed in range(seeds)
        for setting in sizes.settings
        for method in sizes.methods
    ]


def run_job(job: Job, sizes: Sizes, out: Path) -> dict[str, Any]:
    """Train and evaluate; return the result for the results file."""
    setting, method = job.setting_in(sizes), METHODS[job.method]
    data = load_data(replace(sizes.clips, seed=job.seed), clips_folder(out, job.seed))
    run = Run(method, setting, sizes, job.seed, data, dict(job.rates))
    run.learn()
    return run.result()


@lru_cache(maxsize=1)
def load_data(clips: ClipSettings, folder: Path) -> dict[str, TensorDataset]:
    """Return the decoded lists of a seed; missing clips are drawn first."""
    make_clips(folder, clips)
    return {name: load_clips(folder, name) for name in LISTS}


class Runner:
    """Do the runs that a results file lacks, and print the progress.

    Args:
        sizes: the size of the comparison.
        settings: the settings for the results file. A results file with other settings is refused.
        out: folder of the clips.
        path: the results file.
        processes: number of processes with one thread each.
    """

    def __init__(
        self, sizes: Sizes, settings: dict[str, Any], out: Path, path: Path, processes: int = 1
    ) -> None:
        self.sizes, self.out, self.path, self.processes = sizes, out, path, processes
        self.results: Results = load_results(path, settings)
        self.environment = environment()

    def run(self, jobs: list[Job]) -> None:
        """Do the jobs without a result, and save each result at once."""
        missing = [job for job in jobs if self.result_of(job) is None]
        if missing:
            print(f"{len(missing)} of {len(jobs)} runs to do, in {self.path}", flush=True)
        started, done = time.perf_counter(), 0
        total = sum(map(self._size, missing))
        for job, result in self._results(missing):
            self.results["seeds"].setdefault(str(job.seed), {}).setdefault(job.group, {})[
                job.name
            ] = result
            count_run(self.results, self.environment)
            save_results(self.results, self.path)
            done += self._size(job)
            seconds = (time.perf_counter() - started) * (total - done) / done
            accuracies = ", ".join(
                f"{name} {100 * next(iter(by_lambda.values())):.1f}"
                for name, by_lambda in result["accuracy"].items()
            )
            left = f"about {seconds / 60:.0f} min left" if done < total else "done"
            print(f"seed {job.seed}, {job.group}, {job.name}: {accuracies} ({left})", flush=True)

    def result_of(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a job, or ``None`` if there is no result."""
        group = self.results["seeds"].get(str(job.seed), {}).get(job.group, {})
        result: dict[str, Any] | None = group.get(job.name)
        return result

    def _size(self, job: Job) -> int:
        # Evaluation takes about as long as 20 steps.
        steps = 0 if METHODS[job.method].family is None else job.setting_in(self.sizes).steps
        return 20 + steps

    def _results(self, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        if self.processes == 1:
            yield from ((job, run_job(job, self.sizes, self.out)) for job in jobs)
            return
        # Draw the clips here. Otherwise each process would draw them.
        for seed in sorted({job.seed for job in jobs}):
            make_clips(clips_folder(self.out, seed), replace(self.sizes.clips, seed=seed))
        yield from side_by_side(
            partial(_in_worker, self.sizes, self.out),
            jobs,
            self.processes,
            lambda _: None,
            self.out / "logs",
        )


def _in_worker(sizes: Sizes, out: Path, job: Job, report: Report) -> dict[str, Any]:
    """Call :func:`run_job` in a worker process, without reports of the progress."""
    return run_job(job, sizes, out)


def tune(sizes: Sizes, out: Path, path: Path, processes: int) -> dict[Family, float]:
    """Try the learning rates of each family, and return the best learning rate of each family.

    The best learning rate has the largest mean of two accuracies after training on the seen shapes:
    the accuracy on new clips of the seen shapes and on clips of the development shapes, both
    without interpolation.
    """
    runner = Runner(sizes, recorded(sizes), out, path, processes)
    best = dict(RATES)
    for family, candidates in CANDIDATES.items():
        method = next(name for name, entry in METHODS.items() if entry.family == family)
        rates = [tuple({**best, family: rate}.items()) for rate in candidates]
        names = [f"{rate:g}" for rate in candidates]
        runner.run(
            [
                Job(TUNING_SEED, "tuning", method, family, name, rate)
                for name, rate in zip(names, rates, strict=True)
            ]
        )
        best[family] = best_rates(runner.results)[family]
        print(f"{family}: {best[family]:g}", flush=True)
    return best


def best_rates(tuning: Results) -> dict[Family, float]:
    """Return the best learning rate of each family in the results of :func:`tune`."""
    tried: dict[Family, dict[str, Any]] = tuning["seeds"][str(TUNING_SEED)]

    def score(result: dict[str, Any]) -> float:
        return float(sum(by_lambda["0"] for by_lambda in result["accuracy"].values()))

    return {
        family: float(max(results, key=lambda rate: score(results[rate])))
        for family, results in tried.items()
    }


def time_steps(sizes: Sizes, rounds: int = 3, steps: int = 6) -> Results:
    """Measure the seconds of a training step of each method: the median of each round.

    Every round measures all methods, so that a short load of the machine does not slow down only
    one method. No other program should run.
    """
    clips = TensorDataset(torch.randn(64, 8, 3, 32, 32), torch.arange(64))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, method in METHODS.items():
            if method.family is not None:
                run = Run(method, Setting(steps, ()), sizes, 0, {"train": clips})
                run.learn()
                seconds.setdefault(name, []).append(median(run.seconds))
    return {"environment": environment(), "seconds": seconds}


def recorded(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Return the settings to save in the results file; all its results have the same settings."""
    settings = {
        "sizes": asdict(sizes),
        "methods": {name: asdict(METHODS[name]) for name in sizes.methods},
        "vifi_prompts": VIFI_PROMPTS,
        "lambdas": LAMBDAS,
        **more,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # turns tuples into lists
    return plain


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m examples.shapes.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("comparison-out"), help="output folder")
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of processes with one thread each (default: %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help="run a few steps as a test")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--tune", action="store_true", help="only try the learning rates")
    instead.add_argument(
        "--time", action="store_true", help="only measure the time of a training step (about 1 min)"
    )
    args = parser.parse_args(arguments)
    part = "with --tune" if args.tune else "with --time" if args.time else ""
    problem = unused_option(args.given, {"seeds": part, "jobs": "with --time" if args.time else ""})
    if problem:
        parser.error(problem)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1.")
    return args


@command
def main(arguments: list[str] | None = None) -> None:
    """Run the comparison, or the missing part of it."""
    args = parse_arguments(arguments)
    torch.set_num_threads(1)
    sizes = SMOKE if args.smoke else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.tune:
            print(tune(sizes, args.out, args.out / "tuning.json", args.jobs))
            return
        if args.time:
            save_results(time_steps(sizes), args.out / "timing.json")
            return
        path = args.out / "results.json"
        settings = recorded(sizes, rates=RATES)
        Runner(sizes, settings, args.out, path, args.jobs).run(jobs_of(sizes, args.seeds))
    except (openvclip.OpenVCLIPError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    print(f"{path} is complete; the page: python -m examples.shapes.report.comparison_page {path}")


if __name__ == "__main__":
    main()
