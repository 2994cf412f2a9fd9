"""Read the frames of a clip from a video.

A clip consists of some frames of a video, but the decoder must also decode the frames between them.
Only the frames of the clip are converted to RGB and kept, so the memory does not grow with the
length of the video. Each of them is converted, and transformed, as soon as it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openvclip.video._inputs import EncodedVideo
from openvclip.video._numbered import NumberedVideo, RateChangesError
from openvclip.video._packets import frame_rate, with_count
from openvclip.video._reading import FewerFramesError, Reading
from openvclip.video._stream import Stream
from openvclip.video._torchcodec import decode_frames, require_torchcodec
from openvclip.video.sampling import (
    BY_NUMBER,
    Backend,
    Sampler,
    Sampling,
    StreamInfo,
    Window,
    plan,
    select,
)
from openvclip.video.sources import VideoSource, opened
from openvclip.video.transforms import Transform

__all__ = ["read_clip", "read_views"]


def read_clip(
    path: VideoSource,
    *,
    num_frames: int = 8,
    sampling_rate: int = 16,
    target_fps: float = 30,
    views: int = 1,
    sampler: Sampler = "released",
    backend: Backend = "pyav",
    generator: torch.Generator | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    fps: float | None = None,
    last_second: int | None = None,
) -> Tensor:
    """Read one or more clips from a video.

    The keywords are the attributes of :class:`~openvclip.video.Sampling`.

    Args:
        path: a video file in any container and codec that FFmpeg can read; or bytes, a file object,
            a URL, an array of frames or an open decoder, see
            :data:`~openvclip.video.VideoSource`. A file object is read from its beginning, and its
            position is restored. A container of PyAV is opened again and stays unchanged. Frames
            of arrays and of torchcodec's decoders are taken as they are.
        num_frames: T, the number of frames in a view. For ``"seconds"``, the largest number of
            frames: a short video has fewer, and no frame is repeated.
        sampling_rate: distance between two frames of a view, in frames at ``target_fps``.
        target_fps: the frame rate to which ``sampling_rate`` refers, in frames per second.
        views: V, the number of clips taken from the video. The clips are spread over its length.
        sampler: ``"released"`` (the test path of the released Open-VCLIP code), ``"uniform"``
            (centres of equal segments of the whole video, ViFi-CLIP), ``"dense"`` (the training
            path of the released code: a random start) or ``"seconds"`` (a frame for each second,
            as in text-to-video retrieval); see :mod:`openvclip.video.sampling`.
        backend: ``"pyav"`` or ``"torchcodec"``. Both return the same frames. torchcodec needs
            right time stamps in the packets. Damaged files, files without these time stamps (AVI
            and MPEG-TS with B-frames), HDR videos and mirrored videos are always decoded by PyAV.
        generator: random number generator for the starts of ``"dense"``. Default: the global
            generator.
        transform: function that is applied to the clips. A transform of
            :func:`openvclip.video.transforms.build` is applied to each frame as soon as the frame
            is decoded: the result is the same, and large frames need much less memory. Its random
            numbers come from ``generator``. Any other function gets all clips at once.
        fps: frames per second, if ``path`` is an array of frames. The sampler ``"uniform"`` needs
            no frame rate.
        last_second: the sampler ``"seconds"`` takes no frame after this second.

    Returns:
        uint8 RGB ``[V, T, C, H, W]`` on the CPU, or the result of ``transform``. An alpha channel
        is dropped, grey is repeated over the three channels, and more than 8 bits are rounded to 8
        bits.

    The frames are the frames that a player shows:

    - Of several video streams, the stream that FFmpeg takes for the best is read. Cover pictures
      and thumbnails are no video.
    - Frames that an edit list hides are not counted. (The released code counts them. A single
      hidden frame is counted here too, because many encoders write such files.)
    - If the header counts other frames than the file has, the frames are counted from the packets.
      A truncated or damaged file consists of the frames that can be decoded.
    - Pictures are upright: quarter turns and mirrors of the display matrix are applied, which the
      released code does not do.
    - HDR videos (PQ and HLG) are converted to the standard range. Reference white becomes white,
      and brighter pixels become white too.
    - Pixels are as stored: a sample aspect ratio other than 1 is **not** applied, as in the
      released code. A film of 720x576 pixels that is shown as 1024x576 stays 720x576. To apply the
      ratio, convert the file with ``ffmpeg -i in.mp4 -vf scale=iw*sar:ih,setsar=1 out.mp4``.

    If a video is shorter than a view, its last frame is repeated, except with the sampler
    ``"seconds"``. If the size of the frames changes
    inside a video, all frames are scaled to the size of the first frame.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the path is a folder, the file is empty or has no video stream, no frame can be
            decoded, the video is HDR and this FFmpeg cannot convert it, or a URL or a file object
            can't be read.
        VideoOptionError: ``sampler`` or ``backend`` is not known, a number is out of range, or
            ``fps`` is missing for an array of frames.
        VideoShapeError: the frames of an array are not uint8, have another shape, or there are
            none.
        UsageError: ``path`` is of an unknown kind, or a file object in text mode.
        MissingDependencyError: PyAV is not installed, ``backend="torchcodec"`` and torchcodec
            cannot be loaded, or what fsspec needs for a URL is not installed.

    Source: the released code of Open-VCLIP (PySlowFast's PyAV path).
    """
    sampling = Sampling(num_frames, sampling_rate, target_fps, views, sampler, backend, last_second)
    return read_views(path, sampling, transform=transform, generator=generator, fps=fps)


def read_views(
    video: VideoSource,
    sampling: Sampling,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    fps: float | None = None,
    alone: bool = True,
) -> Tensor:
    """Read the clips of a video: :func:`read_clip` with the sampling as one object.

    Args:
        video: see :func:`read_clip`.
        sampling: the frames to read.
        transform: see :func:`read_clip`.
        generator: see :func:`read_clip`.
        fps: see :func:`read_clip`.
        alone: whether this thread is the only one that decodes videos. If not, the decoder uses one
            thread.
    """
    with opened(video, fps, alone=alone) as source:
        if isinstance(source, NumberedVideo):
            rows = _numbered_rows(source, sampling, transform, generator)
        else:
            rows = _decoded_rows(source, sampling, transform, generator)
    clip = rows.view(sampling.views, len(rows) // sampling.views, *rows.shape[1:])
    if isinstance(transform, Transform):
        return clip.transpose(1, 2) if transform.crops > 1 else clip[:, :, 0]
    return clip if transform is None else transform(clip)


def _decoded_rows(
    video: EncodedVideo,
    sampling: Sampling,
    transform: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the frames of all views, uint8 ``[V * T, C, H, W]``, or what a transform returns."""
    if sampling.backend == "torchcodec":
        require_torchcodec()
    with Stream(video) as stream:
        info, stamps = _metadata(stream, sampling)
        state = _state(generator) if sampling.sampler == "dense" else None
        windows = plan(info, sampling, generator)
        changes = _changes(transform, sampling.views, generator)
        if sampling.backend == "torchcodec" and stamps and stream.in_order:
            numbers = [number for window in windows for number in select(stamps, window)]
            frames = decode_frames(stream, numbers, len(stamps))
            if frames is not None:
                return _changed(frames, changes)
        reading = Reading(stream, info, changes, exact=sampling.sampler == "seconds")
        try:
            return reading.read(windows, stamps if stream.seekable else None)
        except FewerFramesError as fewer:
            # Placed anew with the same random numbers.
            windows = plan(fewer.info, sampling, state)
            with Stream(video) as again:
                return Reading(again, None, changes).read(windows, None)


def _numbered_rows(
    video: NumberedVideo,
    sampling: Sampling,
    transform: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the frames of all views, as :func:`_decoded_rows` does."""
    timed = sampling.sampler not in BY_NUMBER
    if sampling.sampler != "uniform":
        video.require_rate(f"the sampler {sampling.sampler!r}")
    state = _state(generator) if sampling.sampler == "dense" else None
    windows = plan(video.info, sampling, generator)
    changes = _changes(transform, sampling.views, generator)
    try:
        frames = _taken(video, windows, timed)
    except RateChangesError:
        video.measure()
        frames = _taken(video, plan(video.info, sampling, state), timed)
    return _changed(frames, changes)


def _taken(video: NumberedVideo, windows: Sequence[Window], timed: bool) -> Tensor:
    numbers = [number for window in windows for number in select(video.stamps, window)]
    wanted = sorted(set(numbers))
    row = {number: index for index, number in enumerate(wanted)}
    return video.take(wanted, timed=timed)[torch.tensor([row[number] for number in numbers])]


def _changed(frames: Tensor, changes: Sequence[Callable[[Tensor], Tensor]] | None) -> Tensor:
    """Apply the function of each view to its frames, uint8 ``[V * T, C, H, W]``."""
    if changes is None:
        return frames
    parts = zip(changes, frames.chunk(len(changes)), strict=True)
    return torch.cat([change(clip).transpose(0, 1) for change, clip in parts])


def _metadata(stream: Stream, sampling: Sampling) -> tuple[StreamInfo, Sequence[int] | None]:
    """Return the metadata for :func:`plan`, and the time stamps of the frames if needed."""
    info = stream.info
    counting = not info.timed or (sampling.sampler in BY_NUMBER and stream.seekable)
    if not counting and sampling.backend != "torchcodec":
        return info, None
    index = stream.packets
    if counting:
        info = with_count(info, index.count)
    if info.duration is None and index.stamps:
        length = index.stamps[-1] - index.stamps[0]
        rate = frame_rate(info.fps, index.count, length, stream.time_base)
        info = replace(info, fps=rate)
    return info, index.stamps


def _state(generator: torch.Generator | None) -> torch.Generator:
    """Return a generator that draws the same numbers as ``generator``."""
    state = torch.get_rng_state() if generator is None else generator.get_state()
    return torch.Generator().set_state(state)


def _changes(
    transform: Callable[[Tensor], Tensor] | None, views: int, generator: torch.Generator | None
) -> list[Callable[[Tensor], Tensor]] | None:
    """Return the function that is applied to the frames of each view, if there is one."""
    if not isinstance(transform, Transform):
        return None
    if transform.random:
        return [transform.draw(generator) for _ in range(views)]
    return [transform.draw(generator)] * views
