"""Decoded frames to upright RGB pictures with 8 bits, and to the rows of a clip.

Each frame is converted as soon as it is chosen, so that few decoded frames are in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import VideoError
from openvclip.video._hdr import is_hdr, to_standard_range
from openvclip.video._stream import decoder_errors, require_av

if TYPE_CHECKING:
    import av

__all__ = ["Pictures", "Rows"]

Change = Callable[[Tensor], Tensor]
"""A function from uint8 ``[1, C, H, W]`` to a tensor whose second dimension is 1."""


class Pictures:
    """Convert the frames of a video, one after another.

    The first frame decides the size and the orientation of all pictures.

    Args:
        path: the file, for errors.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # One scaler for all frames: a scaler needs some megabytes.
        self._scaler = require_av().video.reformatter.VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._orientation = (False, False, False)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray[Any, Any]:
        """Return the upright picture, uint8 ``[H, W, 3]``.

        Raises:
            VideoError: the frame cannot be converted.
        """
        with decoder_errors(self._path):
            if self._size is None:
                self._size = (frame.width, frame.height)
                self._orientation = orientation_of(frame)
            if is_hdr(frame, self._path):
                rgb = to_standard_range(frame, *self._size, self._path)
            else:
                rgb = self._scaler.reformat(frame, *self._size, "rgb24")
            return _upright(rgb.to_ndarray(), *self._orientation)

    def tensor(self, frame: av.VideoFrame) -> Tensor:
        """Return the upright picture, uint8 ``[1, C, H, W]``."""
        return _planes(self(frame))


def _planes(picture: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]


def orientation_of(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return how a frame becomes upright: swap rows and columns, then flip rows, flip columns.

    The display matrix of a file moves a pixel from ``(x, y)`` to ``(a x + c y, b x + d y)``, with y
    downwards. Of any matrix, the nearest of the eight quarter turns and mirrors is taken.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _upright(
    picture: np.ndarray[Any, Any], swap: bool, rows: bool, columns: bool
) -> np.ndarray[Any, Any]:
    upright = picture.swapaxes(0, 1) if swap else picture
    return upright[:: -1 if rows else 1, :: -1 if columns else 1]


class Rows:
    """The result of reading: one row for each chosen frame.

    Args:
        path: the file, for errors.
        count: number of rows.
        changes: the function that is applied to the frame of each row, or ``None`` to keep the
            frames as uint8 ``[C, H, W]``.
    """

    def __init__(self, path: str, count: int, changes: Sequence[Change] | None) -> None:
        self._pictures = Pictures(path)
        self._count, self._changes = count, changes
        self._result: Tensor | None = None
        self._frame: Any = None
        self._picture: Any = None
        self._row = 0

    def put(self, row: int, frame: av.VideoFrame) -> None:
        """Write a frame into a row."""
        again = frame is self._frame  # a short video repeats frames, and views overlap
        if not again:
            self._frame, self._picture = frame, self._pictures(frame)
        if again and (self._changes is None or self._changes[row] is self._changes[self._row]):
            self._write(row, self._rows()[self._row])
        elif self._changes is None:
            self._write(row, self._picture.transpose(2, 0, 1))
        else:
            self._write(row, self._changes[row](_planes(self._picture))[:, 0].numpy())
        self._row = row

    def _write(self, row: int, value: np.ndarray[Any, Any]) -> None:
        if self._result is None:
            like = torch.from_numpy(np.empty(0, value.dtype))
            self._result = like.new_empty((self._count, *value.shape))
        # NumPy, because PyTorch uses all cores for such a copy and then waits 10 ms if the cores
        # are busy (measured on 2 cores; NumPy needs 0.1 ms for 320x240).
        np.copyto(self._rows()[row], value)

    def _rows(self) -> np.ndarray[Any, Any]:
        assert self._result is not None
        rows: np.ndarray[Any, Any] = self._result.numpy()
        return rows

    def result(self) -> Tensor:
        """Return all rows: uint8 ``[N, C, H, W]``, or ``[N, ...]`` as the changes return them."""
        if self._result is None:
            raise VideoError("no frame was read.")
        return self._result
