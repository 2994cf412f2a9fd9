"""Decoding of frames by number with torchcodec.

For both backends the frames are chosen from the metadata that PyAV reads; torchcodec only decodes
them. torchcodec counts frames by the time stamps in the packets, so it is used only if these time
stamps are right. It refuses files that are damaged or truncated. PyAV decodes all other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from openvclip.errors import MissingDependencyError, VideoError
from openvclip.video._hdr import is_hdr
from openvclip.video._pictures import orientation_of
from openvclip.video._stream import Stream

__all__ = ["decode_frames", "require_torchcodec"]


def require_torchcodec() -> Any:
    """Import ``torchcodec.decoders`` at its first use and return the module."""
    try:
        from torchcodec import decoders
    # If FFmpeg is missing, the exception is not always an ImportError.
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise MissingDependencyError(
            f"backend='torchcodec' can't be loaded ({reason}). It needs the version of torchcodec "
            "for this PyTorch, and FFmpeg's shared libraries; backend='pyav' needs neither."
        ) from error
    return decoders


def decode_frames(stream: Stream, numbers: Sequence[int], count: int) -> Tensor | None:
    """Decode frames with torchcodec.

    Args:
        stream: the video, opened with PyAV.
        numbers: indices of the frames in display order, from 0.
        count: number of frames in the stream according to PyAV.

    Returns:
        The upright frames, uint8 ``[N, C, H, W]``. ``None`` if torchcodec fails, counts another
        number of frames than PyAV, or does not support the video: HDR, and frames that are shown
        mirrored.
    """
    decoders = require_torchcodec()
    if not _supported(stream):
        return None
    # One thread for each worker of a DataLoader, as for PyAV. 0 lets FFmpeg choose.
    threads = 1 if get_worker_info() is not None or not stream.video.alone else 0
    wanted = sorted(set(numbers))
    try:
        decoder = decoders.VideoDecoder(
            stream.video.opened(), stream_index=stream.index, num_ffmpeg_threads=threads
        )
        if len(decoder) != count:
            return None
        frames: Tensor = decoder.get_frames_at(wanted).data
    except (RuntimeError, ValueError, IndexError, OSError):
        return None
    row = {number: index for index, number in enumerate(wanted)}
    return frames[torch.tensor([row[number] for number in numbers])].contiguous()


def _supported(stream: Stream) -> bool:
    try:
        with Stream(stream.video) as other:
            _, frame = next(iter(other.frames()))
            swap, rows, columns = orientation_of(frame)
            mirrored = swap != (rows != columns)
            return not mirrored and not is_hdr(frame, stream.path)
    except (StopIteration, VideoError):
        return False
