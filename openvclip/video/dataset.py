"""A data set of video files for a ``DataLoader``; a broken video does not stop a run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from openvclip.errors import AnnotationError, VideoError, VideoNotFoundError
from openvclip.video.annotations import read_annotations
from openvclip.video.decoding import read_clip
from openvclip.video.sampling import Sampling
from openvclip.video.transforms import Transform

__all__ = ["Failure", "VideoDataset", "VideoSample"]

_SUBSTITUTES = 20


class VideoSample(NamedTuple):
    """An item of ``VideoDataset(..., details=True)``; ``default_collate`` can batch it.

    Attributes:
        video: the frames, with the same shape and transform as in an item without ``details``. If
            the file is broken, the transform is applied to black frames.
        label: class index.
        position: index into ``dataset.samples``.
        error: the reason why the video could not be read, or ``""``. An evaluation counts a sample
            with an error as wrong and ignores the logits of the black frames.
    """

    video: Tensor
    label: int
    position: int
    error: str


class Failure(NamedTuple):
    """A video that could not be read.

    Attributes:
        position: index into ``dataset.samples``.
        path: the file.
        reason: the text of the error.
    """

    position: int
    path: str
    reason: str


class VideoDataset(Dataset[tuple[Tensor, int] | VideoSample]):
    """Video files with class indices.

    An item is ``(video, class index)``. With ``details=True`` an item is a :class:`VideoSample`
    ``(video, label, position, error)``, for evaluation. ``video`` is ``[T, C, H, W]`` if
    ``sampling.views`` is 1, and ``[V, T, C, H, W]`` otherwise. With a transform of three crops it
    is ``[3V, T, C, H, W]``: each crop of a view counts as a view.

    If a video cannot be read, it is read a second time. The sampler ``"dense"`` then uses another
    start. If this fails too, the item depends on ``details``:

    - ``details=False`` (training): the item is another video of the data set, drawn at random,
      together with the class index of that video;
    - ``details=True`` (evaluation): the item has black frames, and ``error`` gives the reason. So
      every sample is counted once.

    In both cases the broken video is listed in :attr:`failures`. This includes the failures in the
    workers of a ``DataLoader``, because all processes append to the same file.

    All random numbers depend only on ``(seed, epoch, index)``. They do not depend on the number of
    workers or the order of the items. Call :meth:`set_epoch` before each epoch; the call also
    reaches persistent workers.

    Args:
        annotations: a file or folder for :func:`read_annotations`, or ``(path, class index)``
            pairs, such as the samples of a split of :mod:`openvclip.video.protocols`.
        root: folder to which relative paths refer.
        transform: callable that turns uint8 ``[..., T, C, H, W]`` into the input of the model, such
            as ``transforms.build("train")``. With ``None`` the frames stay uint8; these can be
            batched only if all videos have the same size. A callable that is no
            :class:`~openvclip.video.transforms.Transform` may use PyTorch's global generator. The
            global generator is seeded before the call and restored after it.
        sampling: the frames to read. Default: ``Sampling()``. Use the sampler ``"dense"`` for
            training and ``"released"`` or ``"uniform"`` for evaluation.
        class_names: class names in the order of their class indices, for annotation files that
            contain class names.
        subset: ``"train"``, ``"test"`` or ``"val"``, for official lists; see
            :func:`read_annotations`.
        split: number of the official split, for folders of official lists.
        details: whether items are :class:`VideoSample`.
        seed: seed of all random numbers.
        failure_log: file to which failures are appended, one JSON object on each line. Default: a
            temporary file that is deleted together with the data set.

    Attributes:
        samples: ``(path, class index)`` pairs, as in the annotations.
        class_names: the class names, or ``None`` if neither the argument nor the file gives them.

    Raises:
        AnnotationError: see :func:`read_annotations`; also raised for an empty list of pairs.
        VideoNotFoundError: the annotations are a list of Kinetics, and the folder ``root`` does not
            exist.
        VideoError: on access with ``details=False``, if many videos in succession cannot be read.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | Sequence[tuple[str, int]],
        root: str | os.PathLike[str] = ".",
        *,
        transform: Callable[[Tensor], Tensor] | None,
        sampling: Sampling | None = None,
        class_names: Sequence[str] | None = None,
        subset: str | None = None,
        split: int = 1,
        details: bool = False,
        seed: int = 0,
        failure_log: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = os.fspath(root)
        if isinstance(annotations, (str, os.PathLike)):
            self.samples, self.class_names = read_annotations(
                annotations, class_names, subset=subset, split=split, root=self.root
            )
        else:
            self.samples = _pairs(annotations)
            self.class_names = None if class_names is None else list(class_names)
        self.transform = transform
        self.sampling = sampling or Sampling()
        self.details = details
        self.seed = seed
        # In shared memory, so that persistent workers read the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._log = _FailureLog(failure_log)

    def __len__(self) -> int:
        return len(self.samples)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy, or a data set that was pickled, an epoch of its own in shared memory.

        A ``DataLoader`` sends the data set to spawned workers together with the shared memory; the
        epoch is then already shared.
        """
        self.__dict__.update(state)
        if not self._epoch.is_shared():
            self._epoch = self._epoch.clone().share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Call this before iterating over the loader, as for a sampler.

        A copy (``copy.deepcopy`` or pickle) has an epoch of its own: call the method of the data
        set that the loader has.
        """
        self._epoch.fill_(int(epoch))

    @property
    def epoch(self) -> int:
        """The epoch that was set last; 0 at first."""
        return int(self._epoch)

    @property
    def failures(self) -> list[Failure]:
        """Videos that could not be read so far in any process, in the order of the samples."""
        return self._log.read()

    def path(self, index: int) -> str:
        """Return the path of the video with this ``index``, including ``root``."""
        return os.path.join(self.root, self.samples[index][0])

    def __getitem__(self, index: int) -> tuple[Tensor, int] | VideoSample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set with {len(self)} samples")
        index %= len(self)
        video, reason = self._load(index)
        if self.details:
            frames = self._black(index) if video is None else video
            return VideoSample(frames, self.samples[index][1], index, reason)
        return self._substitute(index, reason) if video is None else (video, self.samples[index][1])

    def _load(self, index: int) -> tuple[Tensor | None, str]:
        reason = ""
        for attempt in range(2):
            generator = self._generator(index, attempt)
            try:
                return self._read(index, generator), ""
            except VideoError as error:
                reason = str(error)
                if isinstance(error, VideoNotFoundError):
                    break
        self._log.add(Failure(index, self.path(index), reason))
        return None, reason

    def _read(self, index: int, generator: torch.Generator) -> Tensor:
        own = self.transform if isinstance(self.transform, Transform) else None
        path = self.path(index)
        clip = read_clip(path, **vars(self.sampling), generator=generator, transform=own)
        clip = clip[0] if self.sampling.views == 1 else clip
        return self._apply(clip, generator) if own is None else _views(clip)

    def _apply(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        if self.transform is None:
            return clip
        if isinstance(self.transform, Transform):
            return _views(self.transform(clip, generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            return self.transform(clip)

    def _black(self, index: int) -> Tensor:
        views, shape = self.sampling.views, (self.sampling.num_frames, 3, 224, 224)
        clip = torch.zeros(shape if views == 1 else (views, *shape), dtype=torch.uint8)
        return self._apply(clip, self._generator(index, 0))

    def _substitute(self, index: int, reason: str) -> tuple[Tensor, int]:
        generator = self._generator(index, 2)
        for _ in range(_SUBSTITUTES):
            other = int(torch.randint(len(self), (), generator=generator))
            video = None if other == index else self._load(other)[0]
            if video is not None:
                return video, self.samples[other][1]
        raise VideoError(
            f"{reason}\nNone of the {_SUBSTITUTES} videos drawn as a replacement could be read. "
            f"Check root={self.root!r}. The reasons are in dataset.failures."
        )

    def _generator(self, index: int, attempt: int) -> torch.Generator:
        # A hash instead of a sum: seed 0 in epoch 1 must not repeat seed 1 in epoch 0.
        text = f"{self.seed}/{self.epoch}/{index}/{attempt}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _views(pixels: Tensor) -> Tensor:
    """Count each crop of a view as a view."""
    return pixels.flatten(0, 1) if pixels.ndim > 5 else pixels


def _pairs(annotations: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    pairs = [(os.fspath(path), int(class_index)) for path, class_index in annotations]
    if not pairs:
        raise AnnotationError("annotations is an empty list; expected (path, class index) pairs.")
    return pairs


class _FailureLog:
    """A file to which several processes append. Other processes receive only its name."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        if path is not None:
            self.path = os.path.abspath(os.fspath(path))
            return
        name = f"openvclip-failures-{uuid.uuid4().hex}.jsonl"
        self.path = os.path.join(tempfile.gettempdir(), name)
        weakref.finalize(self, _remove, self.path, os.getpid())

    def add(self, failure: Failure) -> None:
        line = json.dumps(failure._asdict()) + "\n"
        # Appending with one write keeps the lines of several processes whole.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[Failure]:
        try:
            with open(self.path, encoding="utf-8") as file:
                failures = [Failure(**json.loads(line)) for line in file]
        except FileNotFoundError:
            return []
        return sorted({failure.position: failure for failure in failures}.values())


def _remove(path: str, owner: int) -> None:
    # A forked worker also runs this finalizer at its end, but only the process that made the data
    # set may remove the file.
    if os.getpid() == owner and os.path.exists(path):
        os.remove(path)
