"""Open-VCLIP on a small world of drawn shapes, from CLIP to an open-vocabulary video model.

This command draws H.264 clips and applies a tiny CLIP to them frame by frame. It fine-tunes the
CLIP on clips of 8 shapes, with and without interpolated weight regularisation (IWR) and weight
averaging (SWA), and interpolates the results with the original CLIP. Then it evaluates them on
clips of 8 shapes that are not in the training clips. With --full it runs studies of
single settings.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import openvclip
from examples.shapes import results as reporting
from examples.shapes.clips import ClipSettings, make_clips, missing_clips
from examples.shapes.experiment import (
    DRAWING_SECONDS,
    LAMBDAS,
    MEASUREMENT_COSTS,
    PROCESS_SECONDS,
    Settings,
    clips_folder,
    measure_speed,
    perform,
    phase_costs,
)
from examples.shapes.final_model import CLASSES, FINAL, write_averaged, write_final
from examples.shapes.progress import (
    DRAWING,
    MEASUREMENT,
    Advance,
    Costs,
    Estimator,
    Progress,
    Reporter,
)
from examples.shapes.schedule import Report, side_by_side
from examples.shapes.settings import FULL, SMOKE
from examples.shapes.studies import AVERAGE, MAIN, OPEN_VCLIP, QUICK, STUDIES, Study, Task, plan
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.training.recipe import recipe_settings

AVERAGED = "openvclip-averaged.safetensors"
FULL_TIME = (
    "All studies: less than 2 hours on 2 cores. If you stop the command, finished runs are kept. "
    "Run the same command again to continue."
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m examples.shapes.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-out"), help="output folder")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="run all studies with 3 or 5 seeds each")
    size.add_argument("--smoke", action="store_true", help="run a few steps as a test")
    names = [study.name for study in STUDIES]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="STUDY",
        help=f"run only these studies; choose from {', '.join(names)}",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=None,
        help="run at most this number of seeds of each study (default: all seeds)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="number of processes with one thread each (default: one for each core)",
    )
    args = parser.parse_args(arguments)
    problem = unused_option(args.given, {"full": "with --only" if args.only else ""})
    if problem:
        parser.error(problem)
    for name in ("seeds", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SystemExit(f"--{name} {value}: expected at least 1.")
    return args


@command
def main(arguments: list[str] | None = None) -> None:
    """Run the experiment, then write and print its results."""
    args = parse_arguments(arguments)
    started = time.perf_counter()
    if args.full and not args.only:
        print(FULL_TIME, flush=True)
    studies = studies_of(args)
    try:
        with reporting.only_run(args.out):
            results = run_studies(
                SMOKE if args.smoke else FULL, studies, args.out, args.seeds, args.jobs
            )
    except (openvclip.OpenVCLIPError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(
            "\nStopped. Finished runs are kept. Run the same command again to continue."
        ) from None
    _report(results, studies, args.out, time.perf_counter() - started)


def studies_of(args: argparse.Namespace) -> list[Study]:
    """Return the studies that the command line selects."""
    if args.only:
        return [study for study in STUDIES if study.name in args.only]
    return list(STUDIES) if args.full else [QUICK]


def run_studies(
    settings: Settings, studies: list[Study], out: Path, seeds: int | None, jobs: int
) -> reporting.Results:
    """Do the runs that the results file in ``out`` lacks, and save each result at once.

    Args:
        settings: the size of the experiment.
        studies: the studies.
        out: folder of the results.
        seeds: largest number of seeds of a study. Default: the number of each study.
        jobs: number of processes.

    Raises:
        FileExistsError: the folder contains results of other settings.
        openvclip.OpenVCLIPError: a run failed.
    """
    path = out / "results.json"
    tasks = plan(studies, seeds)
    results = reporting.load_results(path, recorded(settings))
    reporting.require_definitions(results, [task.run for task in tasks], path)
    missing = [task for task in tasks if not reporting.holds(results, task)]
    if not missing:
        return results
    here = environment()
    print(f"{len(missing)} of {len(tasks)} runs to do, {jobs} at a time", flush=True)
    work = partial(_perform, settings, out)
    with Progress(_estimator(settings, missing, out, jobs)) as progress:
        measure_speed(Reporter(MEASUREMENT, progress.add))
        for seed in sorted({task.seed for task in missing}):
            _draw_clips(replace(settings.clips, seed=seed), out, jobs, progress)
        progress.finish(DRAWING)
        for number, (task, entry) in enumerate(
            side_by_side(work, missing, jobs, progress.add, out / "log"), start=1
        ):
            reporting.enter(results, task, entry)
            reporting.count_run(results, here)
            reporting.save_results(results, path)
            seconds = f"{entry['seconds']:.0f} s"
            progress.finish(str(task), f"{number} of {len(missing)}: {task}, {seconds}")
    return results


def _estimator(settings: Settings, tasks: list[Task], out: Path, processes: int) -> Estimator:
    """Return the estimator of the time that the tasks take, the drawing of clips included."""
    seeds = Counter[int]()
    costs: dict[str, Costs] = {}
    for task in tasks:
        costs[str(task)] = phase_costs(settings, task, first=seeds[task.seed] < processes)
        seeds[task.seed] += 1
    clips = sum(
        missing_clips(clips_folder(out, seed), replace(settings.clips, seed=seed)) for seed in seeds
    )
    return Estimator(MEASUREMENT_COSTS, clips * DRAWING_SECONDS, costs, processes)


def _draw_clips(clips: ClipSettings, out: Path, processes: int, progress: Progress) -> None:
    def add(count: int, seconds: float) -> None:
        progress.add(Advance(DRAWING, "drawing", count * DRAWING_SECONDS, seconds))

    folder = clips_folder(out, clips.seed)
    make_clips(folder, clips, num_workers=processes, progress=False, on_written=add)


def _perform(settings: Settings, out: Path, task: Task, report: Report) -> reporting.Entry:
    """Do a task in a worker process; save the averaged weights of Open-VCLIP for seed 0."""
    reporter = Reporter(str(task), report)
    reporter.started(PROCESS_SECONDS)
    outcome = perform(settings, task, out, reporter)
    if task.run == OPEN_VCLIP and task.seed == 0:
        write_averaged(out / AVERAGED, outcome.weights[AVERAGE])
    return reporting.entry_of(task, outcome)


def _report(results: reporting.Results, studies: list[Study], out: Path, seconds: float) -> None:
    main_table = reporting.Table(MAIN, results)
    tables = [reporting.table(results, study) for study in studies]
    (out / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    for study, table in zip(studies, tables, strict=True):
        print(f"\n{study.name}: top-1 accuracy in %, {_seeds(study, results)}:\n\n{table}")
    print("\nλ weighs the original CLIP; it is chosen on clips of 8 further shapes (development).")
    reporting.draw(main_table, out / "tradeoff.png")
    written = ["table.md", "tradeoff.png", "results.json"]
    open_vclip = main_table.row("Open-VCLIP")
    if open_vclip is not None and (out / AVERAGED).exists():
        write_final(out, out / AVERAGED, main_table.chosen_lambda(open_vclip))
        written += [FINAL, CLASSES]
    for name in written:
        print(f"wrote {out / name}")
    print(f"done in {seconds / 60:.1f} minutes", end="")
    if FINAL not in written:
        print()
        return
    clip = max((clips_folder(out, 0) / "videos").glob("*/unseen-*.mp4"))
    labels = ["--labels-file", str(out / CLASSES)]
    command = ["openvclip", "predict", str(clip), "--model", str(out), *labels]
    print(f"; try the model on a clip:\n  {shlex.join(command)}")


def _seeds(study: Study, results: reporting.Results) -> str:
    n = len(reporting.Table(study, results).seeds)
    return "1 seed" if n == 1 else f"mean ± standard deviation over {n} seeds"


def recorded(settings: Settings) -> dict[str, object]:
    """Return the settings to save in the results file; all its results have the same settings."""
    return {
        "clips": asdict(settings.clips),
        "recipe": recipe_settings(settings.recipe),
        "lambdas": list(LAMBDAS),
    }


def environment() -> dict[str, str]:
    """Return the versions of the packages that compute the results, and the machine."""
    packages = ("openvclip", "torch", "open_clip_torch", "av", "numpy")
    versions = {package: version(package) for package in packages}
    machine = f"{_processor()}, {os.cpu_count()} cores"
    return {**versions, "python": platform.python_version(), "machine": machine}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
