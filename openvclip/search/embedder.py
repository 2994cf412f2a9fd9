"""Vectors of videos as a step of Ray Data and of the library datasets: :class:`VideoEmbedder`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from openvclip.errors import (
    UsageError,
    VideoOptionError,
    VideoShapeError,
    did_you_mean,
    listed,
)
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.building import BuildOptions, encode_windows, whole_videos
from openvclip.search.windows import WindowOptions
from openvclip.video.sources import VideoFrames, is_array, source_name

__all__ = ["VideoEmbedder"]

_COLUMNS = ("video", "bytes", "path")
_loading = threading.Lock()


class VideoEmbedder:
    """Computes the vectors of the videos in a batch, a dict of columns.

    Ray Data and the library ``datasets`` take an embedder as it is::

        rows.map_batches(VideoEmbedder, fn_constructor_kwargs={"model": "runs/b16"}, concurrency=4)
        rows.map(VideoEmbedder("runs/b16"), batched=True)

    An embedder holds settings only, so it can be pickled and sent to other machines. Each process
    loads the model once, when it gets its first batch.

    The result has the columns of the batch, without the column of the videos, and these columns:

    - ``path``: the name of the video.
    - ``vector``: float32 ``[n, D]`` with rows of unit length.
    - ``error``: why the video could not be read, or an empty text. The vector of such a video is
      NaN. One unreadable video does not end the job. With ``windows``, a video of which only a
      part could be decoded has its vectors and a reason too.
    - ``start`` and ``end``, only with ``windows``: the part of the video in seconds. Each window is
      a row, and the other columns are repeated. A video that could not be read has one row.

    Args:
        model: the folder of a model, a name on the Hub, or a name of open_clip; see
            :meth:`openvclip.VideoCLIP.from_pretrained`. All machines must be able to load it.
        pretrained: with a name of open_clip: its weights.
        column: the column of the videos. Default: the first of ``video``, ``bytes`` and ``path``
            that the batch has. A video is a path or a URL, the bytes of a file, a dict with the
            entries ``bytes`` and ``path``, an array of frames, or another
            :data:`openvclip.video.VideoSource`.
        windows: ``False`` gives one vector for each video, that of
            :meth:`openvclip.VideoCLIP.encode_video`. ``True`` or :class:`WindowOptions` gives the
            vectors of windows over the whole length, as an index has them.
        fps: frames per second, if the videos are arrays of frames.
        batch_size: number of videos or windows to encode at a time.
        num_threads: number of threads that decode videos; see :func:`openvclip.video.read_clips`.
        device: the device of the model. Default: a GPU if there is one, otherwise the CPU.
        autocast: the dtype of ``torch.autocast``, such as ``torch.bfloat16``. Default: no autocast.

    Raises:
        UsageError: ``model`` is no name of a model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        pretrained: str | os.PathLike[str] | None = None,
        *,
        column: str | None = None,
        windows: bool | WindowOptions = False,
        fps: float | None = None,
        batch_size: int = 8,
        num_threads: int | None = None,
        device: str | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, (str, os.PathLike)):
            raise UsageError(
                f"model is a {type(model).__name__}; expected a folder or a name, because other "
                "processes load the model again. Save it first: model.save_pretrained(folder)."
            )
        self._model = _ModelName(
            os.fspath(model), None if pretrained is None else os.fspath(pretrained), autocast
        )
        self._state = self._model.files()  # other weights in the folder are another model
        self._column = column
        self._windows = WindowOptions() if windows is True else windows or None
        self._fps, self._device = fps, device
        self._build = BuildOptions(batch_size, num_threads)

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Return the columns of a batch with the vectors of its videos.

        Args:
            batch: the columns, as arrays of NumPy or lists.
            rank: the number of this process, with which the processes of a machine share its GPUs.
                ``datasets`` gives it with ``with_rank=True``.

        Raises:
            UsageError: the batch is no dict of columns, or has no column of videos.
            VideoOptionError: the videos are arrays of frames and ``fps`` is missing.
            OpenVCLIPError: the model can't be loaded; see
                :meth:`openvclip.VideoCLIP.from_pretrained`.
        """
        column = self._column_of(batch)
        videos = [_source_of(value, self._fps) for value in batch[column]]
        names = _names(batch, column, videos)
        model = self._loaded(rank)
        found = self._windows_of(model, videos) if self._windows else self._whole(model, videos)
        columns = {
            name: _taken(values, found.places)
            for name, values in batch.items()
            if name not in (column, "path")
        }
        errors = [found.errors.get(place, "") for place in found.places]
        columns["path"] = [names[place] for place in found.places]
        columns |= found.columns
        columns["error"] = errors
        if isinstance(batch[column], np.ndarray):
            columns |= {name: np.array(columns[name], dtype=object) for name in ("path", "error")}
        return columns

    def __repr__(self) -> str:
        kind = f"windows {self._windows}" if self._windows else "one vector a video"
        return f"VideoEmbedder({self._model.source}: {kind})"

    def _loaded(self, rank: int | None) -> VideoCLIP:
        device = self._device
        if device is None:
            device = "cpu"
            if torch.cuda.is_available():
                device = "cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}"
        with _loading:  # of two threads, one loads the model
            return _load(self._model, device, self._state)

    def _column_of(self, batch: Mapping[str, Any]) -> str:
        if not isinstance(batch, Mapping):
            raise UsageError(
                f"The batch is a {type(batch).__name__}; expected a dict of columns: "
                'batch_format="numpy" in Ray, batched=True in datasets.'
            )
        if self._column is None:
            known = [name for name in _COLUMNS if name in batch]
            if known:
                return known[0]
            raise UsageError(
                f"The batch has the columns {listed(list(batch), 10)}; expected one of "
                f"{', '.join(_COLUMNS)}. Give column=, the name of the column of the videos."
            )
        if self._column not in batch:
            raise UsageError(
                f"column={self._column!r}: the batch has the columns {listed(list(batch), 10)}"
                f"{did_you_mean(self._column, batch)}."
            )
        return self._column

    def _whole(self, model: VideoCLIP, videos: list[Any]) -> _Found:
        """Return one vector for each video."""
        vectors, errors = model.try_encode_videos(
            videos, batch_size=self._build.batch_size, num_threads=self._build.num_threads
        )
        texts = {place: str(error) for place, error in errors.items()}
        return _Found(list(range(len(videos))), {"vector": vectors.numpy()}, texts)

    def _windows_of(self, model: VideoCLIP, videos: list[Any]) -> _Found:
        """Return the vectors of the windows of each video, and a row of NaN for an error."""
        assert self._windows is not None
        if self._fps is None and any(map(is_array, videos)):
            raise VideoOptionError(
                "The videos are arrays of frames, and windows need their frame rate: give fps=, "
                "frames per second."
            )
        settings = self._windows.settings(model.contract)
        events = encode_windows(model, videos, settings, self._build)
        found = sorted(whole_videos(events), key=lambda video: video.place)
        nan = np.full((1, 2 + model.embed_dim), np.nan)  # the row of an error
        times = [nan[:, :2] if video.error else video.times for video in found]
        vectors = [nan[:, 2:] if video.error else video.vectors for video in found]
        places = [video.place for video, rows in zip(found, times, strict=True) for _ in rows]
        columns = {
            "start": np.concatenate([nan[:0, 0], *(rows[:, 0] for rows in times)]),
            "end": np.concatenate([nan[:0, 1], *(rows[:, 1] for rows in times)]),
            "vector": np.concatenate([nan[:0, 2:], *vectors], dtype=np.float32),
        }
        reasons = {video.place: video.error or video.damage for video in found}
        return _Found(places, columns, {place: why for place, why in reasons.items() if why})


@dataclass(frozen=True)
class _ModelName:
    """Where a model is, and how it computes."""

    source: str
    pretrained: str | None
    autocast: torch.dtype | None

    def files(self) -> tuple[tuple[str, int, int], ...]:
        """Return the names, sizes and times of the files of the model, if this machine has them."""
        found: list[tuple[str, int, int]] = []
        for name in filter(None, (self.source, self.pretrained)):
            path = Path(name)
            try:
                files = sorted(path.iterdir()) if path.is_dir() else [path]
                states = [(file.name, file.stat()) for file in files if file.is_file()]
            except OSError:
                continue
            found += [(file, state.st_size, state.st_mtime_ns) for file, state in states]
        return tuple(found)


@lru_cache(maxsize=2)
def _load(name: _ModelName, device: str, files: tuple[tuple[str, int, int], ...]) -> VideoCLIP:
    """Return a model, which this process keeps until its files change."""
    model = VideoCLIP.from_pretrained(name.source, name.pretrained, device=device)
    model.autocast = name.autocast
    return model


@dataclass(frozen=True)
class _Found:
    """The rows of a batch.

    Attributes:
        places: the place of the video of each row.
        columns: the vectors, and the times.
        errors: why a video can't be read, by its place.
    """

    places: list[int]
    columns: dict[str, NDArray[Any]]
    errors: dict[int, str]


def _source_of(value: Any, fps: float | None) -> Any:
    """Return the video in a cell: a dict of ``datasets`` holds its bytes or its path."""
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        data = value.get("bytes")
        return value.get("path") if data is None else data
    if isinstance(value, (list, tuple)):  # datasets gives arrays as lists of lists
        value = _as_array(value)
    if fps is not None and is_array(value):
        with suppress(VideoShapeError):  # the reader raises it, for this video alone
            return VideoFrames(value, fps)
    return value


def _as_array(frames: Sequence[Any]) -> Any:
    try:
        array = np.asarray(frames)
    except ValueError:  # of different sizes
        return frames
    whole = array.dtype.kind in "iu" and array.size > 0 and 0 <= array.min() <= array.max() <= 255
    return array.astype(np.uint8) if whole else array


def _names(batch: Mapping[str, Any], column: str, videos: Sequence[Any]) -> list[str]:
    """Return the name of each video: its path, if the batch has it."""
    if column != "path" and "path" in batch:
        return [str(path) for path in batch["path"]]
    cells = [cell.get("path") if isinstance(cell, Mapping) else None for cell in batch[column]]
    return [cell or source_name(video) for cell, video in zip(cells, videos, strict=True)]


def _taken(values: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a column."""
    if isinstance(values, (np.ndarray, torch.Tensor)):
        return values[np.asarray(rows, dtype=np.int64)]
    return [values[row] for row in rows]
