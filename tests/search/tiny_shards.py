"""A tiny model in a folder, videos of noise, and tar shards of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.nn import functional

from examples.shapes.clips import write_clip
from openvclip import VideoCLIP
from openvclip.models.features import video_features
from openvclip.search.windows import WindowSettings
from openvclip.video import VideoSource, sliding_windows
from tests.models.stored_models import PLAIN, of_open_clip


def tiny_model(seed: float = 0.0) -> VideoCLIP:
    """A model whose windows are 0.64 seconds long. Other seeds have other weights."""
    torch.manual_seed(0)
    stored = of_open_clip(PLAIN)
    with torch.no_grad():
        stored.model.visual.proj += seed
    return VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)


def save_model(folder: Path, seed: float = 0.0) -> str:
    tiny_model(seed).save_pretrained(folder)
    return str(folder)


@cache
def video(number: int, frames: int = 12) -> bytes:
    """A video of noise, 8 frames a second."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_clip(path, pixels)
        return path.read_bytes()


def tar_of(files: Mapping[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """A tar file. A list can hold a name twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@torch.no_grad()
def slow_windows(model: VideoCLIP, source: VideoSource) -> tuple[np.ndarray, np.ndarray]:
    """Times ``[n, 2]`` and float64 vectors ``[n, D]`` of the windows, one after the other."""
    frames = model.sampling
    seconds = frames.num_frames * frames.sampling_rate / frames.target_fps
    times, rows = [], []
    for window in sliding_windows(
        source,
        transform=model.transform.with_(crops=1),
        num_frames=frames.num_frames,
        seconds=seconds,
    ):
        feature = video_features(model.model, window.clip[None], model.pooling)[0].double()
        times.append((window.start, window.end))
        rows.append(functional.normalize(feature, dim=-1).numpy())
    return np.array(times), np.array(rows)


def settings_of(model: VideoCLIP) -> WindowSettings:
    frames = model.sampling
    seconds = frames.num_frames * frames.sampling_rate / frames.target_fps
    return WindowSettings(seconds, seconds / 2, frames.num_frames)
