"""Decode the frames of several windows of a stream with PyAV, with seeks where they save time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from openvclip.errors import VideoError
from openvclip.video._pictures import Rows
from openvclip.video._stream import Stream
from openvclip.video._windows import REORDER, Part, Picker, SeekMissedError, groups, parts_of
from openvclip.video.sampling import StreamInfo, Window

__all__ = ["SEEK_MARGIN", "WORTH_A_SEEK", "FewerFramesError", "Reading"]

# In seconds. Frames up to this distance are reached by decoding, not by a seek. A seek lands on a
# key frame, and key frames are seconds apart, so a short seek saves no time.
WORTH_A_SEEK = 4.0
# In seconds. A seek aims this much before the frame. It finds key frames by their decoding times.
# With B-frames, decoding times are earlier than presentation times, so without the margin a seek
# could land after the frame.
SEEK_MARGIN = 0.5


class FewerFramesError(Exception):
    """Raised when a file ends long before the end that was planned with.

    Attributes:
        info: the metadata of the frames that can be decoded.
    """

    def __init__(self, info: StreamInfo) -> None:
        super().__init__()
        self.info = info


@dataclass
class Reading:
    """The frames of all windows of a stream, decoded with PyAV.

    Attributes:
        stream: the file.
        info: the metadata that the windows were planned with; ``None`` if the file may end earlier.
        changes: the function that is applied to the frames of each view, or ``None``.
        exact: whether a frame that does not exist is an end of the file, however near it is.
    """

    stream: Stream
    info: StreamInfo | None
    changes: Sequence[Callable[[Tensor], Tensor]] | None
    exact: bool = False

    def read(self, windows: Sequence[Window], stamps: Sequence[int] | None) -> Tensor:
        """Return uint8 ``[V * T, C, H, W]``, or what the changes return.

        Args:
            windows: V windows of T frames each.
            stamps: the time stamps of the frames of the stream, if they are known.

        Raises:
            FewerFramesError: the file ends before the end that ``info`` gives.
        """
        parts, length = parts_of(windows, stamps), len(windows[0].offsets)
        changes = self.changes and [change for change in self.changes for _ in range(length)]
        rows = Rows(self.stream.path, len(windows) * length, changes)
        if not self.stream.seekable or any(part.window.start is None for part in parts):
            self._in_order(self.stream, parts, rows)
        elif not self._with_seeks(parts, rows):
            # decode from the beginning: slower, but right for every container
            with Stream(self.stream.video) as fresh:
                self._in_order(fresh, parts, rows)
        return rows.result()

    def _with_seeks(self, parts: Sequence[Part], rows: Rows) -> bool:
        """Read the windows with seeks; return whether this succeeded."""
        pickers = [_picker(part, rows, 0) for part in parts]
        try:
            _run(self.stream, pickers, seek=True)
        except (SeekMissedError, VideoError):
            return False
        if any(picker.empty for picker in pickers) or self._ended_early(pickers):
            return False
        for picker in pickers:
            picker.chosen()
        return True

    def _ended_early(self, pickers: Sequence[Picker]) -> bool:
        info = self.info
        if info is None or not info.timed or not any(picker.ended for picker in pickers):
            return False
        tick = (info.duration or 0) / (info.frames or 1)
        return self.stream.position + 2 * tick + 1 < info.start + (info.duration or 0)

    def _in_order(self, stream: Stream, parts: Sequence[Part], rows: Rows) -> None:
        """Read the windows of a stream of which no frame has been read."""
        pickers = [_picker(part, rows, REORDER) for part in parts]
        run = _run(stream, pickers, seek=False)
        if run.last is None:
            reason = f": FFmpeg says {stream.message!r}" if stream.message else ""
            raise VideoError(
                f"{stream.path}: decoded 0 frames{reason}. The file is truncated, damaged or not a "
                "video; copy or download it again."
            )
        if self.info is not None and any(picker.ended for picker in pickers):
            if not self.exact:
                self._check_count(run, stream.header.fps)
            elif any(picker.lacks_frames for picker in pickers):
                raise FewerFramesError(replace(self.info, frames=run.count))
        for picker in pickers:
            picker.fall_back(run.last)
            picker.chosen()

    def _check_count(self, run: _Run, fps: float) -> None:
        info = self.info
        assert info is not None
        if run.count >= (info.frames or 0) - 1:
            return
        if info.counted:
            raise FewerFramesError(replace(info, frames=run.count, fps=fps))
        tick = (run.newest - run.first) // max(run.count - 1, 1) or 1
        duration = run.newest - run.first + tick
        raise FewerFramesError(replace(info, frames=run.count, duration=duration, start=run.first))


def _picker(part: Part, rows: Rows, reorder: int) -> Picker:
    def keep(offset: int, frame: Any) -> int:
        places = [i for i, wanted in enumerate(part.window.offsets) if wanted == offset]
        for place in places:
            rows.put(part.row + place, frame)
        return part.row + places[0]

    return Picker(part.window, keep, reorder)


@dataclass
class _Run:
    """What a pass over the frames of a stream has seen."""

    last: Any = None
    count: int = 0
    first: int = 0
    newest: int = 0

    def note(self, stamp: int, frame: Any) -> None:
        self.first = min(self.first, stamp) if self.count else stamp
        self.newest = max(self.newest, stamp) if self.count else stamp
        self.last = frame
        self.count += 1


def _run(stream: Stream, pickers: Sequence[Picker], *, seek: bool) -> _Run:
    """Pass the frames of a stream to the pickers."""
    run = _Run()
    gap = stream.ticks(WORTH_A_SEEK)
    for group in groups(pickers, gap) if seek else [list(pickers)]:
        start = group[0].window.start
        landed = True
        if seek and start is not None and start - stream.position > gap:
            stream.seek(start - stream.ticks(SEEK_MARGIN))
            landed = False
        for stamp, frame in stream.frames():
            if not landed and start is not None and stamp > start:
                raise SeekMissedError
            landed = True
            run.note(stamp, frame)
            for picker in group:
                if not picker.done:
                    picker.feed(stamp, frame)
            if all(picker.done for picker in group):
                break
        for picker in group:
            picker.ended = not picker.done
            picker.finish()
    return run
