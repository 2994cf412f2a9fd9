from __future__ import annotations

import os
import struct
import sys
from fractions import Fraction

import pytest
import torch

from openvclip.errors import (
    MissingDependencyError,
    OpenVCLIPError,
    VideoError,
    VideoNotFoundError,
    VideoOptionError,
)
from openvclip.video import _stream, _windows, read_clip
from openvclip.video.sampling import Sampling, StreamInfo, plan, select
from tests.video.conftest import unprivileged
from tests.video.formats import FORMATS


@pytest.mark.parametrize("kind", FORMATS)
def test_frames_of_every_format(kind, encode, numbers):
    path = encode(**FORMATS[kind])
    width, height = FORMATS[kind].get("size", (144, 64))
    # uniform: centres of 6 segments of 10 frames; the whole video is 60 frames
    clip = read_clip(path, num_frames=6, sampler="uniform")
    assert clip.shape == (1, 6, 3, height, width)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    assert numbers(clip) == [[5, 15, 25, 35, 45, 55]]

    views = read_clip(path, num_frames=4, sampling_rate=8, views=3)
    with _stream.Stream(str(path)) as stream:
        fps = stream.info.fps  # an elementary stream has no frame rate, and FFmpeg assumes 25
    options = {"num_frames": 4, "sampling_rate": 8, "views": 3}
    expected = [
        [select(range(0, 60 * tick, tick), window) for window in plan(info, Sampling(**options))]
        for tick, info in (
            (
                1,
                StreamInfo(fps, 60, 60),
            ),  # a fractional start is rounded down
            (100, StreamInfo(fps, 60, 6000)),  # and rounded up if ticks are short
            (1, StreamInfo(fps, 60, counted=True)),
        )
    ]
    assert numbers(views) in expected


def test_short_clips_repeat_the_last_frame(encode, numbers):
    path = encode("short.mp4", frames=20)
    assert numbers(read_clip(path, views=2)) == [[0, 18, 19, 19, 19, 19, 19, 19]] * 2
    one = encode("one.mp4", frames=1)
    assert numbers(read_clip(one, views=2, num_frames=3)) == [[0, 0, 0]] * 2
    assert numbers(read_clip(one, num_frames=3, sampler="uniform")) == [[0, 0, 0]]


def test_a_single_frame_is_asked_for(encode, numbers):
    path = encode("single.mp4", frames=30)
    assert numbers(read_clip(path, num_frames=1)) == [[0]]
    assert numbers(read_clip(path, num_frames=1, sampler="uniform")) == [[15]]


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_streams_that_start_late(name, encode, numbers):
    times = [10_000 + 40 * i for i in range(60)]
    path = encode(name, fps=25, times=times)
    # a clip is 4 * 4 / 30 * 25 = 13.3 frames long; linspace(start, start + 12.3, 4)
    start = 0 if name == "late.mp4" else 23  # one view without a duration: the centre
    assert numbers(read_clip(path, num_frames=4, sampling_rate=4)) == [
        [start, start + 4, start + 8, min(start + 12, start + 10 if start == 0 else 99)]
    ]
    assert numbers(read_clip(path, num_frames=6, sampler="uniform")) == [[5, 15, 25, 35, 45, 55]]


def test_late_start_of_timed_stream_is_no_offset(encode, numbers):
    late = encode("late2.mp4", fps=25, times=[10_000 + 40 * i for i in range(60)])
    prompt = encode("prompt.mp4", fps=25, times=[40 * i for i in range(60)])
    want = numbers(read_clip(prompt, num_frames=4, sampling_rate=4, views=3))
    assert numbers(read_clip(late, num_frames=4, sampling_rate=4, views=3)) == want


def test_variable_frame_rate(encode, numbers):
    # 40 frames with a distance of a second, then 40 frames at 25 frames per second. "released"
    # places its views by time stamp, so they are in the slow part. "uniform" counts frames.
    times = [1000 * i for i in range(40)] + [40_000 + 40 * i for i in range(40)]
    path = encode("vfr.mp4", frames=80, fps=25, times=times)
    assert numbers(read_clip(path, num_frames=4, sampler="uniform")) == [[10, 30, 50, 70]]
    with _stream.Stream(str(path)) as stream:
        info = stream.info
        stamps = [stamp for stamp, _ in stream.frames()]
    windows = plan(info, Sampling(num_frames=4, views=3))
    clip = read_clip(path, num_frames=4, views=3)
    assert numbers(clip) == [select(stamps, window) for window in windows]


