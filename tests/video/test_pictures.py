"""How a frame becomes a picture: orientation, aspect ratio, dynamic range; and the memory of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openvclip.errors import VideoError
from openvclip.video import VideoDataset, _hdr, _pictures, check_video, read_clip, transforms
from openvclip.video.sliding import sliding_windows
from tests.video.mp4 import with_matrix

Encode = Callable[..., Path]

MATRICES = [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0),
]  # fmt: skip


def moved(picture: torch.Tensor, a: int, b: int, c: int, d: int) -> torch.Tensor:
    """Move each pixel from (x, y) to (a x + c y, b x + d y), with the corner at (0, 0) again."""
    height, width = picture.shape[-2:]
    places = {(a * x + c * y, b * x + d * y): (x, y) for x in range(width) for y in range(height)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    size = (height, width) if a else (width, height)
    result = torch.zeros(*picture.shape[:-2], *size, dtype=picture.dtype)
    for (column, row), (x, y) in places.items():
        result[..., row - top, column - left] = picture[..., y, x]
    return result


def _corner(folder: Path) -> Path:
    """Write a video with a different grey in each quarter."""
    av = pytest.importorskip("av")
    picture = np.zeros((16, 36, 3), np.uint8)
    picture[:8, :18], picture[:8, 18:], picture[8:, :18] = 250, 170, 90
    path = folder / "plain.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 36, 16, "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Report 03 (mpv#16090): all quarter turns and mirrors of the display matrix, as in a player.
@pytest.mark.parametrize("matrix", MATRICES)
def test_orientations(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = _corner(tmp_path)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(with_matrix(path.read_bytes(), *matrix))
    picture = moved(read_clip(path, num_frames=1)[0, 0], *matrix)
    assert torch.equal(read_clip(turned, num_frames=2)[0, 1], picture)
    for scaled in ([0.9999 * x for x in matrix], [2 * x for x in matrix]):
        turned.write_bytes(with_matrix(path.read_bytes(), *scaled))
        assert torch.equal(read_clip(turned, num_frames=1)[0, 0], picture)
    check = check_video(turned)
    assert (check.height, check.width) == picture.shape[-2:]
    window = next(sliding_windows(turned, transform=lambda frame: frame, num_frames=1))
    assert torch.equal(window.clip[0], picture)


# Report 17 (torchcodec#733): pixels are as stored, as in the released code; the docstring says so.
def test_the_sample_aspect_ratio_is_not_applied(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    for suffix in ("mp4", "mkv"):
        path = tmp_path / f"wide.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 72, 58, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
            picture = np.full((58, 72, 3), 128, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        with av.open(str(path)) as container:
            assert container.streams.video[0].sample_aspect_ratio == Fraction(64, 45)
        assert read_clip(path, num_frames=1).shape == (1, 1, 3, 58, 72)
        assert check_video(path).width == 72
    assert "sample aspect ratio" in (read_clip.__doc__ or "")


def pq(nits: float) -> float:
    """The PQ code of a brightness (SMPTE ST 2084)."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _hdr_video(path: Path, curve: str, codes: list[float]) -> None:
    av = pytest.importorskip("av")
    space = "bframes=0:colorprim=bt2020:colormatrix=bt2020nc:range=limited"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=30)
        stream.options = {"x265-params": f"log-level=none:transfer={curve}:{space}"}
        stream.width, stream.height, stream.pix_fmt = 64 * len(codes), 64, "yuv420p10le"
        frame = av.VideoFrame(stream.width, 64, "yuv420p10le")
        for number, plane in enumerate(frame.planes):
            samples = np.full((plane.height, plane.line_size // 2), 512, np.uint16)
            if number == 0:
                samples[:, : stream.width] = np.repeat([round(64 + 876 * x) for x in codes], 64)
            plane.update(samples.tobytes())
        for number in range(4):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# Report 16 (facefusion#401): HDR is shown as on an ordinary screen; white paper is white.
@pytest.mark.parametrize(
    ("curve", "codes"),
    [
        ("smpte2084", [pq(nits) for nits in (0, 50, 203, 1000)]),
        # 203 cd/m2 are 75 % of HLG (ITU-R BT.2408), 50 cd/m2 are 50 % on a screen of 1000
        ("arib-std-b67", [0, 0.5, 0.75, 1]),
    ],
)
def test_hdr(curve: str, codes: list[float], tmp_path: Path) -> None:
    path = tmp_path / "hdr.mp4"
    _hdr_video(path, curve, codes)
    picture = read_clip(path, num_frames=2)[0, 1].float()
    levels = picture[:, 32, 32::64]
    grey = 255 * (50 / 203) ** (1 / 2.4)  # the inverse of the screen's curve of BT.1886
    wanted = torch.tensor([0, grey, 255, 255])
    assert (levels - wanted).abs().max() <= 4, levels
    assert check_video(path).status == "ok"


def test_hdr_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dolby = SimpleNamespace(colorspace=15, color_trc=16)
    with pytest.raises(VideoError, match=r"a\.mp4: is an HDR video.*Dolby Vision, profile 5"):
        _hdr.is_hdr(dolby, "a.mp4")
    path = tmp_path / "hdr.mp4"
    _hdr_video(path, "smpte2084", [0.5] * 4)
    monkeypatch.setattr(_hdr, "_TARGET", "no_such_option=1")
    with pytest.raises(VideoError, match=r"is an HDR video, .* \(pip install -U av\)"):
        read_clip(path)
    assert check_video(path).status == "bad"


# Report 35: frames are transformed one by one, with the same result.
@pytest.mark.parametrize("sampler", ["released", "uniform", "dense"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("released", {"crops": 3}),
        ("clip", {}),
        ("train", {"color_jitter": 0.4}),
    ],
)
def test_transforming_while_reading_changes_nothing(
    name: str, options: dict[str, Any], sampler: str, encode: Encode
) -> None:
    transform = transforms.build(name, 32, **options)
    for path in (encode("while.mp4", frames=90), encode("while.avi", codec="mpeg4", frames=20)):
        reading: dict[str, Any] = {"views": 2, "num_frames": 4, "sampler": sampler}
        generator = torch.Generator().manual_seed(3)
        wanted = transform(read_clip(path, **reading, generator=generator), generator)
        generator = torch.Generator().manual_seed(3)
        given = read_clip(path, **reading, generator=generator, transform=transform)
        assert torch.equal(given, wanted)
        data = VideoDataset([(str(path), 0)], transform=transform, details=True)
        assert data[0].video.shape[-2:] == (32, 32)
    whole = read_clip(path, num_frames=4, transform=lambda clip: clip[:, ::2])
    assert torch.equal(whole, read_clip(path, num_frames=4)[:, ::2])


@pytest.mark.parametrize("name", ["large.mp4", "large.mkv"])
def test_few_large_frames_are_in_memory(
    name: str, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encode(name, frames=90, options={"preset": "ultrafast"})
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = _pictures.Pictures.__call__

    def noting(self: Any, frame: Any) -> Any:
        nonlocal most
        gc.collect(0)
        picture = original(self, frame)
        alive.append(weakref.ref(picture))
        most = max(most, sum(reference() is not None for reference in alive))
        return picture

    monkeypatch.setattr(_pictures.Pictures, "__call__", noting)
    read_clip(path, views=3, num_frames=4, sampling_rate=8, transform=transforms.build("clip", 16))
    assert len(alive) >= 8
    assert most <= 2
