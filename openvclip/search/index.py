"""The index of videos: windows of a few seconds, searched by a sentence, an image or a clip."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from openvclip.checkpoints.contract import Contract
from openvclip.errors import OpenVCLIPError, SearchError
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.building import BuildOptions
from openvclip.search.identity import require_same_model
from openvclip.search.inputs import VideoPaths
from openvclip.search.moments import Moment
from openvclip.search.queries import as_queries
from openvclip.search.recorded import ModelSource
from openvclip.search.searching import search_index
from openvclip.search.snapshots import Block, Snapshot
from openvclip.search.storage import IndexSettings, Storage
from openvclip.search.updating import Report, Updating
from openvclip.search.windows import Window, WindowOptions, WindowSettings
from openvclip.weights.hashing import fingerprint
from openvclip.weights.names import named_parameters

__all__ = ["Index"]


class Index:
    """An index of videos: a folder with unit vectors of windows of a few seconds.

    :meth:`create` makes an index and :meth:`open` opens one. Each change is on the disk when its
    method returns. If the process is killed, the folder holds the index before or after a change,
    never a part of a change. One process at a time can change an index; any number of processes and
    threads can search it meanwhile, and their next search sees the changes.

    Attributes:
        path: the folder.
    """

    def __init__(
        self,
        storage: Storage,
        model: VideoCLIP | None,
        device: str | torch.device = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self._storage = storage
        self._model = model
        self._device, self._autocast = device, autocast
        self._fingerprint = None if model is None else _fingerprint(model)
        self._snapshot: Snapshot | None = None
        self._lock = threading.RLock()
        self.path = storage.folder

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: VideoCLIP | str | os.PathLike[str],
        *,
        windows: WindowOptions | None = None,
        source: ModelSource | None = None,
    ) -> Index:
        """Make an index without videos.

        Args:
            path: the folder of the index, such as ``"library.ovx"``. It must not exist, or be
                empty.
            model: the model that encodes the videos and the queries; or the ``source`` of
                :meth:`openvclip.VideoCLIP.from_pretrained`.
            windows: length and step of the windows. Default: those of the contract of the model.
            source: where the model is, so that :attr:`model` can load it later. Default: where
                :meth:`openvclip.VideoCLIP.from_pretrained` loaded it from.

        Raises:
            SearchError: the folder holds an index or other files, or is not writable.
            OpenVCLIPError: the model can't be loaded.
        """
        loaded = model if isinstance(model, VideoCLIP) else VideoCLIP.from_pretrained(model)
        return cls(Storage.create(path, IndexSettings.of(loaded, windows, source)), loaded)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: VideoCLIP | str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        autocast: torch.dtype | None = None,
        in_memory: bool = False,
    ) -> Index:
        """Open an index.

        Args:
            path: the folder of the index.
            model: the model that made the index; or where it is now, the ``source`` of
                :meth:`openvclip.VideoCLIP.from_pretrained`. Default: :attr:`model` loads it when it
                is needed.
            device: the device of a model that is loaded.
            autocast: see :class:`openvclip.VideoCLIP`; for a model that is loaded.
            in_memory: whether all vectors are read into memory: 2 bytes for each number, 1 GB for a
                million windows of 512 numbers. Default: they are read from the disk when they are
                used, and the system keeps them in its cache.

        Raises:
            SearchError: there is no index, or it is damaged, or a newer version of openvclip made
                it, or another model made it.
            OpenVCLIPError: the model can't be loaded from the place that is given.
        """
        storage = Storage(path, in_memory=in_memory)
        if model is not None and not isinstance(model, VideoCLIP):
            model = ModelSource.at(model).load(storage.settings.contract, device)
            model.autocast = autocast
        if model is not None:
            require_same_model(storage.folder, storage.settings, model)
        return cls(storage, model, device, autocast)

    # --- what the index is ---------------------------------------------------------------------

    @property
    def model(self) -> VideoCLIP:
        """The model of the index, which is loaded when it is first needed.

        Raises:
            SearchError: the index does not say where the model is, or the model can't be loaded
                from there, or another model is there now.
        """
        with self._lock:
            if self._model is None:
                source = self._storage.settings.source
                if source is None:
                    raise SearchError(
                        f"{self.path}: the index does not say where its model is. Give the model: "
                        "Index.open(path, model), or --model on the command line."
                    )
                model = self._loaded(source)
                model.autocast = self._autocast
                require_same_model(self.path, self._storage.settings, model)
                self._model, self._fingerprint = model, _fingerprint(model)
            return self._model

    def _loaded(self, source: ModelSource) -> VideoCLIP:
        try:
            return source.load(self.contract, self._device)
        except OpenVCLIPError as error:
            raise SearchError(
                f"{self.path}: the model of the index can't be loaded. The index says that it is "
                f"{source}. {error} If the model is in another place now, give the place: "
                "Index.open(path, model), or --model on the command line. 'openvclip index' with "
                "--model records the new place."
            ) from error

    @property
    def contract(self) -> Contract:
        """How the model of the index is used."""
        return self._storage.settings.contract

    @property
    def window_settings(self) -> WindowSettings:
        """The length and the step of the windows."""
        return self._storage.settings.windows

    @property
    def videos(self) -> list[str]:
        """The paths of the videos, in the order in which they were added."""
        return list(self.snapshot().paths)

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.snapshot().count

    def blocks(self) -> list[Block]:
        """Return the vectors of all windows. They are read from the disk when they are used."""
        return self.snapshot().blocks

    def windows(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Window]:
        """Return the windows of some rows.

        Args:
            rows: rows, counted from 0 over all blocks.

        Raises:
            SearchError: a row does not exist, or belongs to a removed video.
        """
        return self.snapshot().windows(rows)

    def snapshot(self) -> Snapshot:
        """Return the present content: blocks, paths and times that belong together.

        Raises:
            SearchError: the index can't be read.
        """
        with self._lock:
            if self._snapshot is None or not self._storage.is_current(self._snapshot):
                self._snapshot = self._storage.snapshot()
            return self._snapshot

    def __repr__(self) -> str:
        now = self.snapshot()
        return (
            f"Index({str(self.path)!r}: {len(now.paths)} videos, {now.count} windows of "
            f"{self.window_settings}; model {self.contract.model!r})"
        )

    # --- search --------------------------------------------------------------------------------

    @overload
    def search(
        self,
        query: list[Any] | tuple[Any, ...],
        k: int = ...,
        *,
        negative: Any = ...,
        min_score: float | None = ...,
    ) -> list[list[Moment]]: ...

    @overload
    def search(
        self, query: Any, k: int = ..., *, negative: Any = ..., min_score: float | None = ...
    ) -> list[Moment]: ...

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        negative: Any = (),
        min_score: float | None = None,
    ) -> Any:
        """Return the moments that fit a query best.

        The score of a window is its cosine similarity with the query. Neighbouring windows that fit
        about as well are one moment; see :mod:`openvclip.search.moments`.

        Args:
            query: a sentence; an image or a video: a ``pathlib.Path``, an image of Pillow, an array
                or another :data:`openvclip.video.VideoSource`; a :class:`~openvclip.search.Clip`;
                or a vector, floats ``[D]``. A list is several queries. A ``str`` is always a
                sentence. It is encoded as it is, without templates.
            k: number of moments. If there are fewer, all are returned.
            negative: a query or several queries of what the moments must not show, such as
                sentences. A window that is at least as similar to one of them as to ``query`` is
                in no moment.
            min_score: lowest score of a moment, from -1 to 1. Default: for a sentence the threshold
                of a calibrated model, see :meth:`openvclip.VideoCLIP.calibrate`; otherwise no
                limit. With -1 there is no limit.

        Returns:
            A list of :class:`~openvclip.search.Moment`, best first; equal scores are sorted by path
            and time. The list is empty if nothing fits. For several queries, a list of such lists.

        Raises:
            SearchError: a sentence is empty or longer than the model reads, a part of a video is
                empty, a vector has another length, ``k`` or ``min_score`` is out of range, or the
                index can't be read.
            VideoError, VideoNotFoundError, VideoShapeError, VideoOptionError, UsageError: an image
                or a video can't be read.
            OpenVCLIPError: the model of the index can't be loaded.
        """
        results = search_index(self, query, k, negative=negative, min_score=min_score)
        moments = [result.moments for result in results]
        return moments if as_queries(query)[1] else moments[0]

    # --- changes -------------------------------------------------------------------------------

    def add(
        self,
        videos: VideoPaths,
        *,
        batch_size: int = 16,
        num_threads: int | None = None,
        progress: bool | None = None,
    ) -> Report:
        """Add videos. A video that the index has is encoded again if its file changed.

        The videos that are done are on the disk after every few seconds. If the process is killed,
        the next call with the same videos continues with those that are left.

        Args:
            videos: a file, a folder with its subfolders, a pattern such as ``"clips/**/*.mp4"`` or
                a URL; or several of them.
            batch_size: number of windows to encode at a time.
            num_threads: number of threads that decode videos; see
                :func:`openvclip.video.read_clips`.
            progress: whether to show a progress bar. Default: only in a terminal.

        Returns:
            What was added, and the reason for each video that can't be read.

        Raises:
            SearchError: another process changes the index, or it can't be written. The videos of
                the last commit are in the index.
            UsageError, VideoOptionError: an option is out of range.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        return self._updating(BuildOptions(batch_size, num_threads), progress).add(videos)

    def update(
        self,
        *,
        batch_size: int = 16,
        num_threads: int | None = None,
        progress: bool | None = None,
    ) -> Report:
        """Compare the videos of the index with their files.

        Videos whose file changed (size or time of the last change) are encoded again. Videos whose
        file is gone are removed.

        Args:
            batch_size: see :meth:`add`.
            num_threads: see :meth:`add`.
            progress: see :meth:`add`.

        Raises:
            SearchError: the files of all videos are gone, if there are several, because a disk may
                not be connected; or see :meth:`add`.
            UsageError, VideoOptionError: see :meth:`add`.
            NonFiniteWeightsError, EvaluationError: see :meth:`add`.
        """
        return self._updating(BuildOptions(batch_size, num_threads), progress).update()

    def remove(self, videos: VideoPaths) -> list[str]:
        """Remove videos from the index. Their files stay.

        Args:
            videos: paths of videos in the index, folders of such videos, or patterns.

        Returns:
            The paths that were removed.

        Raises:
            SearchError: the index has no such video, or it can't be written.
        """
        return self._updating(BuildOptions()).remove(videos)

    def set_source(self, source: ModelSource | str | os.PathLike[str]) -> None:
        """Record where the model is now, if it was moved.

        :attr:`model` loads the model from there. The weights are checked when they are loaded.

        Args:
            source: a folder, or another source of :meth:`openvclip.VideoCLIP.from_pretrained`; or a
                :class:`~openvclip.search.ModelSource`.

        Raises:
            SearchError: another process changes the index, or it can't be written.
            UsageError: ``source`` is neither a text nor a path.
        """
        if not isinstance(source, ModelSource):
            source = ModelSource.at(source)
        self._storage.set_source(source)

    def save(self) -> None:
        """Free the space of removed videos, and join small files.

        The other methods save their changes themselves.

        Raises:
            SearchError: another process changes the index, or it can't be written.
        """
        with self._storage.writing() as writer:
            writer.compact(whole=True)

    def _updating(self, build: BuildOptions, progress: bool | None = None) -> Updating:
        return Updating(self._storage, self._unchanged_model, build, progress)

    def _unchanged_model(self) -> VideoCLIP:
        """Return the model, after a check that its weights are still those of the index."""
        model = self.model
        if _fingerprint(model) != self._fingerprint:
            require_same_model(self.path, self._storage.settings, model)
        return model


def _fingerprint(model: VideoCLIP) -> str:
    """Return what tells whether the weights of a model changed in this process."""
    parameters = named_parameters(model.model)
    return fingerprint({name: value.detach() for name, value in parameters.items()}, parameters)
