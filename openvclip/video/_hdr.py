"""Videos with a high dynamic range (HDR), shown as on a screen with the standard range.

HDR videos code the brightness by the curve PQ or HLG. Taken for ordinary pixels they are far too
dark. FFmpeg's filter ``scale`` converts them: reference white (203 cd/m2, ITU-R BT.2408) becomes
white, brighter pixels become white too, and the colours of BT.2020 become those of BT.709.
"""

from __future__ import annotations

import os
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from openvclip.errors import VideoError
from openvclip.video._stream import require_av

if TYPE_CHECKING:
    import av

__all__ = ["is_hdr", "to_standard_range"]

_CURVES = {16: "PQ", 18: "HLG"}  # numbers of ITU-T H.273
_UNSPECIFIED = 2
_BT2020 = 9  # the primaries of BT.2020, and its matrix with non-constant luminance
_NOT_CONVERTED = {14: "ICtCp", 15: "IPT (Dolby Vision, profile 5)"}

_TARGET = "out_transfer=bt709:out_primaries=bt709"

# FFmpeg needs 2 seconds for the table of colours of a new chain of filters, so chains are kept.
_KEPT = 4


class _Chains(threading.local):
    """The chains of filters of a thread, the last used chain at the end."""

    def __init__(self) -> None:
        self.chains: dict[tuple[int, str, str], Any] = {}


_kept = _Chains()


def is_hdr(frame: av.VideoFrame, path: str) -> bool:
    """Return whether a frame has a high dynamic range.

    Raises:
        VideoError: the colours of the frame cannot be converted.
    """
    if frame.colorspace in _NOT_CONVERTED:
        raise VideoError(_cannot(path, f"its colours are {_NOT_CONVERTED[frame.colorspace]}"))
    return frame.color_trc in _CURVES


def to_standard_range(frame: av.VideoFrame, width: int, height: int, path: str) -> av.VideoFrame:
    """Convert an HDR frame to ``rgb24`` with the standard range.

    Args:
        frame: the frame. If it does not say so, its colours are taken for those of BT.2020.
        width: width of the result, in pixels.
        height: height of the result, in pixels.
        path: the file, for errors.

    Raises:
        VideoError: this FFmpeg cannot convert HDR.
    """
    if frame.color_primaries == _UNSPECIFIED:
        frame.color_primaries = _BT2020
    if frame.colorspace == _UNSPECIFIED:
        frame.colorspace = _BT2020
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/30"
        f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    )
    target = f"w={width}:h={height}:{_TARGET}:threads=1"
    # A forked process makes its own chains.
    key = (os.getpid(), source, target)
    chain = _kept.chains.pop(key, None) or _chain(source, target, path)
    frame.pts = None  # a chain would drop a frame with an earlier time
    chain.push(frame)
    converted: av.VideoFrame = chain.pull()
    _kept.chains[key] = chain
    while len(_kept.chains) > _KEPT:
        del _kept.chains[next(iter(_kept.chains))]
    return converted


def _chain(source: str, target: str, path: str) -> Any:
    av = require_av()
    try:
        graph = av.filter.Graph()
        filters = [
            graph.add("buffer", source),
            # The brightest pixel that a file claims to have must change nothing, and a change of it
            # makes FFmpeg compute its table again.
            graph.add("sidedata", "mode=delete"),
            graph.add("scale", target),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        for before, after in pairwise(filters):
            before.link_to(after)
        graph.configure()
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        raise VideoError(_cannot(path, f"FFmpeg says {error}")) from error
    return graph


def _cannot(path: str, reason: str) -> str:
    return (
        f"{path}: is an HDR video, and this FFmpeg cannot convert it to the standard range "
        f"({reason}). Install the newest PyAV (pip install -U av), or convert the file first."
    )
