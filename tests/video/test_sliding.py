"""Windows that slide over a video, against a slow choice among all frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openvclip.errors import VideoError, VideoNotFoundError, VideoOptionError
from openvclip.video.sliding import sliding_windows

Encode = Callable[..., Path]
Numbers = Callable[[Any], list[Any]]


def whole(frame: Tensor) -> Tensor:
    return frame


def expected(
    frames: int, fps: float, count: int, seconds: float, step: float
) -> list[tuple[float, float, list[int]]]:
    """Frame n is displayed from n / fps on; a window takes the frames displayed at its times."""
    length = frames / fps
    windows: list[tuple[float, float, list[int]]] = []
    while not windows or (windows[-1][1] < length and len(windows) * step < length):
        start = len(windows) * step
        times = [start + i * seconds / count for i in range(count)]
        indices = [min(int(time * fps + 1e-6), frames - 1) for time in times]
        windows.append((start, min(start + seconds, length), indices))
    return windows


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
@pytest.mark.parametrize(
    ("frames", "count", "seconds", "step"),
    [(90, 4, 1.0, 0.5), (90, 8, 128 / 30, None), (61, 5, 0.5, 0.7), (7, 3, 0.05, 0.05)],
)
def test_windows_equal_a_slow_choice(
    encode: Encode,
    numbers: Numbers,
    suffix: str,
    frames: int,
    count: int,
    seconds: float,
    step: float | None,
) -> None:
    path = encode(f"slide-{frames}.{suffix}", frames=frames)
    windows = list(
        sliding_windows(path, transform=whole, num_frames=count, seconds=seconds, step=step)
    )
    wanted = expected(frames, 30, count, seconds, seconds / 2 if step is None else step)
    assert [numbers(window.clip) for window in windows] == [window[2] for window in wanted]
    times = torch.tensor([(window.start, window.end) for window in windows])
    torch.testing.assert_close(
        times, torch.tensor([window[:2] for window in wanted]), atol=2e-3, rtol=0
    )


def test_frames_are_transformed_once_and_few_are_kept(encode: Encode) -> None:
    path = encode("slide-calls.mp4", frames=300)
    calls = []

    def counting(frame: Tensor) -> Tensor:
        calls.append(frame.shape)
        return frame.float()

    windows = sliding_windows(path, transform=counting, num_frames=4, seconds=2, step=1)
    next(windows)
    assert len(calls) <= 3 + 4  # the first window and what the second has of the same time
    rest = list(windows)
    assert len(rest) == 8
    assert len(calls) == 20  # a frame every half second of 10 seconds, in two windows or not
    assert {tuple(shape) for shape in calls} == {(1, 3, 64, 144)}


def test_times_count_from_the_first_frame_and_follow_a_variable_rate(
    encode: Encode, numbers: Numbers
) -> None:
    stamps = [5000, 5100, 5200, 6200, 6300, 6400]  # milliseconds; frame 2 is displayed for a second
    path = encode("slide-vfr.mkv", frames=6, times=stamps)
    windows = list(sliding_windows(path, transform=whole, num_frames=2, seconds=0.5, step=0.5))
    assert [numbers(window.clip) for window in windows] == [[0, 2], [2, 2], [2, 3]]
    assert [window.start for window in windows] == [0.0, 0.5, 1.0]


def test_bad_input(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    path = encode("slide-bad.mp4", frames=5)
    with pytest.raises(VideoNotFoundError, match="absent"):
        sliding_windows(tmp_path / "absent.mp4", transform=whole)
    with pytest.raises(VideoError, match=r"text\.mp4"):
        list(sliding_windows(tmp_path / "text.mp4", transform=whole))
    for settings in ({"seconds": 0}, {"step": float("nan")}, {"num_frames": 0}):
        with pytest.raises(VideoOptionError, match=next(iter(settings))):
            sliding_windows(path, transform=whole, **settings)