def test_rotation(encode, tmp_path):
    path = encode("upright.mp4", frames=4)
    upright = read_clip(path, num_frames=2)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    data = path.read_bytes()
    header = data.index(b"tkhd")  # the matrix of the whole movie comes before this header
    # (x, y) goes to (a x + c y, b x + d y) with y downwards (ISO 14496-12): a phone held upright
    # writes a = d = 0, b = 1, c = -1, "turn clockwise"
    for (a, b, c, d), turns in (((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)):
        matrix = struct.pack(">9i", *(65536 * x for x in (a, b, 0, c, d, 0, 0, 0)), 2**30)
        turned = tmp_path / "turned.mp4"
        turned.write_bytes(data[:header] + data[header:].replace(identity, matrix, 1))
        clip = read_clip(turned, num_frames=2)
        assert torch.equal(clip, torch.rot90(upright, turns, dims=(-2, -1)))


def test_size_that_changes_on_the_way(encode, tmp_path):
    small = encode("small.ts", frames=20, size=(144, 64))
    large = encode("large.ts", frames=20, size=(288, 128))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = read_clip(path, num_frames=8, sampler="uniform")
    assert clip.shape == (1, 8, 3, 64, 144)


@pytest.fixture(scope="module")
def long_video(encode):
    options = {"x264-params": "bframes=3:keyint=15", "preset": "ultrafast"}
    return {
        kind: encode(f"long.{kind}", frames=500, fps=Fraction(10), options=options)
        for kind in ("mp4", "mkv")
    }


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("sampler", ["released", "uniform", "dense"])
def test_seeking_gives_the_same_frames_and_decodes_fewer(
    kind, sampler, long_video, numbers, monkeypatch
):
    options = {"num_frames": 3, "sampling_rate": 8, "views": 2, "sampler": sampler}
    decoded = []
    original = _stream.Stream._decode_packet

    def counting(self, packet):
        frames = original(self, packet)
        decoded.extend(frames)
        return frames

    monkeypatch.setattr(_stream.Stream, "_decode_packet", counting)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        decoded.clear()
        seeking = read_clip(long_video[kind], generator=generator, **options)
        with_seek = len(decoded)
        with monkeypatch.context() as patch:
            patch.setattr(_stream.Stream, "seekable", False)
            decoded.clear()
            plain = read_clip(long_video[kind], generator=generator.manual_seed(seed), **options)
        assert numbers(seeking) == numbers(plain)
        assert torch.equal(seeking, plain)
    assert with_seek < len(decoded)
    assert with_seek < 250


def test_a_seek_that_misses_is_made_good(long_video, numbers, monkeypatch):
    want = read_clip(long_video["mp4"], views=3, sampling_rate=4)
    original = _stream.Stream.seek
    monkeypatch.setattr(
        _stream.Stream, "seek", lambda self, stamp: original(self, stamp + self.ticks(8))
    )
    assert torch.equal(read_clip(long_video["mp4"], views=3, sampling_rate=4), want)


def test_memory_holds_few_frames(long_video, monkeypatch):
    most = 0
    original = _windows.Picker.feed

    def watching(self, stamp, frame):
        nonlocal most
        original(self, stamp, frame)
        most = max(most, len(self._waiting) + len(self._kept))

    monkeypatch.setattr(_windows.Picker, "feed", watching)
    read_clip(long_video["mp4"], sampling_rate=100, target_fps=10, num_frames=5)
    assert 0 < most <= 16 + 5 + 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_files_are_closed(long_video, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        read_clip(long_video["mkv"], views=2, num_frames=2, sampling_rate=2)
        with pytest.raises(VideoError):
            read_clip(tmp_path / "text.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_picker_equals_select():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        length = int(torch.randint(1, 60, (), generator=generator))
        jitter = torch.randint(0, 4, (length,), generator=generator).tolist()
        stamps = [max(0, i + j) for i, j in enumerate(jitter)]  # not sorted, with repetitions
        info = StreamInfo(fps=30.0, frames=length, duration=length)
        rate = int(torch.randint(1, 5, (), generator=generator))
        for window in plan(info, Sampling(num_frames=4, sampling_rate=rate, views=3)):
            picker = _windows.Picker(window)
            for index, stamp in enumerate(stamps):
                if not picker.done:
                    picker.feed(stamp, index)
            picker.finish()
            picker.fall_back(length - 1)
            assert picker.chosen() == select(stamps, window), (stamps, window)


def test_dense_follows_its_generator(encode, numbers):
    path = encode("dense.mp4", frames=120)

    def starts(seed):
        generator = torch.Generator().manual_seed(seed)
        return numbers(
            read_clip(path, num_frames=2, sampling_rate=2, sampler="dense", generator=generator)
        )

    assert starts(1) == starts(1)
    first_frames = {starts(seed)[0][0] for seed in range(12)}
    assert len(first_frames) > 6
    assert max(first_frames) > 40


def _text(path):
    path.write_text("this is not a video\n" * 100)


def _moov_missing(path, encode):
    whole = encode("whole.mp4").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_missing_file(tmp_path):
    with pytest.raises(VideoNotFoundError, match=r"none\.mp4: no such file") as caught:
        read_clip(tmp_path / "none.mp4")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(VideoNotFoundError):
        read_clip("memory://none.mp4")
    with pytest.raises(VideoNotFoundError):
        read_clip("concat:a.ts|b.ts")


def test_not_a_video(tmp_path, encode):
    with pytest.raises(VideoError, match="is a directory"):
        read_clip(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"empty\.mp4: the file is empty"):
        read_clip(tmp_path / "empty.mp4")
    for name in ("text.mp4", "text.txt", "text.nfo"):
        _text(tmp_path / name)
        with pytest.raises(VideoError, match=name):
            read_clip(tmp_path / name)
    _moov_missing(tmp_path / "cut.mp4", encode)
    with pytest.raises(VideoError, match=r"cut\.mp4: cannot be read as a video: FFmpeg says"):
        read_clip(tmp_path / "cut.mp4")
    (tmp_path / "zero.mp4").write_bytes(bytes(100_000))
    with pytest.raises(VideoError):
        read_clip(tmp_path / "zero.mp4")


def test_playlists_open_nothing_else(tmp_path, encode):
    video = encode("named.ts", frames=10)
    listing = tmp_path / "list.ffconcat"
    listing.write_text(f"ffconcat version 1.0\nfile {video}\n")
    with pytest.raises(VideoError):
        read_clip(listing)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError):
        read_clip(playlist)


def test_audio_only(tmp_path):
    av = pytest.importorskip("av")
    import numpy as np

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoError, match=r"no video stream \(found: audio\)"):
        read_clip(path)


def test_avi_without_index(encode, numbers, tmp_path):
    data = encode("indexed.avi", codec="mpeg4", options={"g": "12"}).read_bytes()
    start = data.rindex(b"idx1")
    assert len(data) - start > 60 * 16  # 16 bytes for a frame; it is the last chunk
    path = tmp_path / "plain.avi"
    path.write_bytes(data[:start])
    assert numbers(read_clip(path, num_frames=6, sampler="uniform")) == [[5, 15, 25, 35, 45, 55]]
    with _stream.Stream(str(path)) as stream:
        info = stream.info  # without the index, FFmpeg estimates the duration
    assert info.timed
    options = {"num_frames": 4, "sampling_rate": 8, "views": 3}
    windows = plan(info, Sampling(**options))
    assert numbers(read_clip(path, **options)) == [select(range(60), w) for w in windows]


@pytest.mark.parametrize(
    ("name", "first_frames", "options"),
    [
        ("none.mkv", b"\x1f\x43\xb6\x75", {}),  # the first cluster
        ("none.avi", b"00dc", {}),
        ("none.mp4", b"moof", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_zero_frames(name, first_frames, options, encode, tmp_path):
    data = encode("some-" + name, codec="mpeg4", container_options=options).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: data.index(first_frames)])
    for sampler in ("released", "uniform", "dense"):
        with pytest.raises(VideoError, match=rf"{name}: (decoded 0 frames|cannot be read)"):
            read_clip(path, sampler=sampler)


def test_permission_denied(encode, open_folder):
    locked = open_folder / "locked.mp4"
    locked.write_bytes(encode("open.mp4", frames=5).read_bytes())
    locked.chmod(0)
    with unprivileged(), pytest.raises(VideoError, match=r"locked\.mp4: no permission to read it"):
        read_clip(locked)


@pytest.mark.parametrize("name", ["half.avi", "half.mkv", "half.mp4", "half.ts"])
def test_a_file_that_breaks_off_gives_what_is_there(name, encode, numbers, tmp_path):
    faststart = {"movflags": "faststart"} if name.endswith("mp4") else None
    options = {"g": "6"} if name.endswith("avi") else {"x264-params": "bframes=2:keyint=6"}
    whole = encode(
        "whole-" + name,
        frames=200,
        codec="mpeg4" if name.endswith("avi") else "libx264",
        container_options=faststart,
        options=options,
    )
    data = whole.read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) * 6 // 10])
    for sampler in ("released", "uniform", "dense"):
        clip = read_clip(path, views=3, sampler=sampler)
        assert clip.shape == (3, 8, 3, 64, 144)
        views = numbers(clip)
        assert all(view == sorted(view) for view in views)
        assert views[0][1] < 130  # of 200: the file has about 120


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "decord"}, "backend='decord' is not known: choose one of 'pyav'"),
        ({"sampler": "best"}, "sampler='best' is not known: choose one of 'released'"),
        ({"num_frames": 0}, "num_frames=0: expected a whole number of at least 1"),
        ({"num_frames": 2.0}, "num_frames=2.0"),
        ({"views": -1}, "views=-1"),
        ({"sampling_rate": True}, "sampling_rate=True"),
        ({"target_fps": 0}, "target_fps=0"),
        ({"target_fps": float("nan")}, "target_fps=nan"),
    ],
)
def test_options(options, text):
    with pytest.raises(VideoOptionError, match=text) as caught:
        read_clip("none.mp4", **options)
    assert isinstance(caught.value, (OpenVCLIPError, ValueError))
    assert not isinstance(caught.value, VideoError)


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "openvclip\[video\]"'):
        read_clip("none.mp4")
