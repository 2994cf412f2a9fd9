"""Measure the making of an index: the time beside the encoder's, and the memory of a long video.

    python -m tests.benchmarks.indexing time --clips ../shared/data/clips
    python -m tests.benchmarks.indexing memory --minutes 5 30 120

``time`` compares the whole run of ``Index.add`` with the encoder. PyTorch uses one thread, so the
encoder's processor time is that of the thread that calls it. The processor time of the whole run
is that of all threads; it changes less with other work on the machine than the time on the clock.
The weights are random, which does not change the time.

``memory`` makes videos of some lengths, and prints by how much the resident size of a process grows
while it indexes one of them with a tiny model, over its size after a video of one minute.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from openvclip import VideoCLIP, expand_temporal_attention
from openvclip.evaluation import markdown_table
from openvclip.search import Index
from openvclip.video import find_videos
from tests.benchmarks.machine import EXACT_MALLOC, forget_peak, machine, resident_megabytes
from tests.helpers import tiny_tokenizer
from tests.search.small_index import tiny_model


def compare_time(args: argparse.Namespace) -> None:
    """Print the time of an index and of the encoder."""
    torch.set_num_threads(1)
    model = VideoCLIP(expand_temporal_attention(open_clip.create_model(args.model)), tiny_tokenizer)
    encode, parts = model.encode_clips, list[tuple[float, float]]()

    def timed(clips: Tensor) -> Tensor:
        clock, processor = time.perf_counter(), time.thread_time()
        features = encode(clips)
        parts.append((time.perf_counter() - clock, time.thread_time() - processor))
        return features

    model.encode_clips = timed  # type: ignore[method-assign]
    encode(torch.zeros(args.batch_size, 8, 3, 224, 224))  # kernels are chosen once
    paths = [args.clips / path for path in find_videos(args.clips)[: args.n]]
    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "x.ovx", model)
        clock, processor = time.perf_counter(), time.process_time()
        index.add(paths, batch_size=args.batch_size, num_threads=args.num_threads)
        whole = time.perf_counter() - clock, time.process_time() - processor
        content = f"{len(index.videos)} videos, {len(index)} windows"
    rows = []
    for name, place in (("clock", 0), ("processor", 1)):
        encoder = sum(part[place] for part in parts)
        share = 1 - encoder / whole[place]
        rows.append([name, f"{whole[place]:.1f} s", f"{encoder:.1f} s", f"{share:.1%}"])
    print(f"{machine()}; {args.model}, {content}, batches of {args.batch_size}\n")
    print(markdown_table(["", "index", "encoder", "all but the encoder"], rows))


def compare_memory(args: argparse.Namespace) -> None:
    """Print the growth of the memory for videos of some lengths."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for minutes in args.minutes:
            command = [sys.executable, "-m", "tests.benchmarks.indexing", "grow", str(minutes)]
            done = subprocess.run(
                [*command, folder],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | EXACT_MALLOC,
            )
            rows.append([f"{minutes} minutes", *done.stdout.split()])
    print(f"{machine()}\n")
    print(markdown_table(["video", "windows", "growth (MB)", "seconds"], rows))


def grow(minutes: int, folder: Path) -> None:
    """Print the windows, the growth of the resident size in megabytes, and the seconds."""
    index = Index.create(folder / f"{minutes}.ovx", tiny_model())
    for name, length in (("short", 1), ("long", minutes)):
        path = folder / f"{minutes}-{name}.mp4"
        write_long_video(path, length)
        if name == "short":
            index.add(path)
            forget_peak()
            before = resident_megabytes("VmRSS")
    start = time.perf_counter()
    index.add(path)
    grown = resident_megabytes("VmHWM") - before
    print(len(index), f"{grown:.1f}", f"{time.perf_counter() - start:.1f}")


def write_long_video(path: Path, minutes: int) -> None:
    """A video of 160 x 120 pixels, 10 frames per second, in which a square moves."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.gop_size = 160, 120, 100
        picture = np.zeros((120, 160, 3), dtype=np.uint8)
        for number in range(600 * minutes):
            if number % 5 == 0:
                picture[:] = number // 5 % 200
                picture[40:80, number // 5 % 120 : number // 5 % 120 + 40] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    timed = parts.add_parser("time")
    timed.add_argument("--clips", type=Path, required=True, help="a folder of videos")
    timed.add_argument("--n", type=int, default=20, help="number of videos")
    timed.add_argument("--model", default="ViT-B-32-quickgelu")
    timed.add_argument("--batch-size", type=int, default=16)
    timed.add_argument("--num-threads", type=int)
    memory = parts.add_parser("memory")
    memory.add_argument("--minutes", type=int, nargs="+", default=[5, 30, 120])
    one = parts.add_parser("grow")
    one.add_argument("minutes", type=int)
    one.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.part == "time":
        compare_time(args)
    elif args.part == "memory":
        compare_memory(args)
    else:
        grow(args.minutes, args.folder)


if __name__ == "__main__":
    main()
