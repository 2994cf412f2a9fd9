"""Small videos, a tiny model, and what an index of them must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from openvclip import VideoCLIP, expand_temporal_attention
from openvclip.models.features import video_features
from openvclip.search import Index, WindowOptions
from openvclip.video import Sampling, sliding_windows
from tests.helpers import tiny_clip, tiny_tokenizer

WINDOWS = WindowOptions(seconds=1.0)
Content = dict[str, list[tuple[float, float, tuple[float, ...]]]]


def tiny_model(seed: int = 0, **options: Any) -> VideoCLIP:
    """A tiny CLIP over time; 3 frames in a window."""
    settings: dict[str, Any] = {"sampling": Sampling(num_frames=3, views=1), **options}
    return VideoCLIP(expand_temporal_attention(tiny_clip(seed)), tiny_tokenizer, **settings)


def write_video(path: Path, frames: int = 10, seed: int = 0) -> Path:
    """A video of noise, 10 frames per second."""
    av = pytest.importorskip("av")
    numbers = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 16, 12
        for _ in range(frames):
            picture = numbers.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def new_index(folder: Path, model: VideoCLIP | None = None) -> Index:
    return Index.create(folder, model or tiny_model(), windows=WINDOWS)


def content(index: Index) -> Content:
    """The windows of each video in the order of time, read through the public methods."""
    rows: Content = {path: [] for path in index.videos}
    for block in index.blocks():
        live = np.ones(len(block.vectors), bool) if block.live is None else block.live
        numbers = np.flatnonzero(live) + block.first_row
        for window, vector in zip(index.windows(numbers), block.vectors[live], strict=True):
            rows[window.path].append((window.start, window.end, tuple(vector.tolist())))
    return {path: sorted(windows) for path, windows in rows.items()}


def expected_vectors(
    model: VideoCLIP, path: Path, seconds: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times ``[n, 2]`` and unit vectors of a video, one window after the other."""
    times, rows = [], []
    for start, end, clip in sliding_windows(
        path, transform=model.transform, num_frames=3, seconds=seconds
    ):
        with torch.no_grad():
            feature = video_features(model.model, clip[None])[0].double()
        times.append((start, end))
        rows.append(functional.normalize(feature, dim=0).numpy())
    return np.array(times), np.array(rows)


def assert_holds(index: Index, model: VideoCLIP, paths: list[Path]) -> None:
    """The index holds exactly the windows of these videos."""
    found = content(index)
    assert sorted(found) == sorted(map(str, paths))
    for path in paths:
        times, vectors = expected_vectors(model, path)
        windows = found[str(path)]
        np.testing.assert_allclose([w[:2] for w in windows], times)
        np.testing.assert_allclose([w[2] for w in windows], vectors, atol=1e-3)
    assert len(index) == sum(map(len, found.values()))
