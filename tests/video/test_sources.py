"""Every kind of video gives the frames of its file; threads change nothing; errors say what to do.

The reference is the clip that is read from the file, or a slow selection from all frames.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openvclip.errors import (
    MissingDependencyError,
    UsageError,
    VideoError,
    VideoNotFoundError,
    VideoOptionError,
    VideoShapeError,
)
from openvclip.video import (
    Sampling,
    VideoFrames,
    read_clip,
    read_clips,
    sliding_windows,
    transforms,
)
from openvclip.video.sources import source_name

av = pytest.importorskip("av")

OPTIONS = (
    {"num_frames": 4, "sampling_rate": 8, "views": 3},
    {"num_frames": 5, "sampler": "uniform", "views": 2},
    {"num_frames": 3, "sampling_rate": 8, "sampler": "dense", "views": 2},
)


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def path(encode):
    return encode("source.mp4", frames=90, options={"x264-params": "keyint=20:bframes=2"})


@pytest.fixture(scope="module")
def data(path):
    return path.read_bytes()


@pytest.fixture(scope="module")
def pixels(path):
    """All frames, uint8 [T, C, H, W]."""
    return read_clip(path, num_frames=90, sampler="uniform")[0]


class Pipe(io.RawIOBase):
    """A file object that can't seek, such as the body of an HTTP response."""

    def __init__(self, data):
        self.inner = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.inner.readinto(buffer)


class Stream(io.BytesIO):
    """A file object that says that it can seek, and can't: fsspec's answer of a web server."""

    def seek(self, offset, whence=0):
        raise ValueError("Cannot seek streaming HTTP file")


class Decoder:
    """A decoder with the methods of torchcodec's VideoDecoder."""

    def __init__(self, pixels, times, rate, last=False):
        self.pixels = pixels.movedim(1, -1) if last else pixels
        self.times, self.decoded = times, []
        end = times[-1] + 1 / rate
        self.metadata = SimpleNamespace(
            average_fps=rate, begin_stream_seconds=times[0], end_stream_seconds=end
        )

    def __len__(self):
        return len(self.times)

    def get_frames_at(self, indices):
        self.decoded += indices
        times = torch.tensor([self.times[i] for i in indices], dtype=torch.float64)
        return SimpleNamespace(data=self.pixels[indices], pts_seconds=times)

    def get_frames_in_range(self, start, stop):
        return self.get_frames_at(list(range(start, stop)))


def forms(path, data):
    """The same file in every form, and what closes it."""
    partly = io.BytesIO(data)
    partly.seek(100)
    pytest.importorskip("fsspec").filesystem("memory").pipe("/source.mp4", data)
    return {
        "str": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "BytesIO": partly,
        "pipe": Pipe(data),
        "stream": Stream(data),
        "file URL": path.as_uri(),
        "URL": "memory://source.mp4",
        "container of bytes": av.open(io.BytesIO(data)),
        "container of a file": av.open(str(path)),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=["released", "uniform", "dense"])
def test_every_form_of_a_file_gives_its_clips(options, path, data):
    expected = read_clip(path, generator=seeded(), **options)
    for form, video in forms(path, data).items():
        assert torch.equal(read_clip(video, generator=seeded(), **options), expected), form


@pytest.mark.parametrize("suffix", ["avi", "ts", "mkv"])
def test_forms_whose_packets_are_counted_or_that_are_decoded_from_the_beginning(encode, suffix):
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = encode(f"source.{suffix}", frames=40, codec=codec)
    file = path.open("rb")
    file.seek(7)
    container = av.open(str(path))
    for options in OPTIONS[:2]:
        expected = read_clip(path, **options)
        for video in (path.read_bytes(), file, container):
            assert torch.equal(read_clip(video, **options), expected)
    assert file.tell() == 7  # the position of the caller
    assert len(list(container.decode(video=0))) == 40  # the container of the caller is untouched
    file.close()


