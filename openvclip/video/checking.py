"""Find the video files that cannot be read, in parallel.

The files are decoded in worker processes. If a file crashes the decoder or never ends, only the
worker process is lost, and the file is reported as bad.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from openvclip.errors import UsageError, VideoError, VideoOptionError
from openvclip.video._inputs import EncodedVideo, check_path
from openvclip.video._packets import frame_rate
from openvclip.video._pictures import Pictures
from openvclip.video._stream import Stream, require_av

__all__ = ["VideoCheck", "VideoChecker", "check_video", "check_videos"]

_START_SECONDS = 300.0  # for a process to import PyTorch, from a slow disk
_END_SECONDS = 30.0  # for a process to end after it has closed its connection


class VideoCheck(NamedTuple):
    """The result of the check of a video file. Unknown values are ``None``.

    Attributes:
        path: the path, unchanged.
        status: ``"ok"``; ``"damaged"`` if only some frames can be decoded
            (:func:`~openvclip.video.read_clip` uses these frames); ``"bad"`` if no frame can be
            decoded.
        reason: the error, or ``""``.
        frames: number of decoded frames; with ``quick``, the number that the container gives. If
            the container counts other frames than a player shows, its packets are counted.
        fps: average frame rate, in frames per second.
        width: width of the first frame as :func:`~openvclip.video.read_clip` returns it, in pixels.
        height: height of the first frame, likewise.
        seconds: duration of the video according to the container.
        bytes: size of the file.
    """

    path: str
    status: str
    reason: str = ""
    frames: int | None = None
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    bytes: int | None = None


def check_video(path: str | os.PathLike[str], *, quick: bool = False) -> VideoCheck:
    """Decode a video file in this process and return the result of the check.

    Args:
        path: the file.
        quick: decode only the first frame. Damage in later frames is then not detected.

    Raises:
        MissingDependencyError: PyAV is not installed.
    """
    require_av()
    name = os.fspath(path)
    size = os.path.getsize(name) if os.path.isfile(name) else None
    try:
        return _decode(name, quick)._replace(bytes=size)
    except VideoError as error:
        return VideoCheck(name, "bad", str(error), bytes=size)


def _decode(path: str, quick: bool) -> VideoCheck:
    first: Any = None
    stamps: list[int] = []
    full = check_path(path)
    with Stream(EncodedVideo(full, full, alone=False)) as stream:
        for stamp, frame in stream.frames():
            stamps.append(stamp)
            first = first or frame
            if quick:
                break
        info, seconds, message = stream.info, stream.seconds, stream.message
        count, fps, base = len(stamps), stream.info.fps, stream.time_base
    if info.duration is None and count > 1:
        fps = frame_rate(fps, count, max(stamps) - min(stamps), base)
    reason = f"{path}: decoded {count} frames: FFmpeg says {message!r}." if message else ""
    if first is None:
        return VideoCheck(path, "bad", reason or f"{path}: holds no frame that can be decoded.")
    height, width, _ = Pictures(path)(first).shape
    return VideoCheck(
        path,
        "damaged" if message else "ok",
        reason,
        info.frames if quick else count,
        fps,
        width,
        height,
        seconds,
    )


def check_videos(
    paths: Iterable[str | os.PathLike[str]],
    *,
    num_workers: int | None = None,
    quick: bool = False,
    timeout: float = 600.0,
) -> Generator[VideoCheck, None, None]:
    """Decode many video files in parallel.

    The worker processes are spawned, like the workers of a ``DataLoader`` on macOS and Windows. A
    script therefore needs ``if __name__ == "__main__":`` around the code that it runs.

    Args:
        paths: the files.
        num_workers: number of worker processes. Default: one for each core.
        quick: see :func:`check_video`.
        timeout: number of seconds after which a file counts as bad.

    Yields:
        One :class:`VideoCheck` for each path, in the order in which the checks end. If the loop
        ends early, the worker processes end too.

    Raises:
        VideoOptionError: ``num_workers`` or ``timeout`` is not above 0.
        MissingDependencyError: PyAV is not installed.
        UsageError: the worker processes cannot be started.
    """
    require_av()
    files = [os.fspath(path) for path in paths]
    number = min(num_workers or os.cpu_count() or 1, max(len(files), 1)) if num_workers != 0 else 0
    if number < 1 or timeout <= 0:
        raise VideoOptionError(
            f"num_workers={num_workers!r}, timeout={timeout!r}: expected numbers above 0."
        )
    return _run(files, [_Worker(quick, timeout) for _ in range(number)])


class VideoChecker:
    """A process that decodes one video after another, for files that can crash the decoder.

    The process starts with the first check and stays for the next ones. Several threads can use one
    object; their checks wait for each other.

    Args:
        quick: see :func:`check_video`.
        timeout: see :func:`check_videos`.
    """

    def __init__(self, *, quick: bool = False, timeout: float = 600.0) -> None:
        self._worker = _Worker(quick, timeout)
        self._turn = threading.Lock()

    def check(self, path: str | os.PathLike[str]) -> VideoCheck:
        """Decode a video file in the process and return the result of the check.

        Args:
            path: the file.

        Raises:
            MissingDependencyError: PyAV is not installed.
            UsageError: the process cannot be started; see :func:`check_videos`.
        """
        require_av()
        with self._turn:
            return self._worker.check(os.fspath(path))

    def close(self) -> None:
        """End the process."""
        self._worker.close()
        with self._turn:
            self._worker.stop()


def _run(files: Sequence[str], workers: Sequence[_Worker]) -> Generator[VideoCheck, None, None]:
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[VideoCheck | UsageError] = queue.SimpleQueue()
    for file in files:
        todo.put(file)
    threads = [threading.Thread(target=worker.work, args=(todo, done)) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in files:
            check = done.get()
            if isinstance(check, UsageError):
                raise check
            yield check
    finally:
        for worker in workers:
            worker.close()
        for thread in threads:
            thread.join()


class _Worker:
    """A process that decodes one file after another, controlled by a thread of this process."""

    def __init__(self, quick: bool, timeout: float) -> None:
        self._quick, self._timeout = quick, timeout
        self._process: Any = None
        self._connection: Connection | None = None
        self._closed = threading.Event()

    def work(
        self,
        todo: queue.SimpleQueue[str],
        done: queue.SimpleQueue[VideoCheck | UsageError],
    ) -> None:
        """Check files until the queue is empty. Runs in a thread."""
        try:
            while not self._closed.is_set():
                done.put(self.check(todo.get_nowait()))
        except queue.Empty:
            pass
        except UsageError as error:
            done.put(error)
        finally:
            self.stop()

    def close(self) -> None:
        """Kill the process. Called from another thread."""
        self._closed.set()
        process = self._process
        if process is not None:
            process.kill()

    def check(self, path: str) -> VideoCheck:
        """Send a path to the process, which is started if there is none."""
        connection = self._connection or self._start()
        try:
            connection.send(path)
            if connection.poll(self._timeout):
                check: VideoCheck = connection.recv()
                return check
        except (EOFError, OSError):
            reason = f"the decoder crashed ({_ending(self.stop(_END_SECONDS))})"
        else:
            self.stop()
            reason = f"decoding took more than {self._timeout:g} seconds"
        size = os.path.getsize(path) if os.path.isfile(path) else None
        return VideoCheck(path, "bad", f"{path}: {reason}.", bytes=size)

    def _start(self) -> Connection:
        # Spawned, because a fork of a process with running threads can hang.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._quick), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        if self._closed.is_set():  # close() was called before the process existed
            process.kill()
        try:
            if self._connection.poll(_START_SECONDS) and self._connection.recv() == "ready":
                return self._connection
        except (EOFError, OSError):
            pass
        raise UsageError(
            f"A process that decodes videos did not start ({_ending(self.stop(_END_SECONDS))}). "
            'In a script, put the code under if __name__ == "__main__":.'
        )

    def stop(self, patience: float = 1.0) -> int | None:
        """End the process, kill it after ``patience`` seconds, and return its exit status."""
        if self._process is None or self._connection is None:
            return None
        self._connection.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        status: int | None = self._process.exitcode
        self._process = self._connection = None
        return status


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def _serve(connection: Connection, quick: bool) -> None:
    """Receive paths and send back checks until the connection is closed."""
    # Ctrl-C reaches every process of a terminal. The parent process ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send("ready")
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        connection.send(check_video(path, quick=quick))
