"""Encode the windows of many videos: threads decode, and batches hold windows of several videos."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from openvclip.errors import UsageError, VideoError, VideoOptionError, VideoShapeError
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.shards import Vectors
from openvclip.search.windows import WindowSettings
from openvclip.video.ahead import default_threads
from openvclip.video.sliding import SlidingWindow, sliding_windows
from openvclip.video.sources import VideoSource

__all__ = [
    "BuildOptions",
    "Encoded",
    "EncodedVideo",
    "Ended",
    "encode_windows",
    "whole_videos",
]

_WAIT = 0.1  # seconds after which a decoding thread looks whether it should end
_PATIENCE = 5.0  # seconds to wait for the threads at the end; a server may not answer


@dataclass(frozen=True)
class BuildOptions:
    """How videos are decoded and encoded.

    Attributes:
        batch_size: number of windows to encode at a time.
        num_threads: number of threads that decode videos; see
            :func:`openvclip.video.read_clips`. With 0, this thread decodes.

    Raises:
        UsageError: ``batch_size`` is not a whole number of at least 1.
        VideoOptionError: ``num_threads`` is negative.
    """

    batch_size: int = 16
    num_threads: int | None = None

    def __post_init__(self) -> None:
        default_threads(self.num_threads)
        size = self.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"batch_size={size!r}: expected a whole number of at least 1.")


class Encoded(NamedTuple):
    """Some neighbouring windows of a video.

    Attributes:
        place: the place of the video among all videos.
        times: start and end in seconds, float64 ``[n, 2]``.
        vectors: float16 ``[n, D]``, rows of unit length.
    """

    place: int
    times: NDArray[np.float64]
    vectors: Vectors


class Ended(NamedTuple):
    """The end of a video: all of its windows were yielded before.

    Attributes:
        place: the place of the video among all videos.
        error: why the video can't be read; ``None`` if it was read.
        damage: why only a part of the video was read; ``None`` if all of it was.
    """

    place: int
    error: str | None = None
    damage: str | None = None


def encode_windows(
    model: VideoCLIP,
    videos: Iterable[VideoSource],
    windows: WindowSettings,
    options: BuildOptions | None = None,
) -> Generator[Encoded | Ended, None, None]:
    """Return an iterator over the vectors of the windows of videos.

    Each video is decoded once, by one thread. Memory holds a few batches of windows, whatever the
    number and the length of the videos. A batch holds windows of several videos, if these are
    short. When the iterator is closed, the threads end.

    Args:
        model: the model.
        videos: the videos. An iterator is read ahead by one video for each thread.
        windows: how a video is cut into windows.
        options: how videos are decoded and encoded.

    Yields:
        :class:`Encoded` for some windows, in the order of their video; and :class:`Ended` once for
        each video. Several videos take turns.

    Raises:
        NonFiniteWeightsError, EvaluationError: the features are not finite.
        MissingDependencyError: PyAV is not installed.
    """
    options = options or BuildOptions()
    threads = default_threads(options.num_threads)
    if isinstance(videos, Sized):
        threads = min(threads, len(videos))
    transform = model.transform.with_(crops=1)  # a vector of each window, of its centre

    def decode(video: VideoSource, damaged: Callable[[str], object]) -> Iterator[SlidingWindow]:
        return sliding_windows(
            video,
            transform=transform,
            num_frames=windows.num_frames,
            seconds=windows.seconds,
            step=windows.step,
            alone=threads < 2,
            damaged=damaged,
        )

    decoded = _Decoding(decode, videos, threads, 2 * options.batch_size).events()
    with closing(decoded):
        yield from _encoded(model, decoded, options.batch_size)


class EncodedVideo(NamedTuple):
    """All windows of a video.

    Attributes:
        place: the place of the video among all videos.
        times: start and end in seconds, float64 ``[n, 2]``.
        vectors: float16 ``[n, D]``, rows of unit length.
        error: why the video can't be read, and then there are no windows; or ``None``.
        damage: see :class:`Ended`.
    """

    place: int
    times: NDArray[np.float64]
    vectors: Vectors
    error: str | None = None
    damage: str | None = None


def whole_videos(events: Iterable[Encoded | Ended]) -> Iterator[EncodedVideo]:
    """Yield all windows of a video together, in the order in which the videos end.

    Args:
        events: see :func:`encode_windows`.
    """
    begun: dict[int, list[Encoded]] = {}
    for event in events:
        if isinstance(event, Encoded):
            begun.setdefault(event.place, []).append(event)
            continue
        parts = begun.pop(event.place, [])
        if event.error is not None:
            nothing = np.empty((0, 0), np.float16)
            yield EncodedVideo(event.place, np.empty((0, 2)), nothing, event.error)
        else:
            times = np.concatenate([part.times for part in parts])
            vectors = np.concatenate([part.vectors for part in parts])
            yield EncodedVideo(event.place, times, vectors, damage=event.damage)


def _encoded(
    model: VideoCLIP, decoded: Iterable[_Event], batch_size: int
) -> Iterator[Encoded | Ended]:
    batch: list[tuple[int, SlidingWindow]] = []
    ended: list[Ended] = []  # videos that end with windows of the batch
    for event in decoded:
        if isinstance(event, Ended):
            if all(event.place != place for place, _ in batch):
                yield event
            else:
                ended.append(event)
            continue
        batch.append(event)
        if len(batch) == batch_size:
            yield from _encode(model, batch)
            yield from ended
            batch, ended = [], []
    if batch:
        yield from _encode(model, batch)
        yield from ended


def _encode(model: VideoCLIP, batch: Sequence[tuple[int, SlidingWindow]]) -> Iterator[Encoded]:
    features = model.encode_clips(torch.stack([window.clip for _, window in batch]))
    vectors = features.to(torch.float16).cpu().numpy()
    times = np.array([(window.start, window.end) for _, window in batch])
    places = np.array([place for place, _ in batch])
    for place in dict.fromkeys(places.tolist()):
        rows = places == place
        yield Encoded(place, times[rows], vectors[rows])


_Event = tuple[int, SlidingWindow] | Ended
"""The place of a video and one of its windows, or the end of a video."""
_Decode = Callable[[Any, Callable[[str], object]], Iterator[SlidingWindow]]
"""A function from a video, and a function that notes damage, to the windows of the video."""


class _Decoding:
    """Decodes videos in threads, which wait when enough windows are ready.

    Args:
        decode: function from a video to its windows.
        videos: the videos.
        threads: number of threads; with 0 the thread of the caller decodes.
        ready: number of windows that wait to be encoded, at most.
    """

    def __init__(self, decode: _Decode, videos: Iterable[Any], threads: int, ready: int) -> None:
        self._decode, self._threads = decode, threads
        self._ready: queue.Queue[_Event | BaseException | None] = queue.Queue(ready)
        self._videos = enumerate(videos)
        self._turn = threading.Lock()
        self._stopped = threading.Event()

    def events(self) -> Generator[_Event, None, None]:
        """Yield the windows and the ends of all videos. Close the generator to end the threads."""
        if not self._threads:
            for place, video in self._videos:
                yield from self._events_of(place, video)
            return
        # At its end, Python waits for the threads of a pool, but not for these.
        threads = [
            threading.Thread(target=self._work, name=f"openvclip-index-{number}", daemon=True)
            for number in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            working = self._threads
            while working:
                event = self._ready.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    working -= 1
                else:
                    yield event
        finally:
            self._stopped.set()
            patience = time.monotonic() + _PATIENCE
            for thread in threads:
                thread.join(max(0.0, patience - time.monotonic()))

    def _work(self) -> None:
        try:
            while True:
                with self._turn:
                    item = next(self._videos, None)
                if item is None:
                    self._put(None)
                    return
                with closing(self._events_of(*item)) as events:
                    for event in events:
                        if not self._put(event):
                            return
        except BaseException as error:  # an error of the program, which the caller gets
            self._put(error)

    def _put(self, event: _Event | BaseException | None) -> bool:
        """Hand over an event; return ``False`` if the caller needs no more."""
        while not self._stopped.is_set():
            try:
                self._ready.put(event, timeout=_WAIT)
            except queue.Full:
                continue
            return True
        return False

    def _events_of(self, place: int, video: Any) -> Generator[_Event, None, None]:
        damage: list[str] = []
        try:
            for window in self._decode(video, damage.append):
                yield place, window
        except (VideoError, VideoShapeError, VideoOptionError, UsageError) as error:
            yield Ended(place, str(error))
        else:
            yield Ended(place, None, damage[0] if damage else None)