@pytest.mark.parametrize("options", OPTIONS, ids=["released", "uniform", "dense"])
def test_arrays_go_through_the_plan_of_files(options, path, pixels):
    expected = read_clip(path, generator=seeded(), **options)
    last = pixels.movedim(1, -1).numpy()
    frozen = last.copy()
    frozen.flags.writeable = False
    alpha = np.concatenate([last, np.zeros_like(last[..., :1])], axis=-1)
    arrays = {
        "tensor": pixels,
        "channels last": last,
        "read-only": frozen,
        "negative strides": last[..., ::-1].copy()[..., ::-1],
        "alpha": alpha,
        "list of frames": VideoFrames(list(last), 30),
        "list of tensors": VideoFrames(list(pixels), Fraction(30)),
        "decoder": Decoder(pixels, [i / 30 for i in range(90)], 30),
        "decoder, channels last": Decoder(pixels, [2 + i / 30 for i in range(90)], 30, last=True),
    }
    for form, video in arrays.items():
        rate = {"fps": 30} if isinstance(video, (np.ndarray, torch.Tensor)) else {}
        assert torch.equal(read_clip(video, generator=seeded(), **rate, **options), expected), form
    grey = pixels[:, :1]
    assert torch.equal(read_clip(grey, fps=30, generator=seeded(), **options), expected)


