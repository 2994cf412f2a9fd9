"""Small videos of which every frame shows its time, and moments of them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

FPS = 10


def grey_at(seconds: float) -> int:
    """The grey of the frame that is displayed at a time: 10 for each second, from 20 on."""
    return 20 + 10 * int(seconds)


def write_film(
    path: Path,
    seconds: int = 12,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    ratio: Fraction = Fraction(1),
) -> Path:
    """A video whose frames are plain, and brighter in each second."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"preset": "ultrafast", "g": "15"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for number in range(seconds * FPS):
            picture = np.full((size[1], size[0], 3), grey_at(number / FPS), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path
