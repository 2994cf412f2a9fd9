"""Measure how an evaluation's time splits into reading clips, copying them and encoding them.

    python -m tests.benchmarks.evaluation_overhead --clips ../shared/data/clips

The model has random weights, which does not change the time. Without workers, reading and encoding
run one after the other, so *decode* is the whole time of reading. With workers, *decode* is the
time for which the encoder waited. Workers use the same cores as the encoder, which lowers the clips
per second.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import open_clip
import torch

import openvclip
from openvclip.evaluation import BatchOptions, Records, encode_videos, markdown_table
from openvclip.models.preprocess import transform_for
from openvclip.video import Sampling, VideoDataset, find_videos


def shares(model: Any, args: argparse.Namespace, num_workers: int, views: int) -> list[str]:
    """Clips a second, and the parts of the time."""
    paths = find_videos(args.clips)[: args.n]
    dataset = VideoDataset(
        [(path, 0) for path in paths],
        args.clips,
        transform=transform_for(model),
        sampling=Sampling(views=views),
        details=True,
    )
    options = BatchOptions(batch_size=args.batch_size, num_workers=num_workers)
    timing = encode_videos(model, dataset, Records(None, {}), options=options)
    return [f"{timing.clips_per_second:.2f}", *(f"{part:.1%}" for part in timing.shares().values())]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=Path, required=True, help="a folder of videos")
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--n", type=int, default=8, help="clips to read")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--views", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    model = openvclip.expand_temporal_attention(open_clip.create_model(args.model)).eval()
    with torch.no_grad():
        openvclip.encode_video(model, torch.zeros(1, 8, 3, 224, 224))  # kernels are chosen once
    rows = [
        [f"{views} x 8 frames, {workers} workers", *shares(model, args, workers, views)]
        for views in args.views
        for workers in args.num_workers
    ]
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}; {args.model}, {args.n} clips, batches of {args.batch_size}\n"
    )
    print(markdown_table(["", "clips/s", "decode", "copy", "encode", "other"], rows))


if __name__ == "__main__":
    main()
