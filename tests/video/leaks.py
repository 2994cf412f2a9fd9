"""Print memory and open files of a ``DataLoader`` worker that reads many clips.

``python -m tests.video.leaks VIDEO CLIPS`` prints them every tenth of the way, as JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from openvclip.video import Sampling, VideoDataset, transforms


class Watched(Dataset[Any]):
    """Clips of a data set, each with the memory and open files of the process that read it."""

    def __init__(self, data: VideoDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[bool, int, int]:
        error = bool(self.data[index][3])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        kib = pages * os.sysconf("SC_PAGE_SIZE") // 1024
        return error, kib, len(os.listdir("/proc/self/fd"))


def main(video: Path, clips: int) -> None:
    torch.set_num_threads(1)
    broken = video.with_name("broken.mp4")
    broken.write_bytes(video.read_bytes()[:300])
    # one clip of ten cannot be read, to detect leaks after errors
    samples = [(broken.name if index % 10 == 9 else video.name, 0) for index in range(clips)]
    data = VideoDataset(
        samples,
        video.parent,
        transform=transforms.build("train", 32, color_jitter=0.4),
        sampling=Sampling(num_frames=4, sampling_rate=2, sampler="dense"),
        details=True,
    )
    loader = DataLoader(Watched(data), batch_size=None, num_workers=1)
    errors = 0
    for number, (error, kib, files) in enumerate(loader, 1):
        errors += error
        if number % (clips // 10) == 0:
            line = {"clips": number, "errors": errors, "kib": kib, "files": files}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
