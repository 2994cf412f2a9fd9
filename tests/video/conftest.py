"""Videos whose frames show their frame number, so that a test can check which frame was read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import GOLDEN, SHARED

BITS = 9


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: with small tensors on busy cores, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(number: int, width: int, height: int, pixel_format: str) -> np.ndarray:
    """Draw BITS vertical bars; a bar is white if the bit of the number is set."""
    bars = np.array([255 * (number >> bit & 1) for bit in range(BITS)], dtype=np.uint8)
    row = bars[np.minimum(np.arange(width) * BITS // width, BITS - 1)]
    grey = np.broadcast_to(row, (height, width))
    if pixel_format == "gray":
        return np.ascontiguousarray(grey)
    channels = 4 if pixel_format == "rgba" else 3
    picture = np.repeat(grey[..., None], channels, axis=2)
    if channels == 4:
        picture[..., 3] = 128
    return np.ascontiguousarray(picture)


@pytest.fixture(scope="session")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``encode("a.mp4", frames=60, codec=..., ...)`` writes a file and returns its path."""
    av = pytest.importorskip("av")
    root = tmp_path_factory.mktemp("encoded")

    def write(
        name: str,
        *,
        frames: int = 60,
        codec: str = "libx264",
        size: tuple[int, int] = (144, 64),
        pixel_format: str = "yuv420p",
        drawn: str = "rgb24",
        fps: Fraction | int = 30,
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
        times: list[int] | None = None,
        file_format: str | None = None,
    ) -> Path:
        path = root / name
        with av.open(
            str(path), "w", format=file_format, container_options=container_options or {}
        ) as container:
            stream: Any = container.add_stream(codec, rate=fps, options=options or {})
            stream.width, stream.height = size
            stream.pix_fmt = pixel_format
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(draw(number, *size, drawn), format=drawn)
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def numbers() -> Callable[[Any], list[Any]]:
    """Read the number in each frame of a uint8 ``[..., C, H, W]`` video; return nested lists."""

    def read(video: Any) -> list[Any]:
        width = video.shape[-1]
        centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
        bars = video.float().mean((-3, -2))[..., centres] > 127
        weights = bars.new_tensor([2**bit for bit in range(BITS)], dtype=int)
        result: list[Any] = (bars * weights).sum(-1).tolist()
        return result

    return read


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can read too. The folders of pytest have no such permission."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Drop the privileges of root within the block, because root can read every file."""
    if not hasattr(os, "seteuid"):
        pytest.skip("locks a file as POSIX does")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(scope="session")
def clips() -> Path:
    """The folder of real clips, which is not in the repository."""
    folder = SHARED / "data" / "clips"
    if not folder.is_dir():
        pytest.skip("the shared folder with the real clips is not here")
    return folder


@pytest.fixture(scope="session")
def golden_sampling() -> dict[str, Any]:
    """The frames that the released code picks from each real clip."""
    loaded: dict[str, Any] = json.loads((GOLDEN / "released_sampling.json").read_text())
    return loaded
