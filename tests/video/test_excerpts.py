"""The pictures that a player shows at some times of a video."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import VideoError, VideoNotFoundError, VideoOptionError
from openvclip.video import excerpts
from openvclip.video.excerpts import pictures_at, stream_facts

FRAMES, FPS = 200, 10
KINDS = {
    "mp4": {"options": {"x264-params": "bframes=3:keyint=15", "preset": "ultrafast"}},
    "mkv": {"options": {"x264-params": "bframes=0:keyint=40", "preset": "ultrafast"}},
    "ts": {"options": {"x264-params": "bframes=2:keyint=20", "preset": "ultrafast"}},
    "avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "B-frames in avi": {"options": {"x264-params": "bframes=3:keyint=12", "preset": "ultrafast"}},
}


@pytest.fixture(scope="module")
def films(encode):
    return {
        kind: encode(
            f"{kind.split()[0]}.{kind.split()[-1]}", frames=FRAMES, fps=Fraction(FPS), **options
        )
        for kind, options in KINDS.items()
    }


def shown(video, times, numbers):
    return [
        numbers(torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1))
        for picture in pictures_at(video, times)
    ]


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@given(data=st.data())
def test_the_frame_displayed_at_each_time(kind, data, films, numbers):
    times = sorted(data.draw(st.lists(st.integers(0, 2400), min_size=1, max_size=4)))
    expected = [min(time * FPS // 100, FRAMES - 1) for time in times]
    # 2 ms before the edge of a frame, the reader's rounding of time stamps has no effect
    assert shown(films[kind], [time / 100 + 0.002 for time in times], numbers) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0.05, 3.95, 11.05, 19.95, 60.0])
def test_every_container(kind, seconds, films, numbers):
    (number,) = shown(films[kind], [seconds], numbers)
    expected = min(math.floor(seconds * FPS), FRAMES - 1)
    assert number == expected


def test_only_the_part_with_the_times_is_decoded(films, monkeypatch):
    count = 0
    frames = excerpts.Stream.frames

    def counted(self):
        nonlocal count
        for frame in frames(self):
            count += 1
            yield frame

    monkeypatch.setattr(excerpts.Stream, "frames", counted)
    list(pictures_at(films["mp4"], [15.0, 15.5]))
    assert count < 40


def test_bytes_and_open_files(films, numbers):
    data = films["mp4"].read_bytes()
    with films["mp4"].open("rb") as file:
        assert shown(data, [9.05], numbers) == shown(file, [9.05], numbers) == [90]


def test_pixels_that_are_not_square(encode, tmp_path):
    import av

    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    (picture,) = pictures_at(path, [0.0])
    assert picture.pixels.shape == (48, 64, 3)
    assert picture.aspect == pytest.approx(2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_facts(kind, films):
    facts = stream_facts(films[kind], measured=True)
    assert {"ts": "mpegts", "mkv": "matroska"}.get(kind, kind.split()[-1]) in facts.container
    assert facts.codec == ("mpeg4" if kind == "avi" else "h264")
    assert facts.pixel_format == "yuv420p"
    assert facts.seconds == pytest.approx(FRAMES / FPS, abs=0.15)
    assert stream_facts(films[kind])[:3] == facts[:3]


@pytest.mark.parametrize("times", [[], [-1.0], [2.0, 1.0], [math.nan], [math.inf]])
def test_wrong_times(times, films):
    with pytest.raises(VideoOptionError, match="ascending order"):
        next(pictures_at(films["mp4"], times))


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(VideoNotFoundError):
        next(pictures_at(tmp_path / "none.mp4", [0.0]))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError):
        next(pictures_at(tmp_path / "text.mp4", [9.0]))
    with pytest.raises(VideoOptionError, match="frames"):
        next(pictures_at(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), [0.0]))
