"""Read many videos ahead of their use, with several threads, in order and with bounded memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from openvclip.errors import UsageError, VideoError, VideoOptionError, VideoShapeError
from openvclip.video.decoding import read_views
from openvclip.video.sampling import Sampling
from openvclip.video.sources import VideoSource, is_several, position_holder
from openvclip.video.transforms import Transform

__all__ = ["default_threads", "in_order", "read_clips"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_THREADS = 8


def read_clips(
    videos: Iterable[VideoSource],
    *,
    sampling: Sampling | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    fps: float | None = None,
    num_threads: int | None = None,
) -> Iterator[Tensor]:
    """Iterate over the clips of many videos, which several threads decode ahead.

    The clips are bitwise the same for any number of threads. At most ``num_threads`` videos are in
    memory beyond the video that the caller has. Each video is decoded by one thread. For damaged
    files, :func:`~openvclip.video.read_clip`, whose decoder has several threads, can give other
    pixels.

    Args:
        videos: the videos, each a :data:`~openvclip.video.VideoSource`.
        sampling: the frames to read. Default: ``Sampling()``.
        transform: see :func:`~openvclip.video.read_clip`. A function that is no
            :class:`~openvclip.video.transforms.Transform` is called in several threads.
        fps: frames per second of the videos, if they are arrays of frames.
        num_threads: number of threads that decode videos, each one video at a time. With 0 the
            videos are decoded when they are needed. Default: the number of cores, at most 8.

    Yields:
        The clips of each video, in the order of ``videos``; see
        :func:`~openvclip.video.read_clip`.

    Raises:
        UsageError: ``videos`` is a single video.
        VideoOptionError: ``num_threads`` is negative.
        VideoError, VideoShapeError, VideoOptionError, UsageError: a video can't be read; see
            :func:`~openvclip.video.read_clip`. The error begins with the place of the video.
    """
    if not is_several(videos):
        raise UsageError(f"videos is a {type(videos).__name__}; expected a list of videos.")
    options = sampling or Sampling()
    random = options.sampler == "dense" or (isinstance(transform, Transform) and transform.random)

    def seeded() -> Iterator[tuple[VideoSource, torch.Generator | None]]:
        for video in videos:
            # One generator for each video: the order in which threads draw would be random.
            seed = int(torch.randint(2**62, ())) if random else 0
            yield video, torch.Generator().manual_seed(seed) if random else None

    def read(item: tuple[VideoSource, torch.Generator | None]) -> Tensor:
        video, generator = item
        return read_views(
            video, options, transform=transform, generator=generator, fps=fps, alone=False
        )

    return in_order(read, seeded(), num_threads, source=lambda item: item[0])


def default_threads(num_threads: int | None) -> int:
    """Return the number of threads that decode videos, by default the number of cores, at most 8.

    Raises:
        VideoOptionError: ``num_threads`` is negative or no whole number.
    """
    if num_threads is None:
        usable = getattr(os, "sched_getaffinity", None)
        cores = len(usable(0)) if usable is not None else os.cpu_count() or 1
        return min(cores, _MOST_THREADS)
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 0:
        raise VideoOptionError(f"num_threads={num_threads!r}: expected a whole number from 0 up.")
    return num_threads


def in_order(
    read: Callable[[Item], Result],
    items: Iterable[Item],
    num_threads: int | None = None,
    *,
    source: Callable[[Item], Any] = lambda item: item,
) -> Generator[Result, None, None]:
    """Return an iterator over ``read(item)`` for each item, computed ahead by threads.

    When the iterator is closed, no further item is read, and the threads end. An interrupt by the
    user (Ctrl-C) is raised at once. Threads that read an item then end later.

    Args:
        read: function of an item. It should give the decoder one thread (``alone=False`` of
            :func:`openvclip.video.decoding.read_views`), so that damaged files too give the same
            for any number of threads.
        items: the items. They are taken one by one, in the thread of the caller.
        num_threads: see :func:`read_clips`.
        source: function from an item to its video. Two threads never read one file object or one
            decoder at the same time.

    Raises:
        VideoOptionError: see :func:`default_threads`.
    """
    return _in_order(_Reading(read, source), iter(items), default_threads(num_threads))


def _in_order(
    reading: _Reading[Item, Result], items: Iterator[Item], threads: int
) -> Generator[Result, None, None]:
    if threads == 0:
        for place, item in enumerate(items):
            yield reading(place, item)
        return
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="openvclip-video")
    interrupted = False
    try:
        for place, item in enumerate(items):
            waiting.append(pool.submit(reading, place, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:  # a server may not answer: the user does not wait for the threads
        interrupted = True
        raise
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=not interrupted)


class _Reading(Generic[Item, Result]):
    """Reads one item, and names the place of the video in errors."""

    def __init__(self, read: Callable[[Item], Result], source: Callable[[Item], Any]) -> None:
        self._read, self._source = read, source
        self._guard = threading.Lock()
        self._turns: dict[int, tuple[threading.Lock, int]] = {}

    def __call__(self, place: int, item: Item) -> Result:
        shared = position_holder(self._source(item))
        try:
            with nullcontext() if shared is None else self._turn(shared):
                return self._read(item)
        except (VideoError, VideoShapeError, VideoOptionError, UsageError) as error:
            raise type(error)(f"videos[{place}]: {error}") from error

    @contextmanager
    def _turn(self, shared: object) -> Iterator[None]:
        """Context manager that waits until no other thread reads the same object."""
        key = id(shared)
        with self._guard:
            lock, users = self._turns.get(key, (threading.Lock(), 0))
            self._turns[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._turns.pop(key)
                if users > 1:
                    self._turns[key] = lock, users - 1
