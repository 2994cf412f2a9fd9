r"""Check the library on a GPU: first that results are correct, then how fast it is.

    python -m tests.device                       # everything, in less than 6 minutes
    python -m tests.device --out results/        # also keeps the results: device.json, logs.txt
    python -m tests.device --only golden towers  # some groups
    python -m tests.device --list                # the groups
    python -m tests.device --cpu                 # the same script with tiny models, without a GPU
    python -m tests.device --page device.json    # the section of docs/benchmarks.md

Run it from the root of a clone, in an environment with PyTorch for CUDA and the package with its
extra ``test``, which includes open_clip. The package itself can also be used without an
installation. If another library is not installed, its checks are skipped.

Each group runs in its own process with a time limit. If a check makes the device unusable, a new
process runs the rest of the group. The JSON file is written after each group, so a run that is
stopped keeps its results. The table at the end is short, because a log may keep only its end.

The exit status is 1 if a check failed, and 0 otherwise. A target that is missed is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.device import child, jobs, report
from tests.device.checks import CORRECTNESS, GROUPS, RATIOS, Group, Setup
from tests.device.targets import ROWS

SECONDS = 345.0  # for everything, so that a run ends within 6 minutes
RESULTS, LOGS = "device.json", "logs.txt"  # some machines give only a few files back


class Run:
    """A run of some groups and its results so far."""

    def __init__(
        self,
        groups: list[Group],
        setup: Setup,
        out: Path,
        seconds: float,
        began: float | None = None,
    ) -> None:
        self.groups, self.setup, self.out = groups, setup, out
        self._began = time.monotonic() if began is None else began
        self._end = self._began + seconds
        (out / LOGS).unlink(missing_ok=True)
        self.results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(setup),
            "seconds": 0.0,
            "complete": False,
            "targets": {key: row.bound for key, row in ROWS.items()},
            "groups": [],
        }

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def in_this_process(self) -> None:
        """Run all groups here, one after the other, until no time is left."""
        for group in self.groups:
            start, events, note = time.monotonic(), self.setup.folder / f"{group.name}.events", ""
            if self.left() > 0:
                checks = group.checks(small=self.setup.small)
                child.run_checks(checks, self.setup, events, self.left)
                waiting = len(checks) - len(child.results(events))
                note = f"cut: no time left for {waiting} of {len(checks)} checks" if waiting else ""
            else:
                note = jobs.NOT_RUN
            self.keep(jobs.group_results(group, events, time.monotonic() - start, note))

    def in_processes(self) -> None:
        """Run the groups of correctness side by side, then the ratios one after the other."""
        made = [jobs.Job(g, self.setup, environment_of(self.setup, g)) for g in self.groups]
        jobs.side_by_side([j for j in made if j.group.kind == CORRECTNESS], self.left, self.ended)
        jobs.in_turn([j for j in made if j.group.kind == RATIOS], self.left, self.ended)

    def ended(self, job: jobs.Job) -> None:
        """Take the results of a group; keep its log."""
        if job.log.exists():
            with (self.out / LOGS).open("ab") as logs:
                logs.write(f"\n===== {job.group.name} =====\n".encode() + job.log.read_bytes())
        self.keep(job.results())

    def keep(self, group: dict[str, Any]) -> None:
        """Add the results of a group, print its line and write the file."""
        for check in group["checks"]:
            check["figures"] = [report.judged(f, self.setup.small) for f in check["figures"]]
        self.results["groups"].append(group)
        order = [known.name for known in self.groups]
        self.results["groups"].sort(key=lambda one: order.index(one["group"]))
        self.save()
        outcomes = [check["outcome"] for check in group["checks"]]
        numbers = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes))
        print(f"{group['group']:16s} {group['seconds']:6.1f} s  {numbers or group['note']}"
              f"{self._left_text()}", flush=True)  # fmt: skip

    def _left_text(self) -> str:
        return f"  ({self.left():.0f} s left)" if math.isfinite(self.left()) else ""

    def save(self, *, complete: bool = False) -> None:
        """Write the JSON file."""
        self.results["seconds"] = round(time.monotonic() - self._began, 1)
        self.results["complete"] = complete
        report.save(self.results, self.out / RESULTS)


def environment_of(setup: Setup, group: Group) -> dict[str, str]:
    """Return what the processes of a group have beyond the environment of this one."""
    environment = {
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # repeated runs give the same bits
        "TORCHINDUCTOR_CACHE_DIR": str(setup.folder / "inductor"),  # groups share compiled code
        "TRITON_CACHE_DIR": str(setup.folder / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if group.kind == CORRECTNESS:  # more than twenty processes share the cores
        environment |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "6"}
    return {name: value for name, value in environment.items() if name not in os.environ}


def machine(setup: Setup) -> dict[str, Any]:
    """Return the machine and the versions for the JSON file."""
    from tests.benchmarks.machine import facts

    return {**facts(setup.device), "small": setup.small}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m tests.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [group.name for group in GROUPS]
    made.add_argument("--cpu", action="store_true", help="tiny models on the CPU, one process")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="keeps device.json and the logs")
    made.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="run these groups")
    made.add_argument("--list", action="store_true", help="print the groups and stop")
    made.add_argument(
        "--seconds",
        type=float,
        help="time for everything; with --cpu, a check that has started is not stopped (default: "
        f"{SECONDS:.0f}, or no limit with --cpu)",
    )
    made.add_argument("--page", type=Path, metavar="JSON", help="print a section for the page")
    return made


def main(arguments: list[str] | None = None, began: float | None = None) -> int:
    """Run the command line; return the exit status. The time counts from ``began``, or from now."""
    args = parser().parse_args(arguments)
    if args.list:
        for group in GROUPS:
            print(f"{group.name:16s} {group.kind:11s} {group.seconds:4.0f} s  {group.about}")
        return 0
    if args.page:
        try:
            results = json.loads(args.page.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"tests.device: {args.page} is no file of results: {error}", file=sys.stderr)
            return 2
        print(report.page(results))
        return 0
    if not args.cpu and not _has_gpu():
        print(
            "tests.device: PyTorch finds no GPU on this machine. Run it on a machine with a CUDA "
            "device, or with --cpu, which runs the same checks with tiny models.",
            file=sys.stderr,
        )
        return 2
    groups = [group for group in GROUPS if args.only is None or group.name in args.only]
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            earlier = signal.signal(signal.SIGTERM, _terminated)
            stack.callback(signal.signal, signal.SIGTERM, earlier)
        temporary = tempfile.TemporaryDirectory(  # a compiler that is killed can still write
            prefix="openvclip-device-", ignore_cleanup_errors=True
        )
        folder = Path(stack.enter_context(temporary))
        out = args.out or folder
        out.mkdir(parents=True, exist_ok=True)
        setup = Setup("cpu" if args.cpu else "cuda", folder, small=args.cpu)
        default = math.inf if args.cpu else SECONDS
        run = Run(groups, setup, out, default if args.seconds is None else args.seconds, began)
        print(report.describe(run.results["machine"]), flush=True)
        try:
            run.in_this_process() if args.cpu else run.in_processes()
        finally:
            run.save(complete=len(run.results["groups"]) == len(groups))
            print("\n" + report.screen(run.results), flush=True)
            if args.out:
                print(f"\n{out / RESULTS}", flush=True)
    return 1 if report.failures(run.results) else 0


def _terminated(number: int, frame: object) -> None:
    """Leave by an exception, so that the groups end and their results are written."""
    raise SystemExit(128 + number)


def _has_gpu() -> bool:
    """Ask a process of its own, so that this one never uses the device."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
