"""Compute the features of many videos and measure the time.

Each video is read once. A stopped run can be continued, and several processes can share a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openvclip.commands.progress import progress_bar
from openvclip.errors import UsageError
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.records import Record, Records
from openvclip.evaluation.timing import Clock, Timing, joined_timing
from openvclip.models.finite import require_finite
from openvclip.models.modes import evaluation_mode
from openvclip.processes import Processes
from openvclip.towers.temporal import encode_video
from openvclip.towers.view import Pooling, require_pooling
from openvclip.video import VideoDataset, VideoSample
from openvclip.video.padding import PaddedSamples, pad_samples
from openvclip.weights.arguments import is_whole
from openvclip.weights.names import named_state


@dataclass(frozen=True)
class BatchOptions:
    """How videos are encoded in batches.

    Attributes:
        batch_size: number of videos to encode at a time, each with all its views.
        num_workers: number of processes that decode. 0 decodes in the calling process.
        amp: dtype for autocast while encoding. ``None`` encodes without autocast.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.
        pooling: how the features of frames become the feature of a clip, see
            :func:`openvclip.encode_video`. ``"frames"`` for ViFi-CLIP.

    Raises:
        UsageError: ``pooling`` is unknown, or ``batch_size`` or ``num_workers`` is no whole number
            of at least 1 or 0.
    """

    batch_size: int = 8
    num_workers: int = 2
    amp: torch.dtype | None = None
    progress: bool | None = None
    description: str = "encode"
    pooling: Pooling = "unit_frames"

    def __post_init__(self) -> None:
        require_pooling(self.pooling)
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if not is_whole(getattr(self, name), least):
                raise UsageError(
                    f"{name}={getattr(self, name)!r}: expected a whole number of at least {least}."
                )


def encode_videos(
    model: nn.Module,
    dataset: VideoDataset,
    records: Records,
    *,
    mixture: Mixture | None = None,
    options: BatchOptions | None = None,
    processes: Processes | None = None,
) -> Timing:
    """Add a record with the features of each batch of videos to ``records``.

    The values of a record are the features of the R readable videos of the batch, float32
    ``[R, L, D]``. L is the number of interpolation weights of ``mixture``, or 1 if the model is
    encoded with its own weights. The errors of the record name the unreadable videos of the batch.
    If no video of the batch can be read, the values are an empty tensor. If a record has errors,
    the next run encodes the batch again.

    The feature of a video is the sum of :func:`openvclip.encode_video` over the views. The dot
    product of this feature and a text feature is the logit of the text, summed over the views and
    divided by the logit scale. The length of the feature is not 1: normalise the feature before you
    store it for a search.

    The batches depend on the order of the data set only. They do not depend on the number of
    processes, or on the records of earlier runs. So the features are bitwise equal to the features
    of a single process that runs without a stop.

    Args:
        model: encodes clips. On exit the model has its original weights, bitwise.
        dataset: returns :class:`openvclip.video.VideoSample` (``details=True``). The clips of the
            sampler ``"seconds"`` differ in length: they are padded, and their features are those of
            their own frames alone.
        records: batches that have a record without errors are skipped. The key of a record is the
            number of the batch.
        mixture: the weights to encode with. Each video is read once for all of them. Default: the
            weights of ``model``.
        options: batch size, worker processes, autocast and progress bar. Default:
            ``BatchOptions()``.
        processes: the processes that share the work. Default: the calling process alone.

    Returns:
        The time that all processes spent in this run.

    Raises:
        NonFiniteWeightsError: features are NaN or infinite, because weights are. The error names
            the entries.
        EvaluationError: features are NaN or infinite, and all weights are finite.
    """
    mixture, options = mixture or Mixture(), options or BatchOptions()
    processes = processes or Processes()
    batches = batches_of(len(dataset), options.batch_size)
    remaining = [key for key in range(len(batches)) if not _is_done(records, key)]
    keys = processes.share(remaining)
    processes.wait()  # all processes have read the same records before the first record is added
    clock, n_encoded = Clock(), 0
    loader = DataLoader(
        dataset,
        batch_sampler=[batches[key] for key in keys],
        num_workers=min(options.num_workers, len(keys)),
        collate_fn=pad_samples if dataset.sampling.sampler == "seconds" else None,
        pin_memory=next(model.parameters()).device.type == "cuda",
    )
    bar = _bar(len(dataset), sum(len(batches[key]) for key in remaining), processes, options)
    with bar, evaluation_mode(model), torch.no_grad(), mixture.setters(model) as setters:
        clock.lap("other")
        for key, sample in zip(keys, loader, strict=True):
            clock.lap("decode")
            record = _encoded(model, key, sample, setters, options, clock)
            records.add(record)
            n_encoded += len(sample.error) - len(record.errors)
            bar.update(min(len(sample.error) * processes.world_size, bar.total - bar.n))
            clock.lap("other")
    processes.wait()
    records.reload()
    return joined_timing(processes.gather(clock.timing(n_encoded)))


def _encoded(
    model: nn.Module,
    key: int,
    sample: VideoSample | PaddedSamples,
    setters: Sequence[Callable[[], None]],
    options: BatchOptions,
    clock: Clock,
) -> Record:
    """Set the weights with each setter, and encode the readable videos of the batch."""
    first = next(model.parameters())
    errors = {index: reason for index, reason in enumerate(sample.error) if reason}
    video = _readable(sample.video, errors).to(first.device, first.dtype)
    lengths = None
    if isinstance(sample, PaddedSamples):
        lengths = _readable(sample.mask, errors).sum(dim=1).tolist()
    clock.lap("copy")
    features = []
    for set_weights in setters if len(video) else ():
        set_weights()
        clock.lap("other")
        with _autocast(first.device, options.amp):
            features.append(_clip_features(model, video, lengths, options.pooling).float().cpu())
        clock.lap("encode")
        require_finite(features[-1], lambda: named_state(model), "The features of videos")
    values = torch.stack(features, dim=1) if features else torch.empty(0)
    return Record(key, values, errors)


def batches_of(n: int, batch_size: int) -> list[list[int]]:
    """Return the indices 0 to ``n - 1`` in order, in lists of ``batch_size`` indices."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


