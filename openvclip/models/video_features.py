"""The features of videos, images and texts that a VideoCLIP computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openvclip.errors import OpenVCLIPError, UsageError, VideoShapeError
from openvclip.models.batching import VideoReader, encode_each, encode_one, encode_readable
from openvclip.models.features import device_of, video_features
from openvclip.models.finite import require_finite, require_values
from openvclip.models.modes import evaluation_mode
from openvclip.models.text_side import TextSide
from openvclip.towers.view import Pooling
from openvclip.video.sampling import Sampling
from openvclip.video.sources import VideoSource, is_several
from openvclip.video.transforms import Transform
from openvclip.weights.names import named_state


class VideoFeatures:
    """The methods of :class:`openvclip.VideoCLIP` that return features."""

    model: Any
    sampling: Sampling
    transform: Transform
    pooling: Pooling
    autocast: torch.dtype | None
    _texts: TextSide

    @cached_property
    def embed_dim(self) -> int:
        """D, the length of a feature."""
        size = self.transform.size
        return self._features(torch.zeros(1, 1, 3, size, size)).shape[-1]

    def encode_video(
        self,
        videos: VideoSource | Iterable[VideoSource],
        *,
        fps: float | None = None,
        batch_size: int = 4,
        num_threads: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Return the feature of a video, or of each of several videos, with unit length.

        The features of the views are pooled as ``pooling`` says, averaged, and L2-normalised.

        Args:
            videos: see :meth:`classify`.
            fps: see :meth:`classify`.
            batch_size: see :meth:`classify`.
            num_threads: see :meth:`classify`.
            progress: see :meth:`classify`.

        Returns:
            float32 ``[D]`` for a video, ``[n, D]`` for several videos, on the CPU.

        Raises:
            VideoError, VideoShapeError, VideoOptionError, UsageError: see :meth:`classify`.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        reader = self._reader(fps, batch_size, num_threads, progress)
        if is_several(videos):
            rows = [row.cpu() for _, row in encode_each(videos, self._features, reader)]
            return functional.normalize(torch.stack(rows), dim=-1)
        return functional.normalize(encode_one(videos, self._features, reader)[1], dim=-1).cpu()

    def try_encode_videos(
        self,
        videos: Iterable[VideoSource],
        *,
        fps: float | None = None,
        batch_size: int = 4,
        num_threads: int | None = None,
    ) -> tuple[Tensor, dict[int, OpenVCLIPError]]:
        """Return the feature of each of several videos, and the errors of unreadable videos.

        The features are those of :meth:`encode_video`. A video that can't be read raises no error.

        Args:
            videos: n videos; see :meth:`classify`. The list may be empty.
            fps: see :meth:`classify`.
            batch_size: see :meth:`classify`.
            num_threads: see :meth:`classify`.

        Returns:
            float32 ``[n, D]`` on the CPU, NaN for each unreadable video; and the errors by the
            place of the video.

        Raises:
            VideoOptionError: an option is out of range, or the frame rate of an array is not given.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        several = list(videos)
        reader = self._reader(fps, batch_size, num_threads, False)
        found, errors = encode_readable(several, self._features, reader)
        width = next(iter(found.values())).shape[-1] if found else self.embed_dim
        features = torch.full((len(several), width), torch.nan)
        for place, row in found.items():
            features[place] = functional.normalize(row, dim=-1)
        return features, errors

    def encode_image(
        self,
        images: VideoSource | Iterable[VideoSource],
        *,
        batch_size: int = 32,
        num_threads: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Return the feature of an image, or of each of several images, with unit length.

        The features are those of plain CLIP, also if the model is expanded.

        Args:
            images: an image: the path of a file, its bytes, a file object, an image of Pillow, or
                uint8 ``[H, W, C]`` or ``[C, H, W]``; or a list of images. A file must have the
                extension of an image format.
            batch_size: number of images to encode at a time.
            num_threads: see :meth:`classify`.
            progress: see :meth:`classify`.

        Returns:
            float32 ``[D]`` for an image, ``[n, D]`` for several images, on the CPU.

        Raises:
            VideoError, VideoShapeError, UsageError: an image can't be read.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        return self.encode_video(
            images, batch_size=batch_size, num_threads=num_threads, progress=progress
        )

    def encode_clips(self, clips: Tensor) -> Tensor:
        """Return the feature of each of several clips that are preprocessed already.

        Args:
            clips: float ``[n, T, C, H, W]``, as ``transform`` returns them, on any device.

        Returns:
            float32 ``[n, D]`` with rows of unit length, on the device of the model.

        Raises:
            VideoShapeError: ``clips`` has another shape.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        if clips.ndim != 5:
            raise VideoShapeError(
                f"clips has the shape {list(clips.shape)}; expected [n, T, C, H, W]. Add an axis "
                "to a single clip: clip[None]."
            )
        return functional.normalize(self._features(clips), dim=-1)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Return the feature of a text, or of each of several texts, with unit length.

        The texts are encoded as they are, without templates.

        Args:
            texts: a text, or n texts.

        Returns:
            float32 ``[D]`` for a text, ``[n, D]`` for several texts, on the CPU.

        Raises:
            UsageError: ``texts`` is empty, or holds something else than texts.
            NonFiniteWeightsError, EvaluationError: the features are not finite.
        """
        several = [texts] if isinstance(texts, str) else texts
        if isinstance(several, Iterable):
            several = list(several)
        if (
            not isinstance(several, list)
            or not several
            or not all(isinstance(text, str) for text in several)
        ):
            raise UsageError(f"texts is {texts!r}; expected a text or a list of texts.")
        features = self._texts.encode(several).float().cpu()
        return features[0] if isinstance(texts, str) else features

    def tokens_left_out(self, text: str) -> int:
        """Return the number of tokens of a text that exceed the length of a text of the model.

        :meth:`encode_text` cuts these tokens off, so they have no effect.

        Args:
            text: the text.

        Returns:
            0 if the text fits.
        """
        return self._texts.left_out(text)

    def _autocast(self) -> AbstractContextManager[None]:
        require_values(self.model)  # autocast has no meta device
        dtype = self.autocast
        context: AbstractContextManager[None] = torch.autocast(
            device_of(self.model).type, dtype, enabled=dtype is not None
        )
        return context

    @torch.no_grad()
    def _features(self, views: Tensor) -> Tensor:
        """Return the features ``[n, D]`` of views or images, pooled over the frames."""
        first = next(self.model.parameters())
        with self._autocast(), evaluation_mode(self.model):
            pixels = views.to(first.device, first.dtype)
            features = video_features(self.model, pixels, self.pooling).float()
        require_finite(features, lambda: named_state(self.model), "The features")
        return features

    def _reader(self, *options: Any) -> VideoReader:
        return VideoReader(self.sampling, self.transform, *options)
