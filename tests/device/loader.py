"""Clips a second from a DataLoader whose processes decode videos, beside other decoders."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openvclip.video import Sampling, VideoDataset, transforms
from tests.device.checks import Checks, Figure, Setup, Skip

CHECKS = Checks()
FILES, SECONDS, FPS, SIZE = 16, 10, 30, (340, 256)  # clips as those of Kinetics-400
FRAMES, EVERY = 8, 16
PROCESSES, BATCH, CLIPS = 12, 8, 384


def write_film(path: Path, seconds: int, size: tuple[int, int]) -> None:
    """Write an H.264 video of coarse noise that moves."""
    av: Any = importlib.import_module("av")
    width, height = size
    numbers = np.random.default_rng(int(path.stem))
    coarse = numbers.integers(0, 255, (height // 16 + 40, width // 16 + 40, 3), dtype=np.uint8)
    large = coarse.repeat(16, axis=0).repeat(16, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            step = number % 300
            picture = np.ascontiguousarray(large[step : step + height, step : step + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@functools.cache
def films(setup: Setup) -> list[str]:
    """Return the videos of a run."""
    if importlib.util.find_spec("av") is None:
        raise Skip("PyAV is not installed")
    folder = setup.folder / "films"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.mp4" for number in range(2 if setup.small else FILES)]
    about = (1, (64, 48)) if setup.small else (SECONDS, SIZE)
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda path: write_film(path, *about), paths))
    return [str(path) for path in paths]


class OtherDecoder(Dataset[tuple[Tensor, int]]):
    """The same clips and transform as :class:`VideoDataset`, read by another library."""

    def __init__(self, paths: list[str], read: Callable[[str, list[int]], Tensor]) -> None:
        self.paths, self.read = paths, read
        self.transform = transforms.build("train")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        span = (FRAMES - 1) * EVERY + 1
        start = int(torch.randint(0, SECONDS * FPS - span, ()))
        frames = list(range(start, start + span, EVERY))
        return self.transform(self.read(self.paths[index], frames)), 0


def by_decord(path: str, frames: list[int]) -> Tensor:
    """Read frames ``[T, C, H, W]`` with decord2."""
    decord: Any = importlib.import_module("decord")
    pictures = decord.VideoReader(path, num_threads=1).get_batch(frames).asnumpy()
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def by_torchcodec(path: str, frames: list[int]) -> Tensor:
    """Read frames ``[T, C, H, W]`` with torchcodec."""
    decoders: Any = importlib.import_module("torchcodec.decoders")
    data: Tensor = decoders.VideoDecoder(path, num_ffmpeg_threads=1).get_frames_at(frames).data
    return data


OTHERS = {"decord2": ("decord", by_decord), "torchcodec": ("torchcodec", by_torchcodec)}


@CHECKS.add("openvclip", *OTHERS, small=1)
def clips_a_second(setup: Setup, reader: str) -> Iterator[Figure]:
    """A pass over the clips by 12 processes that have started before."""
    if reader in OTHERS and importlib.util.find_spec(OTHERS[reader][0]) is None:
        raise Skip(f"{reader} is not installed")
    paths = films(setup)
    repeated = paths * (1 if setup.small else CLIPS // len(paths))
    dataset: Dataset[Any]
    if reader in OTHERS:
        dataset = OtherDecoder(repeated, OTHERS[reader][1])
    else:
        sampling = Sampling(FRAMES, 1 if setup.small else EVERY, sampler="dense")
        samples = [(path, 0) for path in repeated]
        dataset = VideoDataset(samples, transform=transforms.build("train"), sampling=sampling)
    processes = 0 if setup.small else PROCESSES
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=BATCH, num_workers=processes, persistent_workers=processes > 0
    )
    for _ in range(1 if setup.small else 2):  # the first pass starts the processes
        start, clips = time.perf_counter(), 0
        for video, _ in loader:
            clips += len(video)
        seconds = time.perf_counter() - start
    assert clips == len(repeated)
    yield Figure("loader", reader, clips / seconds / max(1, processes))
    yield Figure("loader_rate", reader, clips / seconds)