def _is_done(records: Records, key: int) -> bool:
    return key in records.by_key and not records.by_key[key].errors


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(device.type, amp) if amp is not None else nullcontext()


def _readable(video: Tensor, errors: Mapping[int, str]) -> Tensor:
    """Return the videos of a batch that could be read."""
    if not errors:
        return video
    return video[[index for index in range(len(video)) if index not in errors]]


def _clip_features(
    model: nn.Module, video: Tensor, lengths: list[int] | None, pooling: Pooling
) -> Tensor:
    """Encode a batch to ``[B, D]``, with the frames in front of the padding alone.

    Clips of one length are encoded together. So no frame of padding is computed, and the frames of
    an expanded model do not attend to the padding.
    """
    if lengths is None:
        return _summed_over_views(model, video, pooling)
    rows: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        clips = [index for index, other in enumerate(lengths) if other == length]
        part = _summed_over_views(model, video[clips][..., :length, :, :, :], pooling)
        rows.update(zip(clips, part, strict=True))
    return torch.stack([rows[index] for index in range(len(lengths))])


def _summed_over_views(model: nn.Module, video: Tensor, pooling: Pooling) -> Tensor:
    """Encode ``[B, V, T, C, H, W]`` or ``[B, T, C, H, W]`` to ``[B, D]``."""
    if video.ndim == 5:
        return encode_video(model, video, pooling=pooling)
    features = encode_video(model, video.flatten(0, 1), pooling=pooling)
    views: Tensor = features.unflatten(0, video.shape[:2])
    return views.sum(dim=1)


def _bar(total: int, remaining: int, processes: Processes, options: BatchOptions) -> Any:
    """Return a progress bar that counts the videos of all processes and of earlier runs."""
    hidden = None if options.progress is None else not options.progress
    return progress_bar(
        total=total,
        initial=total - remaining,
        desc=options.description,
        unit="clip",
        disable=hidden if processes.is_first else True,
    )
