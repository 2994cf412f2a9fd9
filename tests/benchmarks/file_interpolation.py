"""Measure time and memory of merging files of ViT-L/14's size, beside mergekit, a script and cp.

    python -m tests.benchmarks.file_interpolation --mergekit /opt/mergekit-venv/bin/mergekit-pytorch

The benchmark writes two safetensors files with the entries of open_clip's ViT-L-14 in float32
(1.7 GB each) to a temporary folder. Each program interpolates them in its own process; the programs
run in turn for a number of rounds, and medians are printed. The time of a process includes its
imports. Memory is the largest resident size of the process, including pages of mapped files; the
size of a process that only runs ``import torch`` is printed beside it. All files are in the page
cache. openvclip hashes its inputs and flushes its output to the disk within its time. Of the other
programs, only *cp of one file, flushed* flushes its output. No program that uses PyTorch can be
faster than *import torch*.

The average of 21 files reads two files under 21 names, so its inputs come from the page cache. 21
different files (36 GB) would be read from the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

MAKE = """
import sys, open_clip, torch
from safetensors.torch import save_file
sizes = open_clip.create_model("ViT-L-14", device="meta").state_dict()
for seed, path in enumerate(sys.argv[1:]):
    torch.manual_seed(seed)
    save_file({name: torch.randn(size.shape) for name, size in sizes.items()}, path)
"""
OURS = """
import sys, openvclip
openvclip.interpolate_files(sys.argv[1], sys.argv[2], sys.argv[3], 0.5)
"""
PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
a, b = load_file(sys.argv[1]), load_file(sys.argv[2])
save_file({name: torch.lerp(b[name], a[name], 0.5) for name in b}, sys.argv[3])
"""
AVERAGE = """
import sys, openvclip
openvclip.average_files(sys.argv[2:], sys.argv[1])
"""
MERGEKIT = """
merge_method: linear
models:
  - model: {a}
    parameters: {{weight: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5}}
dtype: float32
"""


def make_files(folder: Path) -> tuple[Path, Path]:
    """Two files with the entries of ViT-L-14 and random values.

    Made in another process: a child's peak begins with the memory of the process that starts it.
    """
    paths = (folder / "a.safetensors", folder / "b.safetensors")
    subprocess.run([sys.executable, "-c", MAKE, *map(str, paths)], check=True)
    return paths


def commands(a: Path, b: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    """What to run for each row of the table."""
    python, files = sys.executable, [str(a), str(b), str(out / "out.safetensors")]
    rows = {"openvclip": [python, "-c", OURS, *files]}
    if mergekit:
        config = a.with_name("config.yml")
        config.write_text(MERGEKIT.format(a=a, b=b))
        base = [mergekit, str(config), str(out / "merged"), "--quiet"]
        rows["mergekit-pytorch"] = base
        rows["mergekit-pytorch, --async-write"] = [*base, "--async-write", "--write-threads", "2"]
    rows["load, lerp, save"] = [python, "-c", PLAIN, *files]
    rows["import torch"] = [python, "-c", "import torch"]
    rows["cp of one file"] = ["cp", files[0], files[2]]
    rows["cp of one file, flushed"] = ["sh", "-c", 'cp "$0" "$1" && sync "$1"', files[0], files[2]]
    return rows


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and megabytes (largest resident size, all pages) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def rounds(rows: dict[str, list[str]], out: Path, count: int) -> dict[str, tuple[float, float]]:
    """Medians of all rows, which are run in turn; the first round warms up."""
    found: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for number in range(count + 1):
        for row, command in rows.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()  # what another wrote is not to be flushed in this one's time
            measured = run(command)
            if number:
                found[row].append(measured)
    return {
        row: (statistics.median(t for t, _ in all_), max(m for _, m in all_))
        for row, all_ in found.items()
    }


def table(found: dict[str, tuple[float, float]], bare: float) -> None:
    """Print the rows as Markdown."""
    first = next(iter(found.values()))[0]
    print("\n| | seconds | openvclip over it | peak MB | above `import torch` |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row, (seconds, peak) in found.items():
        above = f"{peak - bare:.0f}" if peak > bare else ""
        print(f"| {row} | {seconds:.2f} | {first / seconds:.2f} | {peak:.0f} | {above} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mergekit", help="the executable mergekit-pytorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--average", type=int, default=21, help="files to average; 0 for none")
    parser.add_argument("--folder", help="where to make the files (8 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        a, b = make_files(folder)
        out = folder / "out"
        bare = max(run([sys.executable, "-c", "import torch"])[1] for _ in range(2))
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch "
            f"{version('torch')}; files of {a.stat().st_size / 1e9:.2f} GB; median of "
            f"{args.rounds} rounds, peak of all; `import torch` alone: {bare:.0f} MB"
        )
        found = rounds(commands(a, b, out, args.mergekit), out, args.rounds)
        table(found, bare)
        if args.average:
            names = [str((a, b)[k % 2]) for k in range(args.average)]
            files = [sys.executable, "-c", AVERAGE, str(out / "mean.safetensors"), *names]
            table(rounds({f"average of {args.average}": files}, out, 1), bare)


if __name__ == "__main__":
    main()
