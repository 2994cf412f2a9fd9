"""Time the search of a million windows, beside faiss and LanceDB.

    python -m tests.benchmarks.search
    python -m tests.benchmarks.search --only mapped

Each variant runs in its own process, and the processes take turns. All of them return the 10 best
results of one query. *moments* and *mapped* are openvclip: the time includes the choice of moments.
*product* and *read* choose no results: *product* computes all scores in half precision, and *read*
is the time that the memory needs to deliver the vectors once.
The vectors are random: each video has a direction, and its windows lie around it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from openvclip.evaluation import markdown_table
from openvclip.search.moments import find_moments
from openvclip.search.scoring import unit_vectors
from tests.benchmarks.machine import machine, resident_megabytes
from tests.benchmarks.turns import serve, time_variants_in_turn

WINDOWS = 500  # of a video
BLOCK = 250_000  # rows of a shard
VARIANTS = {
    "openvclip": "moments",
    "openvclip, memory-mapped": "mapped",
    "faiss, flat": "flat",
    "faiss, fp16 quantizer": "fp16",
    "LanceDB": "lance",
    "PyTorch, product alone": "product",
    "reading the vectors": "read",
}
NEEDS = {"flat": "faiss", "fp16": "faiss", "lance": "lancedb"}


class Rows(NamedTuple):
    """A block of vectors."""

    first_row: int
    vectors: Any
    live: None = None


@dataclass
class Library:
    """The windows that are searched."""

    blocks: list[Rows]
    paths: list[str]
    video: Any
    start: Any
    end: Any


def write_vectors(folder: Path, rows: int, width: int) -> None:
    """Write the vectors as shards of raw float16, and a query."""
    generator = torch.Generator().manual_seed(0)
    for number, first in enumerate(range(0, rows, BLOCK)):
        count = min(BLOCK, rows - first)
        videos = torch.randn(-(-count // WINDOWS), 1, width, generator=generator)
        shard = videos + torch.randn(len(videos), WINDOWS, width, generator=generator)
        shard = torch.nn.functional.normalize(shard.flatten(0, 1)[:count], dim=1).half()
        shard.numpy().tofile(folder / f"{number:03d}.f16")
    query = shard[:1].float() + 0.03 * torch.randn(1, width, generator=generator)
    np.save(folder / "query.npy", unit_vectors(query))


def shards(folder: Path, mapped: bool) -> list[Any]:
    """The vectors of each shard, in memory or memory-mapped."""
    width = np.load(folder / "query.npy").shape[1]
    files = sorted(folder.glob("*.f16"))
    if mapped:
        return [np.memmap(f, np.float16, "r").reshape(-1, width).view(np.ndarray) for f in files]
    return [np.fromfile(f, np.float16).reshape(-1, width) for f in files]


def library(parts: list[Any]) -> Library:
    """An index of videos in memory."""
    blocks, first = [], 0
    for part in parts:
        blocks.append(Rows(first, part))
        first += len(part)
    video = (np.arange(first) // WINDOWS).astype(np.int32)
    start = (np.arange(first) % WINDOWS) * 2.0
    paths = [f"{i:06d}.mp4" for i in range(first // WINDOWS + 1)]
    return Library(blocks, paths, video, start, start + 4.0)


def searcher(case: str) -> Callable[[], Any]:
    """Return the function that is timed."""
    kind, name = case.split(":", 1)
    folder = Path(name)
    query = np.load(folder / "query.npy")
    if kind in ("moments", "mapped"):
        content = library(shards(folder, kind == "mapped"))
        return lambda: find_moments(content, [query], 10)
    if kind == "product":
        parts, half = shards(folder, mapped=False), torch.from_numpy(query).half()
        return lambda: [half @ torch.from_numpy(part).T for part in parts]
    if kind == "read":
        # The largest of the bytes read as float32: the cheapest pass that PyTorch has.
        parts = [torch.from_numpy(part).view(torch.float32) for part in shards(folder, False)]
        return lambda: [part.amax() for part in parts]
    if kind == "lance":
        import lancedb

        table = lancedb.connect(folder / "lance").open_table("windows")
        return lambda: table.search(query[0]).distance_type("dot").limit(10).to_arrow()
    import faiss

    width = query.shape[1]
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    else:
        quantizer = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(width, quantizer, faiss.METRIC_INNER_PRODUCT)
    for part in shards(folder, mapped=True):
        for begin in range(0, len(part), 10_000):
            rows = part[begin : begin + 10_000].astype(np.float32)
            if not index.is_trained:
                index.train(rows)
            index.add(rows)
    return lambda: index.search(query, 10)


def write_lance(folder: Path) -> None:
    """Write a table of LanceDB with the vectors in float16."""
    import lancedb
    import pyarrow as pa

    parts = shards(folder, mapped=True)
    width = parts[0].shape[1]
    schema = pa.schema([pa.field("vector", pa.list_(pa.float16(), width))])

    def batches() -> Any:
        for part in parts:
            for begin in range(0, len(part), 50_000):
                rows = part[begin : begin + 50_000]
                values = pa.array(rows.reshape(-1), pa.float16())
                column = pa.FixedSizeListArray.from_arrays(values, width)
                yield pa.RecordBatch.from_arrays([column], schema=schema)

    lancedb.connect(folder / "lance").create_table("windows", batches(), schema=schema)


def compare(folder: Path, rounds: int, names: list[str]) -> None:
    """Print the times of all variants, and their ratios."""
    if "LanceDB" in names:
        write_lance(folder)
    cases = {name: f"{VARIANTS[name]}:{folder}" for name in names}
    times = time_variants_in_turn("tests.benchmarks.search", cases, rounds)
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times["openvclip"], strict=True)]
        middle = statistics.median(times[name])
        rows.append([name, f"{middle:.3f}", f"{min(times[name]):.3f}", _ratio(ratios)])
    print(markdown_table(["10 results", "median s", "fastest s", "to openvclip"], rows))


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}"


def mapped(folder: Path) -> dict[str, float]:
    """Time the searches of a new process that maps the files, and measure its own memory."""
    find_moments(library([np.eye(8, dtype=np.float16)]), [np.eye(8, dtype=np.float32)[:1]], 1)
    before = resident_megabytes("RssAnon")
    search, times = searcher(f"mapped:{folder}"), []
    for _ in range(5):
        start = time.perf_counter()
        search()
        times.append(time.perf_counter() - start)
    own = resident_megabytes("RssAnon")
    return {"first": times[0], "later": min(times[1:]), "own": own, "more": own - before}


def report_mapped(folder: Path, rounds: int) -> None:
    """Print the times and the memory of new processes that map the files."""
    results = []
    for _ in range(rounds):
        command = [sys.executable, "-m", "tests.benchmarks.search", "--map", str(folder)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    middle = {key: statistics.median(r[key] for r in results) for key in results[0]}
    row = [f"{middle['first']:.3f}", f"{middle['later']:.3f}"]
    row += [f"{middle['own']:.0f}", f"{middle['more']:.0f}"]
    titles = ["first search s", "later s", "own memory MB", "of it for the search MB"]
    print(markdown_table(titles, [row]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of windows")
    parser.add_argument("--width", type=int, default=512, help="numbers of a vector")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("compare", "mapped"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--map", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(searcher(args.serve))
        return
    if args.map:
        print(json.dumps(mapped(args.map)))
        return
    names = [name for name, kind in VARIANTS.items() if _is_installed(NEEDS.get(kind, "torch"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder, args.rows, args.width)
        print(f"{machine()}; {args.rows} windows of {args.width} numbers\n")
        if args.only != "mapped":
            compare(folder, args.rounds, names)
        if args.only != "compare":
            report_mapped(folder, min(args.rounds, 5))


def _is_installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


if __name__ == "__main__":
    main()
