"""The sampler of the retrieval benchmarks: one frame for each second, at most T frames."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from openvclip.errors import ContractError, VideoError, VideoOptionError, VideoShapeError
from openvclip.models.usage import frames_section
from openvclip.video import (
    Sampling,
    VideoDataset,
    VideoFrames,
    _pictures,
    pad_clips,
    pad_samples,
    read_clip,
    transforms,
)
from openvclip.video.sampling import StreamInfo, plan
from tests.helpers import GOLDEN

LEFT_OUT = "playing_drums/sample_demo_22.mp4"  # OpenCV's seek misses there: golden/README.md


def released(fps: float, frames: int, most: int, last: int | None = None) -> list[int]:
    """The rule of the released code, second by second, for a file with exact numbers."""
    rate = int(fps)
    end = (frames + rate - 1) // rate
    if last is not None:
        end = min(end, last)
    taken = []
    for second in range(end + 1):
        if second * rate >= frames:  # this frame can't be read
            break
        taken.append(second * rate)
    if len(taken) <= most:
        return taken
    return [taken[int(place)] for place in np.linspace(0, len(taken) - 1, num=most, dtype=int)]


@given(
    fps=st.floats(1, 240),
    frames=st.integers(1, 20_000),
    most=st.integers(1, 80),
    last=st.none() | st.integers(0, 40),
)
def test_the_frames_are_those_of_the_released_loop(
    fps: float, frames: int, most: int, last: int | None
) -> None:
    sampling = Sampling(num_frames=most, sampler="seconds", last_second=last)
    (window,) = plan(StreamInfo(fps, frames, frames), sampling)
    assert list(window.offsets) == released(fps, frames, most, last)
    assert window.start is None
    assert len(window.offsets) <= most


def test_below_a_frame_in_a_second_each_frame_is_taken() -> None:
    (window,) = plan(StreamInfo(0.5, 4), Sampling(sampler="seconds"))
    assert window.offsets == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "codec", "fps", "frames"),
    [
        ("s.mp4", "libx264", 30, 95),
        ("s.mkv", "libx264", Fraction(24000, 1001), 60),  # 23.976 is rounded down to 23
        ("s.avi", "mpeg4", 10, 42),
        ("s.ts", "libx264", 25, 76),
        ("s.gif", "gif", 10, 21),
    ],
)
def test_the_frames_of_files(
    name: str, codec: str, fps: Any, frames: int, encode: Any, numbers: Any
) -> None:
    pixel_format = "rgb8" if codec == "gif" else "yuv420p"
    path = encode(name, codec=codec, fps=fps, frames=frames, pixel_format=pixel_format)
    for most in (1, 3, 12):
        clip = read_clip(path, sampler="seconds", num_frames=most)
        expected = released(float(fps), frames, most)
        assert clip.shape[:3] == (1, len(expected), 3)
        assert clip.dtype == torch.uint8
        assert numbers(clip) == [expected]
    assert numbers(read_clip(path, sampler="seconds", last_second=1)) == [[0, int(fps)]]


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
def test_a_long_video_is_read_with_seeks(
    backend: Any, encode: Any, numbers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torchcodec":
        pytest.importorskip("torchcodec")
    options = {"x264-params": "keyint=10", "preset": "ultrafast"}
    path = encode("sparse.mp4", frames=300, fps=3, options=options)  # 100 seconds
    made = []
    original = _pictures.Pictures.__call__
    monkeypatch.setattr(
        _pictures.Pictures, "__call__", lambda self, frame: made.append(1) or original(self, frame)
    )
    clip = read_clip(path, sampler="seconds", num_frames=5, backend=backend)
    assert numbers(clip) == [released(3, 300, 5)]
    assert len(made) <= 5, "the other frames are decoded, but never converted or kept"


def test_a_file_that_ends_early_has_the_seconds_that_it_has(
    encode: Any, numbers: Any, tmp_path: Path
) -> None:
    """The header counts frames that the file does not hold: no frame is repeated for them."""
    for name, codec in (("cut.mp4", "libx264"), ("cut.avi", "mpeg4"), ("cut.mkv", "libx264")):
        flags = {"movflags": "faststart"} if name.endswith("mp4") else {}
        options = {"preset": "ultrafast"} if codec == "libx264" else {}
        whole = encode(
            name, codec=codec, frames=120, fps=5, options=options, container_options=flags
        )
        content = whole.read_bytes()
        path = tmp_path / name
        path.write_bytes(content[: len(content) * 6 // 10])
        everything = numbers(read_clip(path, num_frames=500, sampler="uniform"))[0]
        n = max(everything) + 1
        assert 20 < n < 110
        for most in (4, 12, 40):
            assert numbers(read_clip(path, sampler="seconds", num_frames=most)) == [
                released(5, n, most)
            ], name


def test_arrays_of_frames(numbers: Any) -> None:
    frames = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 4, 4)
    clip = read_clip(frames, fps=9.5, sampler="seconds")
    assert clip[0, :, 0, 0, 0].tolist() == released(9.5, 50, 8)
    with pytest.raises(VideoOptionError, match="frame rate is not known, and the sampler 'seconds"):
        read_clip(VideoFrames(frames), sampler="seconds")


def test_the_transform_sees_each_frame(encode: Any) -> None:
    path = encode("transformed.mp4", frames=70)
    transform = transforms.build("clip", 32)
    clip = read_clip(path, sampler="seconds")
    pixels = read_clip(path, sampler="seconds", transform=transform)
    assert pixels.shape == (1, 3, 3, 32, 32)
    assert torch.equal(pixels, transform(clip))


def test_options_that_do_not_fit() -> None:
    with pytest.raises(VideoOptionError, match="views=2 with the sampler 'seconds'"):
        Sampling(sampler="seconds", views=2)
    with pytest.raises(VideoOptionError, match="last_second=3 with the sampler 'released': only"):
        Sampling(last_second=3)
    for wrong in (-1, 1.5, True):
        with pytest.raises(VideoOptionError, match=r"last_second=.*whole number"):
            Sampling(sampler="seconds", last_second=wrong)  # type: ignore[arg-type]
    assert frames_section(Sampling(sampler="seconds")).sampler == "seconds"
    with pytest.raises(ContractError, match="last_second=31, which can't be stored"):
        frames_section(Sampling(sampler="seconds", last_second=31))


# --- batches -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_padding_is_zeros_that_the_mask_leaves_out(lengths: list[int], crops: bool) -> None:
    lead = (3,) if crops else ()
    clips = [torch.randn(*lead, n, 3, 2, 2) for n in lengths]
    video, mask = pad_clips(clips)
    assert video.shape == (len(lengths), *lead, max(lengths), 3, 2, 2)
    for row, kept, clip, n in zip(video, mask, clips, lengths, strict=True):
        assert kept.tolist() == [i < n for i in range(max(lengths))]
        assert torch.equal(row[..., :n, :, :, :], clip)
        assert not row[..., n:, :, :, :].any()


def test_clips_that_can_not_be_padded() -> None:
    for clips in ([], [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)], [torch.zeros(3, 4, 4)]):
        with pytest.raises(VideoShapeError, match="expected at least one clip"):
            pad_clips(clips)


def test_a_loader_of_clips_of_different_lengths(encode: Any, tmp_path: Path) -> None:
    paths = [encode(f"loaded-{n}.mp4", frames=n, fps=10, size=(32, 32)) for n in (15, 35)]
    samples = [(str(paths[0]), 0), ("gone.mp4", 1), (str(paths[1]), 2)]
    dataset = VideoDataset(
        samples,
        tmp_path,
        transform=transforms.build("clip", 16),
        sampling=Sampling(num_frames=12, sampler="seconds"),
        details=True,
    )
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=pad_samples)
    assert batch.video.shape == (3, 12, 3, 16, 16)  # black frames stand for the missing video
    assert batch.mask.sum(dim=1).tolist() == [2, 12, 4]
    assert batch.label.tolist() == batch.position.tolist() == [0, 1, 2]
    assert [bool(reason) for reason in batch.error] == [False, True, False]


# --- the released code on real clips -------------------------------------------------------------


def test_real_clips(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openvclip.video import decoding

    golden = json.loads((GOLDEN / "retrieval_frames.json").read_text())
    pixels = load_file(str(GOLDEN / "retrieval_pixels.safetensors"))
    transform = transforms.build("clip", 224)
    planned: list[tuple[int, ...]] = []
    original: Callable[..., Any] = decoding.plan

    def noted(*options: Any) -> Any:
        windows = original(*options)
        planned.append(windows[0].offsets)
        return windows

    monkeypatch.setattr(decoding, "plan", noted)
    assert len(golden) == 73
    for name, entry in golden.items():
        clip = read_clip(clips / name, sampler="seconds", num_frames=12, transform=transform)
        info = StreamInfo(entry["fps"], entry["decoded"])
        (rule,) = plan(info, Sampling(num_frames=12, sampler="seconds"))
        assert list(planned[-1]) == list(rule.offsets), name
        if name == LEFT_OUT:
            assert math.ceil(entry["decoded"] / entry["fps"]) > 12
            continue
        assert list(planned[-1]) == entry["slice12"], name
        (whole,) = plan(info, Sampling(num_frames=1000, sampler="seconds"))
        assert list(whole.offsets) == entry["indices"], name
        pooled = torch.nn.functional.avg_pool2d(clip[0], 32)
        assert pooled.shape == pixels[name].shape, name
        assert (pooled - pixels[name].float()).abs().max() < 4e-3, name


def test_a_broken_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 4000)
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        read_clip(tmp_path / "broken.mp4", sampler="seconds")
