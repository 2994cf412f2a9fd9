r"""Compute the vectors of the windows of many videos with Ray Data, on one machine or a cluster.

    python embed_with_ray.py videos/ --model runs/b16 --out vectors --workers 2

``--out`` is a folder of Parquet files, or a URL such as ``s3://bucket/vectors``. A row is a window
of a few seconds: ``path``, ``start`` and ``end`` in seconds, ``vector`` of unit length, ``error``.
A video that can't be read has one row, with a reason in ``error`` and NaN in place of numbers.

Each worker is a process that loads the model once. It gets a GPU if the machine has one. For a
cluster, start ``ray start`` on the machines and give ``--address auto``; the model and the videos
must then be on a disk that all machines share, or be names and URLs.

Install: ``pip install "openvclip[video]" "ray[data]"``.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as parquet
import ray
import ray.data
import torch

from openvclip.search import VideoEmbedder, WindowOptions
from openvclip.search.inputs import named_videos, whole_name
from openvclip.search.recorded import whole_path


def embed(
    videos: list[str], out: str, embedder: dict[str, Any], workers: int, batch: int
) -> dict[str, str]:
    """Write the vectors of videos to Parquet files, and return the reason of each failure."""
    rows = ray.data.from_items([{"path": path} for path in videos])
    vectors = rows.map_batches(
        VideoEmbedder,  # Ray makes one in each worker
        fn_constructor_kwargs=embedder,
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=batch,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    vectors.write_parquet(out)
    failed = parquet.dataset(out).to_table(["path", "error"], filter=pc.field("error") != "")
    return dict(zip(*failed.to_pydict().values(), strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and embed the videos."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", help="files, folders, patterns or URLs")
    parser.add_argument("--model", required=True, help="folder of a model, or a name on the Hub")
    parser.add_argument("--pretrained", help="weights, with a name of open_clip as the model")
    parser.add_argument("--out", required=True, help="folder for the Parquet files, or a URL")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--batch", type=int, default=8, help="videos at a time (default: 8)")
    parser.add_argument(
        "--seconds", type=float, help="length of a window (default: that of the model's clips)"
    )
    parser.add_argument("--address", help="address of a Ray cluster (default: this machine)")
    args = parser.parse_args(arguments)
    # The workers have other working folders, so all paths become absolute.
    videos, failed = named_videos(args.videos)
    settings = {
        "model": whole_path(args.model),
        "pretrained": None if args.pretrained is None else whole_path(args.pretrained),
        "windows": WindowOptions(seconds=args.seconds),
    }
    if videos:
        ray.init(address=args.address, include_dashboard=False if args.address is None else None)
        failed |= embed(videos, whole_name(args.out), settings, args.workers, args.batch)
    for path, reason in failed.items():
        print(f"{path}: {reason}")
    print(f"{len(videos)} videos were read, {len(failed)} failed; the vectors are in {args.out}.")


if __name__ == "__main__":
    main()