def test_a_transform_of_arrays_is_that_of_files(path, pixels):
    for name, crops in (("released", 3), ("clip", 1), ("train", 1)):
        transform = transforms.build(name, 32, crops=crops)
        options = {"num_frames": 4, "views": 2, "transform": transform}
        expected = read_clip(path, generator=seeded(), **options)
        assert torch.equal(read_clip(pixels, fps=30, generator=seeded(), **options), expected)
    halved = read_clip(pixels, fps=30, views=2, transform=lambda clip: clip // 2)
    assert torch.equal(halved, read_clip(path, views=2) // 2)


def test_the_frame_rate_decides_the_distance(pixels, numbers):
    options = {"num_frames": 4, "sampling_rate": 8}
    assert numbers(read_clip(pixels, fps=30, **options)) == [[0, 10, 20, 24]]
    assert numbers(read_clip(pixels, fps=15, **options)) == [[0, 5, 10, 12]]
    frames = VideoFrames(pixels, 15)
    assert numbers(read_clip(frames, **options)) == [[0, 5, 10, 12]]
    assert repr(frames) == "VideoFrames([90, 3, 64, 144], fps=15.0)"
    uniform = read_clip(pixels, num_frames=3, sampler="uniform")  # needs no rate
    assert numbers(uniform) == [[15, 45, 75]]


def test_a_decoder_of_a_changing_rate_is_chosen_by_time(encode, pixels, numbers):
    times = [1000 * i for i in range(10)] + [10_000 + 40 * i for i in range(30)]
    path = encode("source-vfr.mp4", frames=40, fps=25, times=times)
    frames = read_clip(path, num_frames=40, sampler="uniform")[0]
    for options in ({"views": 3}, {"sampler": "dense"}):
        options = {"num_frames": 3, "sampling_rate": 4, **options}
        decoder = Decoder(frames, [t / 1000 for t in times], 40 / 11.2)
        expected = numbers(read_clip(path, generator=seeded(), **options))
        assert numbers(read_clip(decoder, generator=seeded(), **options)) == expected
    steady = Decoder(pixels, [i / 30 for i in range(90)], 30)
    read_clip(steady, num_frames=3)
    assert len(steady.decoded) <= 3  # no further frame is decoded


def test_windows_of_every_form(path, data, pixels):
    options = {"transform": transforms.build("clip", 16), "num_frames": 2, "seconds": 0.7}
    expected = list(sliding_windows(path, **options))
    decoder = Decoder(pixels, [i / 30 for i in range(90)], 30)
    videos = {**forms(path, data), "frames": VideoFrames(pixels, 30), "decoder": decoder}
    for form, video in videos.items():
        windows = list(sliding_windows(video, **options))
        assert len(windows) == len(expected) > 5, form
        for got, want in zip(windows, expected, strict=True):
            assert (got.start, got.end) == pytest.approx((want.start, want.end)), form
            assert torch.equal(got.clip, want.clip), form
    assert len(list(sliding_windows(pixels, fps=60, **options))) < len(expected)


def test_torchcodec_decoders(path, pixels):
    decoders = pytest.importorskip("torchcodec.decoders")
    for order in ("NCHW", "NHWC"):
        clip = read_clip(decoders.VideoDecoder(str(path), dimension_order=order), views=3)
        assert (clip.int() - read_clip(path, views=3).int()).abs().max() <= 3


# --- many videos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
def test_threads_change_nothing(path, data, pixels, random):
    file = io.BytesIO(data)
    # Only frames are damaged, not the header behind them: the encoder's bytes differ between runs.
    damaged = bytearray(data)
    frames = slice(len(data) // 3, data.rindex(b"moov") - 4, 97)
    damaged[frames] = bytes(len(damaged[frames]))
    videos = [path, data, VideoFrames(pixels, 30), file, str(path), file, data, file]
    videos += [] if random else [bytes(damaged)]
    sampling = Sampling(num_frames=2, sampler="dense" if random else "released")
    transform = transforms.build("train" if random else "clip", 16)
    results = []
    for threads in (0, 1, 3):
        torch.manual_seed(0)
        clips = read_clips(
            iter(videos), sampling=sampling, transform=transform, num_threads=threads
        )
        results.append(list(clips))
    for clips in results[1:]:
        assert len(clips) == len(videos)
        assert all(torch.equal(a, b) for a, b in zip(clips, results[0], strict=True))
    if not random:
        assert all(torch.equal(clip, results[0][0]) for clip in results[0][:-1])


def test_few_videos_are_read_ahead_and_threads_end(data):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield data

    clips = read_clips(endless(), sampling=Sampling(num_frames=1), num_threads=2)
    assert taken == []
    for _ in range(5):
        next(clips)
    assert len(taken) == 5 + 2
    clips.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("openvclip-video")]


def test_the_error_of_one_video_names_it(path, tmp_path, pixels):
    missing = tmp_path / "none.mp4"
    for threads in (0, 2):
        clips = read_clips([path, b"text" * 99, missing], num_threads=threads)
        next(clips)
        with pytest.raises(VideoError, match=r"^videos\[1\]: <396 bytes>: cannot be read as a vid"):
            next(clips)
        with pytest.raises(VideoNotFoundError, match=rf"^videos\[0\]: {missing}: no such file"):
            next(read_clips([missing], num_threads=threads))
        with pytest.raises(VideoOptionError, match=r"^videos\[0\]: <90 frames>: the frame rate is"):
            next(read_clips([pixels], num_threads=threads))
    with pytest.raises(UsageError, match="Path; expected a list"):
        read_clips(path)
    with pytest.raises(VideoOptionError, match="num_threads=-1: expected a whole number from 0 up"):
        read_clips([path], num_threads=-1)


# --- wrong input ---------------------------------------------------------------------------------

FRAMES = np.zeros((4, 8, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("video", "error", "text"),
    [
        (FRAMES.astype(np.float32), VideoShapeError, r"0 and 1: pass \(video \* 255\).*uint8"),
        (torch.full((4, 3, 8, 8), 200), VideoShapeError, r"video\.to\(torch\.uint8\)"),
        (FRAMES - 1.5, VideoShapeError, "pixels before the normalisation, whole numbers"),
        (np.zeros((0, 8, 8, 3), np.uint8), VideoShapeError, "one of its dimensions is empty"),
        (np.zeros((4, 3, 8, 3), np.uint8), VideoShapeError, "does not tell the axis of the chan"),
        (np.zeros((3, 8, 12, 12), np.uint8), VideoShapeError, r"channels: frames\.swapaxes"),
        (np.zeros((8, 12, 3), np.uint8), VideoShapeError, r"frames\[\.\.\., None\]"),
        (FRAMES[None], VideoShapeError, "Pass the clips of a batch one by one"),
        (FRAMES.reshape(-1), VideoShapeError, r"bytes of a file as bytes: array\.tobytes"),
        (
            FRAMES,
            VideoOptionError,
            "the frame rate is not known, and the sampler 'rel",
        ),
        (VideoFrames(FRAMES), VideoOptionError, r"Give fps=, or VideoFrames\(frames, fps\)"),
        ([], UsageError, "video is a list; expected a path, .* The list is empty"),
        ([FRAMES[0]], UsageError, r"For a list of frames: VideoFrames\(frames, fps\)"),
        (None, UsageError, "video is a NoneType; expected a path"),
        (b"", VideoError, r"<0 bytes>: is empty \(0 bytes\)"),
        (io.BytesIO(), VideoError, r"<BytesIO>: the file is empty"),
        (io.StringIO("x"), UsageError, r'text mode; expected bytes: open\(path, "rb"\)'),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///a.ts\n", VideoError, "<32 bytes>: "),
        ("memory://none.mp4", VideoNotFoundError, "memory://none.mp4: no such file"),
        ("nowhere://a.mp4", VideoError, "Protocol not known: nowhere.* download the video first"),
    ],
)
def test_what_can_not_be_read(video, error, text):
    with pytest.raises(error, match=text):
        read_clip(video)


def test_wrong_rates_and_frames(path):
    for rate in (0, -1, float("nan"), "fast", True):
        with pytest.raises(VideoOptionError, match=f"fps={rate!r}: expected a number of frames"):
            read_clip(FRAMES, fps=rate)
    with pytest.raises(VideoOptionError, match=r"fps=30 with .*source\.mp4: fps is for arrays"):
        read_clip(path, fps=30)
    for frames, text in (
        ([], "frames is an empty list"),
        ([FRAMES[0], FRAMES[0, 1:]], r"different shapes: \[8, 12, 3\], \[7, 12, 3\]"),
        (["a.png"], "frames holds a str; expected arrays"),
        ("clip.mp4", "frames is a str; expected an array"),
        (FRAMES / 255, "float64"),
    ):
        with pytest.raises(VideoShapeError, match=text):
            VideoFrames(frames, 30)
    with pytest.raises(VideoOptionError, match="a timeline needs it"):
        sliding_windows(FRAMES, transform=lambda frame: frame)


def test_file_objects_that_fail(data):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > len(data) // 2:
                raise ConnectionError("the other end is gone")
            return super().read(min(size, 4096) if size > 0 else size)

    # Not taken for a truncated file, whose first frames are a video.
    with pytest.raises(VideoError, match=r"(can't be read|FFmpeg says).*the other end is gone"):
        read_clip(Failing(data), num_frames=90, sampler="uniform")
    closed = io.BytesIO(data)
    closed.close()
    with pytest.raises(VideoError, match="closed file"):
        read_clip(closed)

    class Upload:
        async def read(self):
            return data

    with pytest.raises(UsageError, match=r"asynchronous; .*await read\(\)"):
        read_clip(Upload())


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependencyError, match="pip install fsspec"):
        read_clip("https://example.org/clip.mp4")


@pytest.mark.parametrize(
    ("video", "name"),
    [
        ("a/b.mp4", "a/b.mp4"),
        (b"1234", "<4 bytes>"),
        (FRAMES, "<4 frames>"),
        (VideoFrames(FRAMES), "<4 frames>"),
        (FRAMES[0], "<ndarray uint8 [8, 12, 3]>"),
        (io.BytesIO(), "<BytesIO>"),
        (SimpleNamespace(name="up.mp4", read=None), "up.mp4"),
    ],
)
def test_names(video, name):
    assert source_name(video) == name


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_nothing_stays_open(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_clip(path.as_uri(), num_frames=1)
        with pytest.raises(VideoError):
            read_clip(b"text" * 99)
        windows = sliding_windows(path.as_uri(), transform=lambda frame: frame)
        next(windows)
        windows.close()
    assert len(os.listdir("/proc/self/fd")) == before
