"""The features of many videos, each read once: resumable, shared among processes, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from openvclip.evaluation.records import Record, Records
from openvclip.models.classifier import evaluation_mode
from openvclip.processes import Processes
from openvclip.towers.temporal import encode_video
from openvclip.video import VideoDataset
from openvclip.weights.interpolation import interpolate_into
from openvclip.weights.names import named_state
from openvclip.weights.numerics import overwriting


@dataclass(frozen=True)
class Timing:
    """Where the time of a run went, in seconds; of several processes the sum, but for ``wall``.

    Attributes:
        clips: videos that were encoded in this run; those of earlier runs are not, nor those that
            could not be read.
        wall: of the loop over the batches, from the start of the workers on.
        decode: the encoder waited for videos. Workers decode while the encoder is at work, so
            this is what decoding adds to its time.
        copy: from the CPU's memory to the device.
        encode: the model, and its features back to the CPU.
        total: of all processes' loops; what is left of it went into weights and records.
    """

    clips: int = 0
    wall: float = 0.0
    decode: float = 0.0
    copy: float = 0.0
    encode: float = 0.0
    total: float = 0.0

    @property
    def clips_per_second(self) -> float:
        """Throughput of all processes together; NaN for a run with nothing left to encode."""
        return self.clips / self.wall if self.wall else float("nan")

    @property
    def other(self) -> float:
        """Seconds in neither decoding, copying nor encoding."""
        return max(self.total - self.decode - self.copy - self.encode, 0.0)

    def shares(self) -> dict[str, float]:
        """``decode``, ``copy``, ``encode`` and ``other`` as parts of the time; they sum to 1."""
        whole = self.total or float("nan")
        parts = ("decode", "copy", "encode", "other")
        return {name: getattr(self, name) / whole for name in parts}


class _Clock:
    """Adds up the seconds between calls under names."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.spent = {"decode": 0.0, "copy": 0.0, "encode": 0.0, "other": 0.0}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] += now - self._last
        self._last = now

    def timing(self, clips: int) -> Timing:
        wall = self._last - self.start
        parts = {name: self.spent[name] for name in ("decode", "copy", "encode")}
        return Timing(clips=clips, wall=wall, total=wall, **parts)


def joined_timing(parts: Sequence[Timing]) -> Timing:
    """Of processes that ran at the same time."""
    sums = {
        entry.name: sum(getattr(part, entry.name) for part in parts) for entry in fields(Timing)
    }
    return Timing(**{**sums, "wall": max(part.wall for part in parts)})


def encode_videos(
    model: nn.Module,
    dataset: VideoDataset,
    records: Records,
    *,
    tuned: Mapping[str, Tensor] | None = None,
    lams: Sequence[float] = (),
    batch_size: int = 8,
    num_workers: int = 2,
    amp: torch.dtype | None = None,
    processes: Processes | None = None,
    progress: bool | None = None,
    description: str = "encode",
) -> Timing:
    """Put the features of a data set's videos, float32 ``[R, L, D]`` a batch, into ``records``.

    R are the videos of the batch that could be read; the errors of the record tell of the others,
    for which nothing is encoded. A batch with such videos is tried again in the next run.

    The features of a video are :func:`encode_video`'s, summed over its views: their product with
    a text feature is the logit, summed over the views, up to the scale. Batches are cut from the
    data set's order whatever is left to do and whoever does it, so that a video is always encoded
    beside the same others: results are bitwise those of a single process that was never stopped.

    Args:
        model: encodes clips; with ``lams`` it has its own weights back, bitwise, at the end.
        dataset: gives :class:`VideoSample` (``details=True``).
        records: batches that are there are not done again; the key is the number of the batch.
        tuned: state dict of the fine-tuned model, for ``lams``.
        lams: L weights of the original CLIP, which ``model`` holds; without them the model is
            taken as it is, and L is 1. Each video is read once for all of them.
        batch_size: videos at a time, each with all its views.
        num_workers: processes that decode; 0 decodes in this one.
        amp: autocast to this dtype while encoding.
        processes: the processes that share the work.
        progress: show a progress bar; by default where the output is a terminal.
        description: the bar's label.
    """
    processes = processes or Processes()
    batches = batches_of(len(dataset), batch_size)
    left = [key for key in range(len(batches)) if not _is_done(records, key)]
    mine = processes.share(left)
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    processes.wait()  # all have read the same records before the first is written
    clock, done = _Clock(), 0
    loader = DataLoader(
        dataset,
        batch_sampler=[batches[key] for key in mine],
        num_workers=min(num_workers, len(mine)),
        pin_memory=device.type == "cuda",
    )
    bar = _bar(
        len(dataset), sum(len(batches[key]) for key in left), processes, progress, description
    )
    with bar, evaluation_mode(model), torch.no_grad(), _weights(model, tuned, lams) as variants:
        clock.lap("other")
        for key, sample in zip(mine, loader, strict=True):
            clock.lap("decode")
            errors = {place: reason for place, reason in enumerate(sample.error) if reason}
            video = _readable(sample.video, errors).to(device, dtype)
            clock.lap("copy")
            found = []
            for set_weights in variants if len(video) else ():
                set_weights()
                clock.lap("other")
                with _autocast(device, amp):
                    found.append(_summed_over_views(model, video).float().cpu())
                clock.lap("encode")
            values = torch.stack(found, dim=1) if found else torch.empty(0)
            records.add(Record(key, values, errors))
            done += len(video)
            bar.update(min(len(sample.error) * processes.world_size, bar.total - bar.n))
            clock.lap("other")
    processes.wait()
    records.reload()
    return joined_timing(processes.gather(clock.timing(done)))


def batches_of(n: int, batch_size: int) -> list[list[int]]:
    """The places 0 to ``n - 1`` in order, ``batch_size`` at a time."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


def _is_done(records: Records, key: int) -> bool:
    return key in records.found and not records.found[key].errors


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(device.type, amp) if amp is not None else nullcontext()


def _readable(video: Tensor, errors: Mapping[int, str]) -> Tensor:
    """The videos of a batch without those that could not be read."""
    if not errors:
        return video
    return video[[place for place in range(len(video)) if place not in errors]]


def _summed_over_views(model: nn.Module, video: Tensor) -> Tensor:
    """``[B, V, T, C, H, W]`` or ``[B, T, C, H, W]`` to ``[B, D]``."""
    if video.ndim == 5:
        return encode_video(model, video)
    features: Tensor = encode_video(model, video.flatten(0, 1)).unflatten(0, video.shape[:2])
    return features.sum(dim=1)


@contextmanager
def _weights(
    model: nn.Module, tuned: Mapping[str, Tensor] | None, lams: Sequence[float]
) -> Iterator[list[Callable[[], None]]]:
    """What to call before each encoding of a batch; the model's own weights are back at the end."""
    if tuned is None or not lams:
        yield [lambda: None]
        return
    live = named_state(model)
    clip = {name: torch.empty_like(value) for name, value in live.items()}
    with overwriting([value.detach() for value in live.values()], list(clip.values())):
        if len(lams) == 1:
            interpolate_into(model, clip, tuned, lams[0])
            yield [lambda: None]
            return

        def setter(lam: float) -> Callable[[], None]:
            return lambda: interpolate_into(model, clip, tuned, lam)

        yield [setter(lam) for lam in lams]


def _bar(
    total: int, left: int, processes: Processes, progress: bool | None, description: str
) -> Any:
    from tqdm import tqdm  # comes with open_clip

    disable = True if not processes.is_first else None if progress is None else not progress
    started = total - left
    return tqdm(total=total, initial=started, desc=description, unit="clip", disable=disable)
