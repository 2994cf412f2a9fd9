"""Encode the windows of many videos: threads decode, and batches hold windows of several videos."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

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

__all__ = ["BuildOptions", "Encoded", "Ended", "encode_windows"]

_WAIT = 0.1  # seconds after which a decoding thread looks whether it should end


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
        error: why the video can't be read; ``None`` if it was read to its end.
    """

    place: int
    error: str | None


def encode_windows(
    model: VideoCLIP,
    videos: Sequence[VideoSource],
    windows: WindowSettings,
    options: BuildOptions | None = None,
) -> Generator[Encoded | Ended, None, None]:
    """Return an iterator over the vectors of the windows of videos.

    Each video is decoded once, by one thread. Memory holds a few batches of windows, whatever the
    number and the length of the videos. A batch holds windows of several videos, if these are
    short. When the iterator is closed, the threads end.

    Args:
        model: the model.
        videos: the videos.
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
    threads = min(default_threads(options.num_threads), len(videos))
    transform = model.transform.with_(crops=1)  # a vector of each window, of its centre

    def decode(place: int) -> Iterator[SlidingWindow]:
        return sliding_windows(
            videos[place],
            transform=transform,
            num_frames=windows.num_frames,
            seconds=windows.seconds,
            step=windows.step,
            alone=threads < 2,
        )

    decoded = _Decoding(decode, len(videos), threads, 2 * options.batch_size).events()
    with closing(decoded):
        yield from _encoded(model, decoded, options.batch_size)


def _encoded(
    model: VideoCLIP, decoded: Iterable[_Event], batch_size: int
) -> Iterator[Encoded | Ended]:
    batch: list[tuple[int, SlidingWindow]] = []
    ended: list[Ended] = []  # videos that end with windows of the batch
    for place, content in decoded:
        if isinstance(content, SlidingWindow):
            batch.append((place, content))
            if len(batch) == batch_size:
                yield from _encode(model, batch)
                yield from ended
                batch, ended = [], []
        elif any(place == other for other, _ in batch):
            ended.append(Ended(place, content))
        else:
            yield Ended(place, content)
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


_Event = tuple[int, SlidingWindow | str | None]
"""A window of the video at a place, or the end of the video with the reason of an error."""


class _Decoding:
    """Decodes videos in threads, which wait when enough windows are ready.

    Args:
        decode: function from the place of a video to its windows.
        count: number of videos.
        threads: number of threads; with 0 the thread of the caller decodes.
        ready: number of windows that wait to be encoded, at most.
    """

    def __init__(
        self, decode: Callable[[int], Iterator[SlidingWindow]], count: int, threads: int, ready: int
    ) -> None:
        self._decode, self._count, self._threads = decode, count, threads
        self._ready: queue.Queue[_Event | BaseException] = queue.Queue(ready)
        self._places = iter(range(count))
        self._turn = threading.Lock()
        self._stopped = threading.Event()

    def events(self) -> Generator[_Event, None, None]:
        """Yield the windows and the ends of all videos. Close the generator to end the threads."""
        if not self._threads:
            for place in self._places:
                yield from self._events_of(place)
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="openvclip-index") as pool:
            for _ in range(self._threads):
                pool.submit(self._work)
            try:
                left = self._count
                while left:
                    event = self._ready.get()
                    if isinstance(event, BaseException):
                        raise event
                    left -= not isinstance(event[1], SlidingWindow)
                    yield event
            finally:
                self._stopped.set()

    def _work(self) -> None:
        try:
            while True:
                with self._turn:
                    place = next(self._places, None)
                if place is None:
                    return
                with closing(self._events_of(place)) as events:
                    for event in events:
                        if not self._put(event):
                            return
        except BaseException as error:  # an error of the program, which the caller gets
            self._put(error)

    def _put(self, event: _Event | BaseException) -> bool:
        """Hand over an event; return ``False`` if the caller needs no more."""
        while not self._stopped.is_set():
            try:
                self._ready.put(event, timeout=_WAIT)
            except queue.Full:
                continue
            return True
        return False

    def _events_of(self, place: int) -> Generator[_Event, None, None]:
        try:
            for window in self._decode(place):
                yield place, window
        except (VideoError, VideoShapeError, VideoOptionError, UsageError) as error:
            yield place, str(error)
        else:
            yield place, None
