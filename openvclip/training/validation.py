"""Accuracy on annotated videos, shared by the processes of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from openvclip.evaluation import evaluate
from openvclip.processes import Processes
from openvclip.training.batches import outlive_the_signal
from openvclip.training.methods import Classifier, fixed_text
from openvclip.video import VideoDataset
from openvclip.video.sampling import Sampler, Sampling
from openvclip.video.transforms import Transform

TESTED: dict[str, Sampler] = {"dense": "released", "uniform": "uniform"}
"""For each way in which frames are taken in training, the one of testing."""


def sampling_of(args: argparse.Namespace, sampler: Sampler, views: int = 1) -> Sampling:
    """The frames that the options ask for."""
    return Sampling(
        num_frames=args.frames,
        sampling_rate=args.sampling_rate,
        target_fps=args.target_fps,
        views=views,
        sampler=sampler,
        backend=args.backend,
    )


class SharedAccuracy:
    """The accuracy of a classifier on a data set, of which each process reads a part.

    Args:
        dataset: gives :class:`openvclip.video.VideoSample` (``details=True``).
        processes: the processes.
        batch_size: videos at a time.
        num_workers: processes that read videos, for each process.
        amp: autocast to this dtype.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        processes: Processes,
        *,
        batch_size: int,
        num_workers: int,
        amp: torch.dtype | None,
    ) -> None:
        self.processes, self.amp = processes, amp
        own = processes.share(list(range(len(dataset))))
        self._count = len(own)
        # As many batches in each process: sharded weights are put together by all at once.
        own += [0] * (-(-len(dataset) // processes.world_size) - len(own))
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset, own),
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=outlive_the_signal,
            generator=torch.Generator(),  # leaves the global one alone
        )

    def of(self, classifier: nn.Module, description: str = "validation") -> dict[str, float]:
        """``top1`` and ``top5`` in [0, 1] of the weights as they are."""
        device = next(classifier.parameters()).device
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            progress = None if self.processes.is_first else False
            found = evaluate(classifier, self._loader, progress=progress, description=description)
        places = found.ranks[: self._count]
        counts = [int((places < 1).sum()), int((places < 5).sum()), len(places)]
        first, five, videos = map(sum, zip(*self.processes.gather(counts), strict=True))
        return {"top1": first / videos, "top5": five / videos}


class Validation:
    """Closed-set accuracy on the classes of the training, one view a video.

    Args:
        args: the command line.
        classifier: of the training classes.
        names: the training classes.
        pixels: of the training; those of the validation have their size, mean and deviation.
        amp: autocast to this dtype.
        processes: the processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        classifier: Classifier,
        names: Sequence[str],
        pixels: Transform,
        amp: torch.dtype | None,
        processes: Processes,
    ) -> None:
        self.classifier = classifier
        # Sharded text weights can't be used outside a forward pass of the whole.
        self._text = nullcontext if args.fsdp else partial(fixed_text, classifier)
        self._shared: SharedAccuracy | None = None
        if args.val_annotations is None:
            return
        dataset = VideoDataset(
            args.val_annotations,
            args.val_videos or args.videos,
            class_names=names,
            transform=pixels.with_(name="released"),
            sampling=sampling_of(args, TESTED[args.sampler]),
            details=True,
        )
        self._shared = SharedAccuracy(
            dataset,
            processes,
            batch_size=args.per_device_batch,
            num_workers=args.num_workers,
            amp=amp,
        )

    def accuracy(self) -> dict[str, float]:
        """``top1`` and ``top5`` in [0, 1] of the weights as they are; nothing without videos."""
        if self._shared is None:
            return {}
        with self._text():
            return self._shared.of(self.classifier)
