"""Parts of videos: each frame and the sound at the right time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvclip.errors import VideoError, VideoNotFoundError, VideoOptionError
from openvclip.video import VideoFrames
from openvclip.video.cutting import cut_video, part_name

av = pytest.importorskip("av")
RATE = 16_000
BEGIN = 2.0  # seconds; a tone begins here


def write_numbered(
    path: Path, fps: int = 10, count: int = 40, *, sound: bool = True, begin: int = 0
) -> Path:
    """A video whose frame i shows the bits of i, with key frames far from each other.

    The first time stamp in the container is ``begin``, in seconds.
    """
    with av.open(str(path), "w", options={"output_ts_offset": str(begin)}) as output:
        video = output.add_stream("mpeg4", rate=fps, options={"g": "100", "qscale": "1"})
        video.width, video.height, video.pix_fmt = 96, 16, "yuv420p"
        audio: Any = output.add_stream("aac", rate=RATE, layout="stereo") if sound else None
        for number in range(count):
            bits = [255 * (number >> bit & 1) for bit in range(6)]
            pixels = np.broadcast_to(np.repeat(bits, 16)[None, :, None], (16, 96, 3))
            pixels = np.ascontiguousarray(pixels, np.uint8)
            output.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(video.encode())
        if sound:
            times = np.arange(count * RATE // fps) / RATE
            tone = 0.5 * np.sin(2 * np.pi * 440 * times) * (times >= BEGIN)
            samples = np.repeat(tone[None], 2, axis=0).astype(np.float32)
            for begin in range(0, samples.shape[1], 1024):
                part = np.ascontiguousarray(samples[:, begin : begin + 1024])
                frame = av.AudioFrame.from_ndarray(part, "fltp", "stereo")
                frame.sample_rate, frame.pts, frame.time_base = RATE, begin, Fraction(1, RATE)
                output.mux(audio.encode(frame))
            output.mux(audio.encode())
    return path


def numbers(path: Path) -> list[tuple[float, int]]:
    """The time and the number of each frame."""
    with av.open(str(path)) as container:
        frames = [
            (f.time, f.to_ndarray(format="gray")[8, 8::16]) for f in container.decode(video=0)
        ]
    return [(time, int(((row > 127) << np.arange(6)).sum())) for time, row in frames]


def loud_from(path: Path) -> float:
    """Seconds until the tone begins."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return float(np.argmax(np.abs(np.concatenate(frames)) > 0.1)) / RATE


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("cut") / "film.mp4")


@pytest.mark.parametrize(
    ("start", "end", "first", "count"),
    [
        (0, 1, 0, 10),
        (1.5, 3.0, 15, 15),
        (1.55, 2.25, 15, 7),
        (3.5, 99, 35, 5),
        (2.01, 2.02, 20, 1),
        (1.1, 1.4, 11, 3),
    ],
)
def test_a_part_has_exactly_its_frames(
    video: Path, tmp_path: Path, start: float, end: float, first: int, count: int
) -> None:
    begun, ended = cut_video(video, tmp_path / "part.mp4", start, end)
    assert (begun, ended) == (start, pytest.approx(start + count / 10))
    expected = [(pytest.approx(i / 10), first + i) for i in range(count)]
    assert numbers(tmp_path / "part.mp4") == expected


def test_the_sound_is_at_its_time(video: Path, tmp_path: Path) -> None:
    cut_video(video, tmp_path / "part.mp4", 1.25, 3.25)
    assert loud_from(tmp_path / "part.mp4") == pytest.approx(BEGIN - 1.25, abs=0.01)
    with av.open(str(tmp_path / "part.mp4")) as container:
        (stream,) = container.streams.audio
        assert float(stream.duration * stream.time_base) == pytest.approx(2.0, abs=0.01)


def test_times_begin_at_the_first_frame_and_not_in_the_container(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "film.ts", begin=5)
    with av.open(str(path)) as container:
        assert container.start_time == pytest.approx(5 * av.time_base, abs=0.2 * av.time_base)
    cut_video(path, tmp_path / "part.mp4", 1.25, 3.25)
    assert loud_from(tmp_path / "part.mp4") == pytest.approx(BEGIN - 1.25, abs=0.05)
    assert [number for _, number in numbers(tmp_path / "part.mp4")] == list(range(12, 32))


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_other_containers_and_no_sound(tmp_path: Path, suffix: str) -> None:
    path = write_numbered(tmp_path / f"film{suffix}", sound=False)
    cut_video(path.read_bytes(), tmp_path / "part.mp4", 1.0, 2.0)
    assert [number for _, number in numbers(tmp_path / "part.mp4")] == list(range(10, 20))
    with av.open(str(tmp_path / "part.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("times", [(2, 1), (1, 1), (-1, 1), (0, float("inf")), (float("nan"), 1)])
def test_times_that_mean_nothing_are_errors(video: Path, tmp_path: Path, times: Any) -> None:
    with pytest.raises(VideoOptionError, match="an end after the start"):
        cut_video(video, tmp_path / "part.mp4", *times)


def test_what_cannot_be_cut_is_an_error(video: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"begins at 7 s, but the video has 4\.0 s"):
        cut_video(video, tmp_path / "part.mp4", 7, 8)
    with pytest.raises(VideoNotFoundError):
        cut_video(tmp_path / "no.mp4", tmp_path / "part.mp4", 0, 1)
    before = video.read_bytes()
    link = tmp_path / "link.mp4"
    link.symlink_to(video)
    for path in (video, link):
        with pytest.raises(VideoOptionError, match="is the video itself"):
            cut_video(video, path, 0, 1)
    assert video.read_bytes() == before
    frames = VideoFrames(np.zeros((4, 8, 8, 3), np.uint8), fps=2)
    with pytest.raises(VideoOptionError, match="expected a file"):
        cut_video(frames, tmp_path / "part.mp4", 0, 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/match.mp4", "match 0012.0-0016.5.mp4"),
        ("s3://x/tag:1?.mkv", "tag_1_ 0012.0-0016.5.mp4"),
        ("ü 打.mp4", "ü 打 0012.0-0016.5.mp4"),
        (b"bytes", "_5 bytes_ 0012.0-0016.5.mp4"),
    ],
)
def test_names_of_parts_are_file_names(path: Any, name: str) -> None:
    assert part_name(path, 12, 16.5) == name
