"""Accuracy on annotated videos, computed by all processes of a run together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from openvclip.evaluation.accuracy import evaluate
from openvclip.processes import Processes
from openvclip.training.batches import ignore_sigterm, start_workers
from openvclip.training.methods import Classifier, fixed_text
from openvclip.video import VideoDataset
from openvclip.video.sampling import Sampler

TEST_SAMPLERS: dict[str, Sampler] = {"dense": "released", "uniform": "uniform"}
"""Maps the name of each training sampler to the name of the sampler for tests."""


class SharedAccuracy:
    """The accuracy of a classifier on a data set; each process reads a part of the videos.

    Args:
        dataset: gives :class:`openvclip.video.VideoSample` (made with ``details=True``).
        processes: the processes.
        batch_size: number of videos that a process reads at a time.
        num_workers: number of worker processes that read videos, for each of ``processes``.
        amp: dtype of autocast. Default: no autocast.
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
        share = processes.share(list(range(len(dataset))))
        self._n_videos = len(share)
        # All processes need the same number of batches: they gather sharded weights together.
        share += [0] * (-(-len(dataset) // processes.world_size) - len(share))
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset, share),
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=ignore_sigterm,
            # The loader draws its seeds from this generator, not from PyTorch's global generator.
            generator=torch.Generator(),
        )

    def of(self, classifier: nn.Module, description: str = "validation") -> dict[str, float]:
        """Return the accuracies ``top1`` and ``top5`` in [0, 1]. All processes call this.

        Args:
            classifier: gives logits ``[B, K]`` for clips ``[B, T, C, H, W]``.
            description: label of the progress bar.
        """
        device = next(classifier.parameters()).device
        with torch.autocast(device.type, self.amp, enabled=self.amp is not None):
            progress = None if self.processes.is_first else False
            result = evaluate(
                classifier, _Batches(self._loader), progress=progress, description=description
            )
        ranks = result.ranks[: self._n_videos]
        counts = [int((ranks < 1).sum()), int((ranks < 5).sum()), len(ranks)]
        top1, top5, videos = map(sum, zip(*self.processes.gather(counts), strict=True))
        return {"top1": top1 / videos, "top5": top5 / videos}


class _Batches:
    """The batches of a loader whose workers ignore SIGTERM from their start."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return start_workers(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


class Validation:
    """The accuracy of a classifier during and after training.

    Args:
        classifier: classifier of the training classes.
        shared: computes the accuracy. ``None``: there are no validation videos.
        sharded: the weights are sharded (FSDP2), and so the text features can't be computed
            outside of a forward pass of the classifier.
    """

    def __init__(
        self, classifier: Classifier, shared: SharedAccuracy | None, *, sharded: bool = False
    ) -> None:
        self.classifier, self._shared, self._sharded = classifier, shared, sharded

    def accuracy(self) -> dict[str, float]:
        """Return ``top1`` and ``top5`` in [0, 1] at the present weights; empty without videos."""
        if self._shared is None:
            return {}
        with nullcontext() if self._sharded else fixed_text(self.classifier):
            return self._shared.of(self.classifier)
