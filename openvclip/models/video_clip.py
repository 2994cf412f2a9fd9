"""A CLIP that is ready for videos and knows how it is used: :class:`VideoCLIP`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from openvclip.checkpoints.contract import Confidence, Contract
from openvclip.errors import UsageError
from openvclip.models.background import background_texts, with_background
from openvclip.models.batching import encode_each, encode_one
from openvclip.models.classifier import (
    Template,
    ZeroShotClassifier,
    require_names,
)
from openvclip.models.confidence import (
    DEFAULT_SCORE,
    Score,
    calibrate,
    effective_confidence,
    require_calibration,
    target_indices,
)
from openvclip.models.features import device_of, usable_device
from openvclip.models.hand_over import HandOver
from openvclip.models.prediction import (
    Prediction,
    default_tokenizer,
    logits_of,
    prediction_of,
)
from openvclip.models.text_side import TextSide
from openvclip.models.timeline import Timeline, predict_timeline
from openvclip.models.tokenizers import Tokenizer
from openvclip.models.usage import contract_of
from openvclip.models.video_features import VideoFeatures
from openvclip.models.video_usage import name_of, require_usable, usage_for
from openvclip.towers.temporal import expansion_of, is_expanded
from openvclip.towers.view import ExpansionSettings, Pooling
from openvclip.video.sampling import Sampling
from openvclip.video.sources import VideoSource, is_several
from openvclip.video.transforms import Transform
from openvclip.weights.names import unwrap

__all__ = ["VideoCLIP"]


class VideoCLIP(VideoFeatures, HandOver):
    """A CLIP model together with everything that its use on videos needs.

    Use a model with the frames, pixels, templates and pooling of its training. With other settings
    its accuracy falls without an error. The window, the boundary and the expanded layers are read
    from the model.

    All methods run in eval mode and without gradients. Several threads can use one object. Frozen
    weights (``requires_grad_(False)``) can change results by rounding, because PyTorch chooses
    other kernels for them.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel`` or
            ``SiglipModel``, expanded or not. The model is not copied.
        tokenizer: see :class:`openvclip.ZeroShotClassifier`. Default: as in
            :func:`openvclip.predict`.
        sampling: the frames of a video. Default: those of ``contract``, or the 3 views of 8 frames
            of the paper.
        transform: a transform from 8-bit frames to the input of the model. Default: that of
            ``contract``, or the transform of the released evaluation at the image size of the
            model.
        templates: texts in which the label replaces ``{}``, or functions from a label to a text.
            Default: those of ``contract``, or the 28 templates of the released code.
        pooling: how the features of frames become the feature of a clip, see
            :func:`openvclip.encode_video`. Default: that of ``contract``, or ``"unit_frames"``.
        autocast: the dtype of ``torch.autocast`` for images and videos, such as
            ``torch.bfloat16``. Default: no autocast.
        contract: the contract of the model, such as ``openvclip.checkpoints.read_contract``
            returns.

    Attributes:
        model: as the argument, without a wrapper for data parallelism.
        tokenizer: as the argument.
        sampling: as the argument.
        transform: as the argument.
        templates: as the argument.
        pooling: as the argument.
        autocast: as the argument.
        confidence: the calibration of the model: that of ``contract``, or the result of
            :meth:`calibrate`. ``None`` if the model is not calibrated.

    Raises:
        UnsupportedModelError: ``model`` is neither a CLIP of open_clip nor of transformers.
        PromptingError: the model has prompts.
        UsageError: ``model`` is a classifier; or the tokenizer of the model is not known; or
            ``contract`` is no contract; or ``pooling`` is unknown; or the contract says that class
            names are encoded by the original CLIP, whose weights are not in the model.
        VideoOptionError: ``transform`` or ``sampling`` is random or of another kind.
        ClassNamesError: ``templates`` is empty, or holds something else than templates.
        ContractError: the contract names something that this version of openvclip does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        sampling: Sampling | None = None,
        transform: Transform | None = None,
        templates: Sequence[Template] | None = None,
        pooling: Pooling | None = None,
        autocast: torch.dtype | None = None,
        contract: Contract | None = None,
    ) -> None:
        inner = unwrap(model)
        require_usable(inner, contract)
        self.model: Any = inner
        self.tokenizer = default_tokenizer(inner) if tokenizer is None else tokenizer
        if autocast is not None and not getattr(autocast, "is_floating_point", False):
            raise UsageError(
                f"autocast={autocast!r}; expected a floating-point dtype such as torch.bfloat16."
            )
        self.autocast = autocast
        self._contract = contract
        self.confidence: Confidence | None = None if contract is None else contract.confidence
        usage = usage_for(inner, contract, sampling, transform, templates, pooling)
        self.sampling, self.transform = usage.sampling, usage.transform
        self.templates, self.pooling = usage.templates, usage.pooling
        self._texts = TextSide(inner, self.tokenizer)

    # --- what the model says -------------------------------------------------------------------

    @property
    def contract(self) -> Contract:
        """How the model is used: the contract that was given, with the present settings."""
        known = self._contract
        name = name_of(self.model) if known is None else known.model
        present = contract_of(
            self.model,
            name,
            self.transform,
            sampling=self.sampling,
            templates=self.templates,
            pooling=self.pooling,
            confidence=self.confidence,
        )
        if known is None:
            return present
        return known.with_(
            library=present.library,
            expansion=present.expansion,
            frames=present.frames,
            pixels=present.pixels,
            templates=present.templates,
            pooling=present.pooling,
            confidence=present.confidence,
        )

    @property
    def expansion(self) -> ExpansionSettings | None:
        """The window, boundary and layers of the model; ``None`` if the model is not expanded."""
        return expansion_of(self.model) if is_expanded(self.model) else None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return device_of(self.model)

    def to(self, device: str | torch.device) -> VideoCLIP:
        """Move the model to a device, in place, and return this object.

        Args:
            device: the device, such as ``"cuda"``.

        Raises:
            UsageError: this machine has no such device.
        """
        self.model.to(device if isinstance(device, torch.dtype) else usable_device(device))
        self._texts.clear()
        return self

    # --- predictions ---------------------------------------------------------------------------

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is one video
        self,
        videos: VideoSource,
        labels: Sequence[str],
        *,
        background: Sequence[str] = ...,
        reject: bool | float | None = ...,
        fps: float | None = ...,
        batch_size: int = ...,
        num_threads: int | None = ...,
        progress: bool | None = ...,
    ) -> Prediction: ...

    @overload
    def classify(
        self,
        videos: Iterable[VideoSource],
        labels: Sequence[str],
        *,
        background: Sequence[str] = ...,
        reject: bool | float | None = ...,
        fps: float | None = ...,
        batch_size: int = ...,
        num_threads: int | None = ...,
        progress: bool | None = ...,
    ) -> list[Prediction]: ...

    def classify(
        self,
        videos: VideoSource | Iterable[VideoSource],
        labels: Sequence[str],
        *,
        background: Sequence[str] = (),
        reject: bool | float | None = None,
        fps: float | None = None,
        batch_size: int = 4,
        num_threads: int | None = None,
        progress: bool | None = None,
    ) -> Prediction | list[Prediction]:
        """Compute the probabilities of labels for a video, or for each of several videos.

        The predictions are those of :func:`openvclip.predict`. The text features of the labels are
        computed once and kept.

        Args:
            videos: a video, see :data:`openvclip.video.VideoSource`, or an image; or a list, a
                tuple or an iterator of them. A list is never one video: for a list of frames give
                :class:`openvclip.video.VideoFrames`.
            labels: K different labels.
            background: texts of what else a video can show; see :func:`openvclip.predict`.
            reject: which videos are rejected as none of the labels; see :func:`openvclip.predict`.
                Default: those below the threshold of ``confidence`` if the model is calibrated, and
                those for which a background text is more probable than every label.
            fps: frames per second, if the videos are arrays of frames.
            batch_size: number of videos to encode at a time. The batches change the probabilities
                only by rounding.
            num_threads: number of threads that decode videos ahead; see
                :func:`openvclip.video.read_clips`. A single video is decoded in this thread.
            progress: whether to show a progress bar. Default: only in a terminal, and for several
                videos.

        Returns:
            A :class:`~openvclip.Prediction` for a video, a list of them for several videos.

        Raises:
            ClassNamesError: ``labels`` is empty, or ``labels`` or ``background`` hold an empty or
                repeated text.
            VideoError, VideoShapeError, VideoOptionError: a video can't be read. For several
                videos, the error begins with the index of the video.
            UsageError: ``videos`` is empty, a video is of an unknown kind, or ``batch_size`` is not
                above 0; or ``reject`` is ``True`` and the model is not calibrated, or is a number
                that the score can't have.
            NonFiniteWeightsError, EvaluationError: see :func:`openvclip.predict`.

        Warns:
            LabelWarning: the text tower can't tell some labels apart, or there is only one label.
        """
        reader = self._reader(fps, batch_size, num_threads, progress)
        confidence = self.confidence
        effective_confidence(confidence, reject)  # a wrong value is an error before videos are read
        background = background_texts(background)
        classifier = self.classifier(with_background(labels, background))

        def prediction(name: str, row: Tensor) -> Prediction:
            return prediction_of(
                name, classifier, row, background, confidence=confidence, reject=reject
            )

        def logits(views: Tensor) -> Tensor:
            with self._autocast():
                return logits_of(classifier, views)

        if is_several(videos):
            rows = encode_each(videos, logits, reader)
            return [prediction(name, row) for name, row in rows]
        return prediction(*encode_one(videos, logits, reader))

    def calibrate(
        self,
        videos: Iterable[VideoSource],
        labels: Sequence[str],
        targets: Sequence[str | int | None] | Tensor | None = None,
        *,
        background: Sequence[str] = (),
        keep: float = 0.95,
        score: Score = DEFAULT_SCORE,
        **reading: Any,
    ) -> Confidence:
        """Choose the threshold for "none of these", and the temperature, on videos of one's own.

        The result is stored in ``confidence`` and in the contract. :meth:`classify` uses it.

        Args:
            videos: N videos that the model was not trained on; see :meth:`classify`.
            labels: the K labels of later use.
            targets: the label of each video, or its index; ``None`` or -1 for a video that is none
                of the labels. Default: every video belongs to some label, and only the threshold
                is chosen.
            background: the background texts of later use; see :func:`openvclip.predict`.
            keep: share of videos of the labels that the threshold must not reject, in (0, 1).
            score: the score to compare with the threshold; see
                :func:`openvclip.models.confidence_score`.
            **reading: ``fps``, ``batch_size``, ``num_threads`` and ``progress``; see
                :meth:`classify`.

        Raises:
            UsageError: see :func:`openvclip.models.calibrate`, and :meth:`classify`.
            ClassNamesError, VideoError, VideoShapeError, VideoOptionError: see :meth:`classify`.

        Warns:
            CalibrationWarning: all videos are classified correctly, so the temperature stays 1.
        """
        require_calibration(keep, score)
        labels = require_names(labels, "labels")
        several: list[Any] = list(videos) if is_several(videos) else [videos]
        if targets is not None:  # wrong targets are an error before videos are read
            targets = target_indices(targets, labels, len(several))
        predictions = self.classify(several, labels, background=background, reject=False, **reading)
        self.confidence = calibrate(predictions, targets, keep=keep, score=score)
        return self.confidence

    def timeline(
        self,
        video: VideoSource,
        labels: Sequence[str],
        *,
        seconds: float | None = None,
        step: float | None = None,
        batch_size: int = 4,
        progress: bool | None = None,
        fps: float | None = None,
    ) -> Timeline:
        """Compute the probabilities of labels in each window of a long video.

        The temperature of ``confidence`` is used. No window is rejected.

        Args:
            video: the video; see :data:`openvclip.video.VideoSource`.
            labels: K different labels.
            seconds: length of a window. Default: the length of a view of ``sampling``.
            step: seconds from the start of a window to the start of the next window. Default: half
                of ``seconds``.
            batch_size: number of windows to encode at a time.
            progress: whether to show a progress bar. Default: only in a terminal.
            fps: frames per second, if ``video`` is an array of frames.

        Raises:
            VideoError, VideoShapeError, VideoOptionError, UsageError, ClassNamesError: see
                :func:`openvclip.models.predict_timeline`.
        """
        frames = self.sampling
        length = frames.num_frames * frames.sampling_rate / frames.target_fps
        classifier = self.classifier(labels)  # its texts are encoded without autocast
        with self._autocast():
            return predict_timeline(
                classifier,
                video,
                transform=self.transform,
                num_frames=frames.num_frames,
                seconds=length if seconds is None else seconds,
                step=step,
                batch_size=batch_size,
                progress=progress,
                fps=fps,
                confidence=self.confidence,
            )

    def classifier(self, labels: Sequence[str]) -> ZeroShotClassifier:
        """Return the classifier of labels. It is kept for the next call with these labels.

        A classifier is made anew if the text weights of the model changed.

        Args:
            labels: K different labels.

        Raises:
            ClassNamesError: ``labels`` is empty, or holds an empty or repeated label; or
                ``templates`` is empty, or holds a template without ``{}``.

        Warns:
            LabelWarning: the text tower can't tell some labels apart, or there is only one label.
        """
        return self._texts.classifier(labels, self.templates, self.pooling)

    # --- the object ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        settings, frames = self.expansion, self.sampling
        if settings is None:
            time = "not expanded"
        else:
            layers = "all" if settings.layers is None else str(list(settings.layers))
            time = f"window {settings.window}, boundary {settings.boundary!r}, layers {layers}"
        pixels = f"{self.transform.size} pixels, {self.transform.name!r}"
        return (
            f"VideoCLIP({name_of(self.model) if self._contract is None else self._contract.model}"
            f": {time}; {frames.views} x {frames.num_frames} frames, {frames.sampler!r}; {pixels}; "
            f"{len(self.templates)} templates; pooling {self.pooling!r}; on {self.device})"
        )
