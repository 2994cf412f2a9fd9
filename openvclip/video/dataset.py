"""A data set of video files for a ``DataLoader``; a broken video never stops a run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    """What ``VideoDataset(..., details=True)`` gives; ``default_collate`` makes batches of it.

    Attributes:
        video: as without details. Black, through the same transform, where the file is broken.
        label: class index.
        position: index into ``dataset.samples``.
        error: why the video could not be read, or ``""``. An evaluation counts such a sample as
            wrong, whatever the model says of the black frames.
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
    """Video files with labels.

    An item is ``(video, label)``, so that ``for video, label in loader`` is a training loop; with
    ``details=True`` it is a :class:`VideoSample` ``(video, label, position, error)``
    for evaluation.
    ``video`` is ``[T, C, H, W]`` for ``views=1`` and ``[V, T, C, H, W]`` for more. With a transform
    of three crops it is ``[3V, T, C, H, W]``: each crop of a view is a view.

    A video that cannot be read is tried once more (``"dense"``: with another start). If that fails
    too, its place is taken

    - by another video of the data set, drawn at random, with that one's label, in training
      (``details=False``);
    - by black frames with the reason in ``error`` for ``details=True``: nothing is replaced, so
      every sample is counted once.

    Either way it is listed in :attr:`failures`, also when it was a worker of the ``DataLoader``
    that met it: workers append to a file that all processes share.

    What is random is drawn from ``(seed, epoch, index)`` alone: the same for any number of workers
    and any order. Call :meth:`set_epoch` before each epoch; it reaches persistent workers too.

    Args:
        annotations: a file or folder for :func:`read_annotations`, or ``(path, class index)``
            pairs, such as the samples of a split of :mod:`openvclip.video.protocols`.
        root: folder that relative paths start from.
        transform: callable from uint8 ``[..., T, C, H, W]`` to what the model gets, such as
            ``transforms.build("train")``; ``None`` leaves the uint8 frames, which can be batched
            only where all videos have one size. Callables other than
            :class:`~openvclip.video.transforms.Transform` may use PyTorch's global generator, which
            is seeded for the item and put back.
        sampling: which frames to read; ``Sampling()`` by default. Take the sampler ``"dense"`` for
            training, ``"released"`` or ``"uniform"`` for evaluation.
        class_names: the classes in the order of their indices, for annotation files with names.
        subset: ``"train"``, ``"test"`` or ``"val"``, for official lists; see
            :func:`read_annotations`.
        split: which official split, for folders of official lists.
        details: give :class:`VideoSample` items.
        seed: start of all random numbers.
        failure_log: file to which failures are appended, one JSON object on a line; kept. By
            default a temporary file that goes with the data set.

    Attributes:
        samples: ``(path, class index)`` pairs as annotated.
        class_names: the names, or ``None`` if neither given nor in the file.

    Raises:
        AnnotationError: see :func:`read_annotations`; or an empty list of pairs.
        VideoNotFoundError: a list of Kinetics, and no folder ``root``.
        VideoError: on access, in training, when one video after another cannot be read.
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
            found = read_annotations(
                annotations, class_names, subset=subset, split=split, root=self.root
            )
            self.samples, self.class_names = found
        else:
            self.samples = _pairs(annotations)
            self.class_names = None if class_names is None else list(class_names)
        self.transform = transform
        self.sampling = sampling or Sampling()
        self.details = details
        self.seed = seed
        # In shared memory, so that workers that live on see the new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._log = _FailureLog(failure_log)

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes; call it before iterating the loader, as for a sampler."""
        self._epoch.fill_(int(epoch))

    @property
    def epoch(self) -> int:
        """The epoch last set."""
        return int(self._epoch)

    @property
    def failures(self) -> list[Failure]:
        """The videos that no process could read so far, each once, in the order of the samples."""
        return self._log.read()

    def path(self, index: int) -> str:
        """Where the video of a sample lies: its path below ``root``."""
        return os.path.join(self.root, self.samples[index][0])

    def __getitem__(self, index: int) -> tuple[Tensor, int] | VideoSample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a data set with {len(self)} samples")
        index %= len(self)
        video, reason = self._load(index)
        if self.details:
            shown = self._black(index) if video is None else video
            return VideoSample(shown, self.samples[index][1], index, reason)
        return self._substitute(index, reason) if video is None else (video, self.samples[index][1])

    def _load(self, index: int) -> tuple[Tensor | None, str]:
        reason = ""
        for attempt in range(2):
            generator = self._generator(index, attempt)
            try:
                return self._apply(self._read(index, generator), generator), ""
            except VideoError as error:
                reason = str(error)
                if isinstance(error, VideoNotFoundError):
                    break
        self._log.add(Failure(index, self.path(index), reason))
        return None, reason

    def _read(self, index: int, generator: torch.Generator) -> Tensor:
        clip = read_clip(self.path(index), **vars(self.sampling), generator=generator)
        return clip[0] if self.sampling.views == 1 else clip

    def _apply(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        if self.transform is None:
            return clip
        if isinstance(self.transform, Transform):
            shown = self.transform(clip, generator)
            return shown.flatten(0, 1) if shown.ndim > 5 else shown  # crops of a view are views
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
            f"{reason}\nNone of {_SUBSTITUTES} other videos drawn in its place could be read "
            f"either. Check root={self.root!r}, and dataset.failures for the reasons."
        )

    def _generator(self, index: int, attempt: int) -> torch.Generator:
        # A hash rather than a sum: seed 0 in epoch 1 must not repeat seed 1 in epoch 0.
        text = f"{self.seed}/{self.epoch}/{index}/{attempt}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _pairs(annotations: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    pairs = [(os.fspath(path), int(label)) for path, label in annotations]
    if not pairs:
        raise AnnotationError("annotations is an empty list; expected (path, class index) pairs.")
    return pairs


class _FailureLog:
    """A file that several processes append to; only its name travels to them."""

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
                found = [Failure(**json.loads(line)) for line in file]
        except FileNotFoundError:
            return []
        return sorted({failure.position: failure for failure in found}.values())


def _remove(path: str, owner: int) -> None:
    # A forked worker ends with a copy of the log's owner; the file is not the worker's to remove.
    if os.getpid() == owner and os.path.exists(path):
        os.remove(path)
