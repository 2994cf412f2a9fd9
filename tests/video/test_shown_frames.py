"""The frames of a file are the frames that a player shows, whatever its header counts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openvclip.errors import VideoError
from openvclip.video import check_video, read_clip
from openvclip.video._stream import Stream
from openvclip.video.sampling import Sampling, StreamInfo, plan, select
from openvclip.video.sliding import sliding_windows
from tests.video.conftest import draw
from tests.video.mp4 import with_edits

Encode = Callable[..., Path]
Numbers = Callable[[Any], list[Any]]

OPTIONS: dict[str, Any] = {"num_frames": 4, "sampling_rate": 4}
X264 = {"x264-params": "bframes=2:keyint=20:scenecut=0", "preset": "ultrafast"}
TICK = 512  # FFmpeg writes 15360 ticks a second for 30 frames a second


def expected(
    shown: list[int], fps: float = 30, tick: int = TICK, **options: Any
) -> list[list[int]]:
    """The frames of a video that consists of ``shown``, at equal distances."""
    sampling = Sampling(**OPTIONS, **options)
    info = StreamInfo(fps, len(shown), len(shown) * tick)
    if sampling.sampler == "uniform":
        info = StreamInfo(fps, len(shown), counted=True)
    stamps = range(0, len(shown) * tick, tick)
    generator = torch.Generator().manual_seed(5)
    windows = plan(info, sampling, generator)
    return [[shown[index] for index in select(stamps, window)] for window in windows]


def assert_shows(path: Path, shown: list[int], numbers: Numbers, tick: int = TICK) -> None:
    for options in ({"views": 3}, {"sampler": "uniform"}, {"sampler": "dense", "views": 2}):
        generator = torch.Generator().manual_seed(5)
        clip = read_clip(path, **OPTIONS, **options, generator=generator)
        assert numbers(clip) == expected(shown, tick=tick, **options), options
    check = check_video(path)
    assert (check.status, check.frames, check.fps) == ("ok", len(shown), 30)
    assert check_video(path, quick=True).frames == len(shown)


EDITS = {
    "hides the beginning": ([(3000, 43)], [*range(43, 133)]),
    "hides the end": ([(2000, 0)], [*range(60)]),
    "hides both": ([(2000, 27)], [*range(27, 87)]),
    "hides the middle": ([(1000, 10), (1000, 80)], [*range(10, 40), *range(80, 110)]),
    "plays backwards": ([(1000, 80), (1000, 10)], [*range(80, 110), *range(10, 40)]),
    "repeats": ([(1000, 30), (1000, 30)], [*range(30, 60), *range(30, 60)]),
    "begins late": ([(500, None), (2000, 50)], [*range(50, 110)]),
    "promises more": ([(60_000, 50)], [*range(50, 150)]),
}


@pytest.fixture(scope="module")
def originals(encode: Encode) -> dict[int, bytes]:
    """A video of 150 frames without and with B-frames."""
    return {
        bframes: encode(
            f"edits{bframes}.mp4",
            frames=150,
            options={**X264, "x264-params": f"bframes={bframes}:keyint=60:scenecut=0"},
        ).read_bytes()
        for bframes in (0, 2)
    }


# Report 01 (vllm#48608): samples that an edit list hides are no frames of the video.
@pytest.mark.parametrize("kind", EDITS)
def test_edit_lists(
    kind: str, originals: dict[int, bytes], numbers: Numbers, tmp_path: Path
) -> None:
    edits, shown = EDITS[kind]
    bframes = 2 if len(edits) == 1 else 0
    offset = bframes * TICK  # the time stamp of the first frame
    times = [(length, -1 if first is None else offset + TICK * first) for length, first in edits]
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(originals[bframes], times))
    assert_shows(path, shown, numbers)


def test_windows_slide_over_what_is_shown(
    originals: dict[int, bytes], numbers: Numbers, tmp_path: Path
) -> None:
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(originals[0], [(1000, TICK * 43)]))
    windows = sliding_windows(path, transform=lambda x: x, num_frames=2, seconds=0.5, step=0.5)
    assert [numbers(window.clip) for window in windows] == [[43, 50], [58, 65]]


def test_one_hidden_frame_is_counted_as_in_the_released_code(
    originals: dict[int, bytes], numbers: Numbers, tmp_path: Path
) -> None:
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(originals[0], [(4967, TICK)]))
    assert check_video(path).frames == 149
    info = StreamInfo(30, 150, 4967 * 15360 // 1000)  # 150 frames in the time of 149
    windows = plan(info, Sampling(**OPTIONS, views=3))
    wanted = [[1 + index for index in select(range(0, 149 * TICK, TICK), w)] for w in windows]
    assert numbers(read_clip(path, **OPTIONS, views=3)) == wanted


# Report 02 (opencv#25844): the header of a fragmented file counts the first fragment, or nothing.
@pytest.mark.parametrize(
    "flags",
    [
        "frag_keyframe",
        "frag_keyframe+empty_moov",
        "cmaf",
        "dash+delay_moov",
        "frag_every_frame+empty_moov",
        "frag_keyframe+empty_moov+default_base_moof+skip_trailer",
    ],
)
def test_fragmented_files(flags: str, encode: Encode, numbers: Numbers) -> None:
    name = flags.replace("+", "-")
    path = encode(f"{name}.mp4", frames=80, options=X264, container_options={"movflags": flags})
    assert_shows(path, [*range(80)], numbers)


def _avi(data: bytes, frames: int) -> bytes:
    changed = bytearray(data)
    for name, place in ((b"avih", 16), (b"strh", 32)):
        struct.pack_into("<I", changed, data.index(name) + 8 + place, frames)
    return bytes(changed)


# The kind of report 02: headers that count other frames than the file has.
@pytest.mark.parametrize("said", [0, 7, 59, 61, 600, 2**31 - 1])
def test_avi_headers_that_are_wrong(
    said: int, encode: Encode, numbers: Numbers, tmp_path: Path
) -> None:
    whole = encode("counted.avi", codec="mpeg4", options={"g": "12"})
    path = tmp_path / "wrong.avi"
    path.write_bytes(_avi(whole.read_bytes(), said))
    assert_shows(path, [*range(60)], numbers, tick=1)


class _Pipe:
    """A file that cannot be sought: a recorder writes no length and no index into it."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)


