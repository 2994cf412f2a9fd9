"""Videos with a high dynamic range (HDR), shown as on a screen with the standard range.

HDR videos code the brightness by the curve PQ or HLG. Taken for ordinary pixels they are far too
dark. FFmpeg's filter ``scale`` converts them: reference white (203 cd/m2, ITU-R BT.2408) becomes
white, brighter pixels become white too, and the colours of BT.2020 become those of BT.709.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from openvclip.errors import VideoError
from openvclip.video._stream import require_av

if TYPE_CHECKING:
    import av

__all__ = ["ToneMap", "is_hdr"]

_CURVES = {16: "PQ", 18: "HLG"}  # numbers of ITU-T H.273
_UNSPECIFIED = 2
_BT2020 = 9  # the primaries of BT.2020, and its matrix with non-constant luminance
_NOT_CONVERTED = {14: "ICtCp", 15: "IPT (Dolby Vision, profile 5)"}


def is_hdr(frame: av.VideoFrame, path: str) -> bool:
    """Return whether a frame has a high dynamic range.

    Raises:
        VideoError: the colours of the frame cannot be converted.
    """
    if frame.colorspace in _NOT_CONVERTED:
        raise VideoError(_cannot(path, f"its colours are {_NOT_CONVERTED[frame.colorspace]}"))
    return frame.color_trc in _CURVES


class ToneMap:
    """Convert HDR frames to RGB with 8 bits and the standard range.

    Args:
        path: the file, for errors.
        width: width of the result, in pixels.
        height: height of the result, in pixels.
    """

    def __init__(self, path: str, width: int, height: int) -> None:
        self._path, self._width, self._height = path, width, height
        self._graph: Any = None
        self._source = ""

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame as ``rgb24``.

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
        if source != self._source:
            self._graph, self._source = self._filters(source), source
        frame.pts = None  # the filters would drop a frame with an earlier time
        self._graph.push(frame)
        converted: av.VideoFrame = self._graph.pull()
        return converted

    def _filters(self, source: str) -> Any:
        av = require_av()
        target = f"w={self._width}:h={self._height}:out_transfer=bt709:out_primaries=bt709"
        try:
            graph = av.filter.Graph()
            filters = [
                graph.add("buffer", source),
                graph.add("scale", target),
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ]
            for before, after in pairwise(filters):
                before.link_to(after)
            graph.configure()
        except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
            raise VideoError(_cannot(self._path, f"FFmpeg says {error}")) from error
        return graph


def _cannot(path: str, reason: str) -> str:
    return (
        f"{path}: is an HDR video, and this FFmpeg cannot convert it to the standard range "
        f"({reason}). Install the newest PyAV (pip install -U av), or convert the file first."
    )
