"""The frames of torchcodec are PyAV's; where it is absent, only its error is tested."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

from openvclip.errors import MissingDependencyError, VideoError
from openvclip.video import Sampling, VideoDataset, _torchcodec, read_clip
from tests.video.formats import FORMATS
from tests.video.mp4 import with_edits, with_matrix

# The two packages contain different versions of FFmpeg, which round RGB differently.
GREY_LEVELS = 3


@pytest.fixture
def decoded(monkeypatch):
    """Load torchcodec or skip; count the clips that torchcodec decoded and that PyAV decoded."""
    try:
        _torchcodec.require_torchcodec()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    answers = []
    original = _torchcodec.decode_frames

    def noting(*arguments):
        answers.append(original(*arguments))
        return answers[-1]

    monkeypatch.setattr("openvclip.video.decoding.decode_frames", noting)
    return answers


def both(path, **options):
    seed = torch.Generator()
    clips = [
        read_clip(path, backend=backend, generator=seed.manual_seed(3), **options)
        for backend in ("pyav", "torchcodec")
    ]
    assert clips[0].shape == clips[1].shape
    assert clips[1].dtype == torch.uint8
    assert clips[1].is_contiguous()
    return (clips[0].int() - clips[1].int()).abs().max().item()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, encode, decoded):
    path = encode(**FORMATS[kind])
    for sampler in ("released", "uniform", "dense"):
        options = {"num_frames": 4, "sampling_rate": 8, "views": 2, "sampler": sampler}
        assert both(path, **options) <= GREY_LEVELS
    # MPEG-TS with B-frames and raw streams have no time stamps to count by
    assert len(decoded) == (0 if kind in ("h264 in MPEG-TS", "h264 elementary") else 3)
    assert not any(frames is None for frames in decoded)


def test_real_clips(clips, golden_sampling, decoded):
    far = {}
    for name in golden_sampling:
        difference = both(clips / name, views=3)
        if difference > GREY_LEVELS:
            far[name] = difference
    assert far == {}
    assert not any(frames is None for frames in decoded)
    assert len(decoded) == 73 - 16  # 16 of UCF-101 and HMDB-51 are AVI files with B-frames


def test_times(encode, decoded):
    slow = [1000 * i for i in range(40)] + [40_000 + 40 * i for i in range(40)]
    late = [10_000 + 40 * i for i in range(80)]
    for name, times in (("vfr", slow), ("late", late)):
        for suffix in ("mp4", "mkv"):
            path = encode(f"torchcodec-{name}.{suffix}", frames=80, fps=25, times=times)
            for sampler in ("released", "uniform"):
                assert both(path, num_frames=4, views=3, sampler=sampler) <= GREY_LEVELS
    assert len(decoded) == 8
    assert not any(frames is None for frames in decoded)


def test_rotation(encode, decoded, tmp_path):
    data = encode("torchcodec-upright.mp4", frames=4).read_bytes()
    header = data.index(b"tkhd")
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    for a, b, c, d in ((0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)):
        matrix = struct.pack(">9i", *(65536 * x for x in (a, b, 0, c, d, 0, 0, 0)), 2**30)
        turned = tmp_path / "turned.mp4"
        turned.write_bytes(data[:header] + data[header:].replace(identity, matrix, 1))
        assert both(turned, num_frames=2) <= GREY_LEVELS
    assert len(decoded) == 3


def test_damaged_files_are_left_to_pyav(encode, decoded, tmp_path):
    options = {"x264-params": "bframes=2:keyint=6"}
    faststart = {"movflags": "faststart"}
    whole = encode("torchcodec-whole.mp4", options=options, container_options=faststart)
    path = tmp_path / "cut.mp4"
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert both(path, views=3) == 0
    small, large = (encode(f"torchcodec-{n}.ts", frames=20, size=(n, 64),
                           options={"x264-params": "bframes=0"}) for n in (144, 288))  # fmt: skip
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    assert both(joined, sampler="uniform") <= GREY_LEVELS
    with pytest.raises(VideoError, match=r"none\.mp4"):
        read_clip(tmp_path / "none.mp4", backend="torchcodec")


def test_a_data_set(encode, decoded):
    path = encode("torchcodec-set.mp4")
    data = VideoDataset(
        [(path.name, 0)], path.parent, transform=None, sampling=Sampling(backend="torchcodec")
    )
    assert data[0][0].shape == (8, 3, 64, 144)
    assert len(decoded) == 1


def test_without_torchcodec(monkeypatch, encode):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    path = encode("torchcodec-absent.mp4", frames=4)
    with pytest.raises(MissingDependencyError, match="backend='pyav' needs neither"):
        read_clip(path, backend="torchcodec")
    data = VideoDataset(
        [(path.name, 0)], path.parent, transform=None, sampling=Sampling(backend="torchcodec")
    )
    with pytest.raises(MissingDependencyError):
        data[0]


def test_what_torchcodec_shows_otherwise_is_left_to_pyav(encode, decoded, tmp_path):
    """Report 03 (mpv#16090): torchcodec does not mirror."""
    data = encode("torchcodec-mirror.mp4", frames=4).read_bytes()
    path = tmp_path / "mirrored.mp4"
    for matrix in ((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)):
        path.write_bytes(with_matrix(data, *matrix))
        assert both(path, num_frames=2) == 0
    assert decoded == [None] * 4


def test_edit_lists(encode, decoded, tmp_path):
    """Report 01 (vllm#48608): both backends take the frames that are shown."""
    options = {"x264-params": "bframes=0:keyint=60"}
    data = encode("torchcodec-edits.mp4", frames=150, options=options).read_bytes()
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(data, [(3000, 43 * 512)]))
    for sampler in ("released", "uniform", "dense"):
        assert both(path, num_frames=4, views=3, sampler=sampler) <= GREY_LEVELS