@pytest.mark.parametrize(
    ("form", "codec"),  # not FLV: FFmpeg 8.0, of PyAV 17, crashes when it opens such a file
    [
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("asf", "wmv2"),
    ],
)
def test_live_recordings(form: str, codec: str, numbers: Numbers, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pipe = _Pipe()
    with av.open(pipe, "w", format=form) as container:
        stream = container.add_stream(codec, rate=30, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 144, 64, "yuv420p"
        for number in range(60):
            picture = draw(number, 144, 64, "rgb24")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    path = tmp_path / "live.video"
    path.write_bytes(pipe.written)
    clip = read_clip(path, **OPTIONS, sampler="uniform")
    assert numbers(clip) == [[7, 22, 37, 52]]
    check = check_video(path)
    assert (check.status, check.frames, check.fps) == ("ok", 60, pytest.approx(30, rel=0.01))
    late = numbers(read_clip(path, **OPTIONS, views=3))[2]
    assert late == sorted(set(late))
    assert late[0] >= 32  # the last of three views is in the last half


def test_frames_that_a_file_leaves_out(encode: Encode, numbers: Numbers, tmp_path: Path) -> None:
    """AVI files repeat a frame by an empty chunk, which the header counts."""
    data = encode("full.avi", codec="mjpeg", pixel_format="yuvj420p").read_bytes()
    start = data.index(b"movi")
    left_out = set(range(3, 60, 5))
    chunks, index, place = bytearray(b"movi"), bytearray(), start + 4
    for number in range(60):
        name, size = struct.unpack_from("<4sI", data, place)
        kept = b"" if number in left_out else data[place + 8 : place + 8 + size + size % 2]
        size_kept = 0 if number in left_out else size
        index += struct.pack("<4sIII", name, 16, len(chunks), size_kept)
        chunks += struct.pack("<4sI", name, size_kept) + kept
        place += 8 + size + size % 2
    path = tmp_path / "sparse.avi"
    path.write_bytes(
        data[: start - 4] + struct.pack("<I", len(chunks)) + chunks
        + struct.pack("<4sI", b"idx1", len(index)) + index
    )  # fmt: skip
    shown = [number for number in range(60) if number not in left_out]
    assert check_video(path).frames == len(shown)
    clip = read_clip(path, **OPTIONS, sampler="uniform")
    assert numbers(clip) == expected(shown, sampler="uniform")


def test_a_truncated_file_consists_of_what_is_there(
    encode: Encode, numbers: Numbers, tmp_path: Path
) -> None:
    whole = encode(
        "fast.mp4", frames=150, options=X264, container_options={"movflags": "faststart"}
    ).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    with Stream(str(path)) as stream:
        left = sum(1 for _ in stream.frames())
    assert 20 < left < 130
    shown = [*range(left)]
    assert numbers(read_clip(path, **OPTIONS, views=3)) == expected(shown, views=3)
    (uniform,) = numbers(read_clip(path, **OPTIONS, sampler="uniform"))
    assert uniform == sorted(set(uniform))
    assert left * 3 // 4 < uniform[-1] < left
    generator = torch.Generator().manual_seed(5)
    dense = read_clip(path, **OPTIONS, sampler="dense", views=9, generator=generator)
    assert max(map(max, numbers(dense))) <= left - 1
    after = torch.rand((), generator=generator)  # the numbers are drawn once
    again = torch.Generator().manual_seed(5)
    assert torch.equal(after, torch.rand(10, generator=again)[9])


def test_rates_that_the_container_does_not_know(encode: Encode, numbers: Numbers) -> None:
    """A file that promises 50 frames a second and has 10: a clip lasts as long as planned."""
    times = [100 * number for number in range(60)]
    path = encode("slow.mkv", fps=50, times=times)
    assert check_video(path).fps == pytest.approx(10)
    # 4 * 8 / 30 seconds have 10 frames
    clip = read_clip(path, num_frames=4, sampling_rate=8)
    assert numbers(clip) == [[24, 27, 30, 33]]


# Report 04 (USDX#948): the stream that is read is a film, not a picture of it.
def _film_with_pictures(path: Path, tracks: list[tuple[str, int, int, str]]) -> None:
    """Write tracks of ``(codec, grey, number of frames, disposition)``."""
    av = pytest.importorskip("av")
    import numpy as np

    with av.open(str(path), "w") as container:
        packets = []
        rates = {"aac": 44100}
        streams = [container.add_stream(codec, rate=rates.get(codec, 30)) for codec, *_ in tracks]
        for stream, (codec, _, _, disposition) in zip(streams, tracks, strict=True):
            if codec == "aac":
                continue
            stream.width, stream.height = (64, 48) if codec == "libx264" else (320, 240)
            stream.pix_fmt = "yuv420p" if codec == "libx264" else "yuvj420p"
            if disposition:
                stream.disposition = av.stream.Disposition[disposition].value
        for stream, (codec, grey, count, _) in zip(streams, tracks, strict=True):
            for number in range(count):
                if codec == "aac":
                    frame = av.AudioFrame.from_ndarray(
                        np.zeros((1, 1024), np.float32), format="flt", layout="mono"
                    )
                    frame.rate, frame.pts = stream.rate, number * 1024
                else:
                    picture = np.full((stream.height, stream.width, 3), grey, np.uint8)
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts = number
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)


FILM = ("libx264", 128, 12, "")
COVER = ("mjpeg", 255, 1, "attached_pic")


@pytest.mark.parametrize(
    ("name", "tracks"),
    [
        ("thumbnail.mkv", [("mjpeg", 255, 1, ""), FILM]),
        ("default.mkv", [("mjpeg", 255, 1, "default"), FILM]),
        ("first.mp4", [("mjpeg", 255, 1, ""), FILM]),
        ("cover.mp4", [COVER, FILM]),
        ("after.mov", [FILM, ("mjpeg", 255, 1, "")]),
        ("two.mp4", [FILM, ("libx264", 255, 12, "")]),
    ],
)
def test_pictures_beside_a_film(
    name: str, tracks: list[tuple[str, int, int, str]], tmp_path: Path
) -> None:
    path = tmp_path / name
    _film_with_pictures(path, tracks)
    clip = read_clip(path, num_frames=2)
    assert clip.shape == (1, 2, 3, 48, 64)
    assert (clip.float() - 128).abs().max() <= 3
    check = check_video(path)
    assert (check.status, check.frames, check.width, check.fps) == ("ok", 12, 64, 30)


def test_a_picture_alone(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    _film_with_pictures(path, [("aac", 0, 12, ""), COVER])
    with pytest.raises(VideoError, match=r"no video stream \(found: audio, picture\)"):
        read_clip(path)
    assert check_video(path).status == "bad"
    one = tmp_path / "one.mkv"  # a single frame that is not marked as a cover is a video
    _film_with_pictures(one, [("mjpeg", 255, 1, "")])
    check = check_video(one)
    assert (check.status, check.frames) == ("ok", 1)
    assert check.fps is not None
    assert check.fps < 1000
