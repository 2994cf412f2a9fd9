from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openvclip.errors import VideoOptionError
from openvclip.video.sampling import SAMPLERS, Sampling, StreamInfo, Window, plan, select

INFOS = st.builds(
    StreamInfo,
    fps=st.floats(0.01, 1000),
    frames=st.integers(1, 5000),
    duration=st.none() | st.integers(1, 10**9),
    start=st.integers(-1000, 10**6),
)


def test_golden_frames_of_real_clips(clips, golden_sampling):
    """Every clip's stream is decoded once for its time stamps; the sampler alone is tested here."""
    from openvclip.video._stream import Stream, index_packets, with_count

    wrong = []
    for name, entry in golden_sampling.items():
        path = str(clips / name)
        with Stream(path) as stream:
            info = stream.info
            # mpeg4 in AVI gets its time stamps from the decoder; others have them in the packets
            packets = index_packets(path)
            if stream.seekable and packets.count == entry["frames"]:
                stamps = list(packets.stamps)
            else:
                stamps = [stamp for stamp, _ in stream.frames()]
        assert len(stamps) == entry["frames"], name
        if not info.timed:
            info = with_count(info, len(stamps))
        views = [select(stamps, window) for window in plan(info, Sampling(views=3))]
        if not all(
            index in allowed
            for view, expected in zip(views, entry["indices"], strict=True)
            for index, allowed in zip(view, expected, strict=True)
        ):
            wrong.append(name)
    assert len(golden_sampling) == 73
    assert not wrong


def test_released_windows_by_hand():
    # 30 frames a second: S = ceil(16 * 7 / 30 * 30) = 112, delta = 300 - 112 = 188
    windows = plan(StreamInfo(fps=30.0, frames=300, duration=300 * 512), Sampling(views=3))
    assert [w.start for w in windows] == [0, int(188 / 3 * 512), int(376 / 3 * 512)]
    ends = [111, 188 / 3 + 111, 376 / 3 + 111]
    assert [w.end for w in windows] == [int(end * 512) for end in ends]
    # linspace(0, 128 - 1, 8) = 0, 18.14, ..., 127, the last beyond the window of 113 frames
    assert windows[0].offsets == (0, 18, 36, 54, 72, 90, 108, 127)
    stamps = [512 * i for i in range(300)]
    assert select(stamps, windows[0]) == [0, 18, 36, 54, 72, 90, 108, 112]
    assert select(stamps, windows[1])[0] == 63  # 62.67 frames: up to the next where ticks are fine
    coarse = plan(StreamInfo(fps=30.0, frames=300, duration=300), Sampling(views=3))
    assert select(range(300), coarse[1])[0] == 62  # and down where a tick is a frame


def test_released_without_duration():
    # delta = 300 - 128 = 172; views at 0, 86, 172
    windows = plan(StreamInfo(fps=30.0, frames=300, counted=True), Sampling(views=3))
    assert [w.offsets[0] for w in windows] == [0, 86, 172]
    assert [w.offsets[-1] for w in windows] == [127, 213, 299]
    assert plan(StreamInfo(fps=30.0, frames=300))[0].offsets[0] == 86
    short = plan(StreamInfo(fps=30.0, frames=10), Sampling(views=2))
    assert short[1].offsets == (0, 9, 9, 9, 9, 9, 9, 9)


def test_uniform_takes_segment_centres():
    assert plan(StreamInfo(30.0, 80), Sampling(num_frames=8, sampler="uniform"))[0].offsets == (
        5, 15, 25, 35, 45, 55, 65, 75,
    )  # fmt: skip
    # fewer frames than segments: frames repeat, in order
    assert plan(StreamInfo(30.0, 3), Sampling(num_frames=6, sampler="uniform"))[0].offsets == (
        0, 0, 1, 1, 2, 2,
    )  # fmt: skip
    both = plan(StreamInfo(30.0, 80), Sampling(num_frames=4, views=2, sampler="uniform"))
    assert [w.offsets for w in both] == [(5, 25, 45, 65), (15, 35, 55, 75)]


def test_dense_starts_are_uniform_and_repeatable():
    info = StreamInfo(fps=30.0, frames=1112, duration=1112)  # delta = 1000
    generator = torch.Generator().manual_seed(3)
    starts = [
        w.start for w in plan(info, Sampling(views=2000, sampler="dense"), generator=generator)
    ]
    assert 0 <= min(starts) < 20
    assert 980 < max(starts) <= 1000
    assert abs(sum(starts) / 2000 - 500) < 4 * 1000 / math.sqrt(12 * 2000)
    again = plan(info, Sampling(views=2000, sampler="dense"), generator=generator.manual_seed(3))
    assert [w.start for w in again] == starts


def test_late_start_moves_the_windows():
    early = plan(StreamInfo(25.0, 200, 200 * 40), Sampling(views=3))
    late = plan(StreamInfo(25.0, 200, 200 * 40, start=90_000), Sampling(views=3))
    assert [w.start - 90_000 for w in late] == [w.start for w in early]
    stamps = [40 * i for i in range(200)]
    shifted = [90_000 + stamp for stamp in stamps]
    for one, other in zip(early, late, strict=True):
        assert select(stamps, one) == select(shifted, other)


@given(INFOS, st.sampled_from(SAMPLERS), st.integers(1, 12), st.integers(1, 40), st.integers(1, 4))
def test_any_stream_gives_frames_of_it_in_order(info, sampler, num_frames, rate, views):
    tick = max(1, (info.duration or 1) // info.frames)
    stamps = [info.start + i * tick for i in range(min(info.frames, 300))]
    windows = plan(
        info, Sampling(sampler=sampler, num_frames=num_frames, sampling_rate=rate, views=views)
    )
    assert len(windows) == views
    for window in windows:
        chosen = select(stamps, window)
        assert len(chosen) == num_frames
        assert chosen == sorted(chosen)
        assert chosen[0] >= 0
        assert chosen[-1] < len(stamps)


def test_select_sorts_by_time_stamp_as_released():
    window = Window(1, 4, (0, 1, 2, 3, 9))
    # time stamps run back; 5 is the first beyond the end and closes the window, 3 comes too late
    assert select([0, 2, 1, 4, 5, 3], window) == [2, 1, 3, 4, 4]
    assert select([0, 1, 1, 2, 9], window) == [2, 3, 4, 4, 4]  # of two equal ones the last
    assert select([0], window) == [0] * 5  # behind the end of the video: its last frame
    assert select([], window) == []


def test_options_are_checked():
    with pytest.raises(VideoOptionError, match="sampler='x' is not known"):
        Sampling(sampler="x")
    with pytest.raises(VideoOptionError, match="views=0"):
        Sampling(views=0)
