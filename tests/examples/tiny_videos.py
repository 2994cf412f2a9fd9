"""Small videos of noise, their lists, and the command that trains on them."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import numpy as np

from examples.shapes.clips import write_clip
from examples.shapes.model import MODEL_NAME, WEIGHTS

CLASSES = ("star sliding", "heart resting", "cross turning")
MODEL = WEIGHTS.parents[1] / f"{MODEL_NAME}.json"


def write_videos(folder: Path, number: int) -> None:
    """``0.mp4`` and so on, in ``train.csv`` with classes 0 and 1 in turn; ``classes.txt``."""
    rng = np.random.default_rng(0)
    with (folder / "train.csv").open("w", newline="") as file:
        for index in range(number):
            video = rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
            write_clip(folder / f"{index}.mp4", video)
            csv.writer(file).writerow([f"{index}.mp4", index % 2])
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def write_shards(folder: Path, videos: int, shards: int) -> str:
    """The videos of :func:`write_videos` in tar files; returns their pattern."""
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard:03d}.tar", "w") as archive:
            for index in range(shard, videos, shards):
                label = folder / f"{index}.cls"
                label.write_text(CLASSES[index % 2] if index % 3 else str(index % 2))
                archive.add(folder / f"{index}.mp4", f"{index}.mp4")
                archive.add(label, f"{index}.cls")
    return str(folder / f"part-{{000..{shards - 1:03d}}}.tar")


def model_flags() -> list[str]:
    """The tiny CLIP of the shapes world."""
    return ["--model", f"{MODEL}", "--pretrained", f"{WEIGHTS}"]


def command(folder: Path, out: str, *more: str, files: bool = True) -> list[str]:
    """Arguments of a run of 6 steps in 3 epochs: 2 videos at a time, 4 in a step."""
    data = ["--annotations", f"{folder / 'train.csv'}", "--videos", f"{folder}"] if files else []
    return [
        *(*(() if "--hf" in more else model_flags()), "--device", "cpu", *data),
        *("--classes", f"{folder / 'classes.txt'}", "--out", f"{folder / out}"),
        *("--num-workers", "0", "--epochs", "3", "--warmup-epochs", "1"),
        *("--batch-size", "4", "--per-device-batch", "2", "--frames", "3", "--sampling-rate", "3"),
        *("--lr", "1e-3", "--log-every", "1"),
        *more,
    ]
