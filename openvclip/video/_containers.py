"""Container formats that need special treatment: one entry of :data:`CONTAINERS` for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTAINERS", "Container", "container_of"]


@dataclass(frozen=True)
class Container:
    """The treatment of a container format.

    Attributes:
        seekable: whether a seek leaves the time stamps of the frames unchanged. Then frames are
            reached by seeking; otherwise the file is decoded from the beginning.
        refused: whether files in this format are refused.
        counts: where the number of frames comes from. ``"index"``: the header, if the index of the
            container agrees, and the packets otherwise. ``"header"``: FFmpeg has counted the frames
            when it opened the file. ``"packets"``: the packets, because the number in the header is
            often wrong or missing.
    """

    seekable: bool = False
    refused: bool = False
    counts: Literal["index", "header", "packets"] = "packets"


# The packets of these formats carry the presentation times of the frames. The packets of AVI files
# do not: FFmpeg reconstructs the times while it decodes, so a seek can shift them by a frame.
_SEEKABLE = Container(seekable=True)
_INDEXED = Container(seekable=True, counts="index")
# FFmpeg would read any text file as "tty". The other refused formats open further files or
# addresses, which the caller did not name.
_REFUSED = Container(refused=True)
_OTHER = Container()

CONTAINERS: dict[str, Container] = {
    "mov": _INDEXED,
    "mp4": _INDEXED,
    "matroska": _SEEKABLE,
    "webm": _SEEKABLE,
    "avi": Container(counts="index"),
    "gif": Container(counts="header"),
    "tty": _REFUSED,
    "concat": _REFUSED,
    "hls": _REFUSED,
    "dash": _REFUSED,
    "lavfi": _REFUSED,
    "image2": _REFUSED,
    "sdp": _REFUSED,
    "rtsp": _REFUSED,
    "data": _REFUSED,
}
"""The treatment of each format. The keys are FFmpeg's short names of the formats."""


def container_of(names: str) -> Container:
    """Return the treatment of a format.

    Args:
        names: FFmpeg's names of the format, separated by commas, such as ``"mov,mp4,m4a"``.
    """
    if names.endswith("_pipe"):  # a still image
        return _REFUSED
    known = (CONTAINERS[name] for name in names.split(",") if name in CONTAINERS)
    return next(known, _OTHER)
