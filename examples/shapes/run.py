"""Open-VCLIP on a small world of drawn shapes, from CLIP to an open-vocabulary video model.

Draws H.264 clips, applies a tiny CLIP frame by frame, fine-tunes it on clips of 8 shapes with and
without interpolated weight regularisation (IWR) and weight averaging (SWA), interpolates the
results with the original CLIP, and evaluates on clips of 8 shapes that fine-tuning never saw.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

import openvclip
from examples.shapes import results as reporting
from examples.shapes.experiment import LAMBDAS, ROWS, Experiment, Settings
from examples.shapes.model import create_model
from examples.shapes.settings import FULL, QUICK, SMOKE
from examples.shapes.world import class_names
from openvclip.checkpoints import load_checkpoint, save_checkpoint

AVERAGED = "openvclip-averaged.safetensors"
FINAL = "openvclip-shapes.safetensors"
FULL_TIME = (
    "3 seeds, 3 runs each: about 16 minutes on 2 cores. Finished runs are kept if you stop it; the "
    "same command goes on."
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-out"), help="output folder")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="3 seeds and all methods")
    size.add_argument("--smoke", action="store_true", help="a few steps, to see that all works")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment, then write and print its results."""
    args = parse_arguments(arguments)
    settings = SMOKE if args.smoke else FULL if args.full else QUICK
    n_seeds = args.seeds if args.seeds is not None else (3 if args.full else 1)
    if n_seeds < 1:
        raise SystemExit(f"--seeds {n_seeds}: expected at least 1.")
    if args.full:
        print(FULL_TIME, flush=True)
    started = time.perf_counter()
    results_path = args.out / "results.json"
    try:
        results = reporting.load_results(results_path, recorded(settings))
        results["environment"] = _environment()
        for seed in range(n_seeds):
            _run_seed(settings, seed, args.out, results, results_path)
    except (openvclip.OpenVCLIPError, FileExistsError) as error:
        raise SystemExit(str(error)) from error
    _report(results, args.out, time.perf_counter() - started)


def _run_seed(
    settings: Settings, seed: int, out: Path, results: reporting.Results, results_path: Path
) -> None:
    """The runs of a seed that the results file does not hold yet, each saved as it comes."""
    done = results["seeds"].setdefault(str(seed), {})
    missing = [run for run in settings.runs if ROWS[run][0] not in done]
    if not missing and "CLIP" in done:
        return
    print(f"seed {seed}: clips, then the runs {', '.join(missing)}", flush=True)
    experiment = Experiment(settings, seed, out / "clips" / f"seed-{seed}")
    if "CLIP" not in done:
        done["CLIP"] = experiment.clip_accuracies()
    for run in missing:
        for row, (accuracies, theta) in experiment.run(run).items():
            done[row] = accuracies
            if row == "Open-VCLIP" and seed == 0:
                save_checkpoint(theta, out / AVERAGED)
        reporting.save_results(results, results_path)


def _report(results: reporting.Results, out: Path, seconds: float) -> None:
    lam = reporting.chosen_lambda(results, "Open-VCLIP")
    clip = create_model()[0].state_dict()
    final = openvclip.interpolate(clip, load_checkpoint(out / AVERAGED), lam)
    metadata = {"model": "shapes-clip", "lambda": f"{lam:g}"}
    save_checkpoint(final, out / FINAL, dtype=torch.float16, metadata=metadata)
    table = reporting.table(results)
    (out / "table.md").write_text(table + "\n")
    reporting.draw(results, out / "tradeoff.png")
    print(f"\nTop-1 accuracy in %, {_describe(results)}:\n\n{table}\n")
    print("λ weighs the original CLIP; it is chosen on clips of 8 further shapes (development).")
    for name in ("tradeoff.png", "results.json", FINAL):
        print(f"wrote {out / name}")
    name = class_names("unseen")[-1]
    clips = sorted((out / "clips" / "seed-0" / "videos" / name).glob("*.mp4"))
    command = ["python", "-m", "examples.shapes.predict", str(out / FINAL), str(clips[0])]
    print(f"done in {seconds / 60:.1f} minutes; try the model on a clip:\n  {shlex.join(command)}")


def _describe(results: reporting.Results) -> str:
    n = len(results["seeds"])
    return "1 seed" if n == 1 else f"mean ± standard deviation over {n} seeds"


def recorded(settings: Settings) -> dict[str, object]:
    """The settings as the results file has them; results of others are not mixed with these."""
    # Without the runs, so that --full continues what the quick mode has done.
    return {
        "clips": asdict(settings.clips),
        "recipe": asdict(settings.recipe),
        "lambdas": list(LAMBDAS),
    }


def _environment() -> dict[str, str]:
    packages = ("openvclip", "torch", "open_clip_torch", "av", "numpy")
    found = {package: version(package) for package in packages}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {**found, "python": platform.python_version(), "machine": machine}


if __name__ == "__main__":
    main()
