"""Frames by number with torchcodec.

What frames to take is planned from what PyAV says of the file, for both backends; only the decoding
is torchcodec's. It counts frames by the time stamps in the packets, so it can be asked only where
these are right, and it refuses files that are damaged or break off. PyAV reads those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from openvclip.errors import MissingDependencyError

__all__ = ["decode_frames", "require_torchcodec"]


def require_torchcodec() -> Any:
    """torchcodec's ``decoders``, imported where they are first needed."""
    try:
        from torchcodec import decoders
    except (ImportError, RuntimeError, OSError) as error:  # not there; no FFmpeg; another PyTorch
        first = (str(error).strip().splitlines() or [""])[0]
        raise MissingDependencyError(
            f"backend='torchcodec' can't be loaded ({first}). It needs torchcodec in the version "
            "for this PyTorch, and FFmpeg's libraries on the system; backend='pyav' needs neither."
        ) from error
    return decoders


def decode_frames(path: str, numbers: Sequence[int], count: int) -> Tensor | None:
    """uint8 ``[N, C, H, W]``, upright, or ``None`` where torchcodec can't be relied upon.

    Args:
        path: a file that PyAV opened.
        numbers: which frames, counted from 0 in the order in which they are shown.
        count: the frames of the stream as PyAV counts them.
    """
    decoders = require_torchcodec()
    # As for PyAV: workers share the cores already; 0 lets FFmpeg choose.
    threads = 1 if get_worker_info() is not None else 0
    wanted = sorted(set(numbers))
    try:
        decoder = decoders.VideoDecoder(path, num_ffmpeg_threads=threads)
        if len(decoder) != count:
            return None
        frames: Tensor = decoder.get_frames_at(wanted).data
    except (RuntimeError, ValueError, IndexError):
        return None
    place = {number: index for index, number in enumerate(wanted)}
    return frames[torch.tensor([place[number] for number in numbers])].contiguous()
