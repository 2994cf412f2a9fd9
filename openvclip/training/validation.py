"""Accuracy on annotated videos, computed by all processes of a run together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from openvclip.commands.progress import progress_bar
from openvclip.evaluation.accuracy import evaluate
from openvclip.evaluation.ranking import retrieval_metrics
from openvclip.models.modes import evaluation_mode
from openvclip.processes import Processes
from openvclip.training.batches import ignore_sigterm, start_workers
from openvclip.training.captions import CaptionedVideos
from openvclip.training.methods import fixed_text
from openvclip.training.objectives import Learner
from openvclip.video import VideoDataset
from openvclip.video.sampling import Sampler

TEST_SAMPLERS: dict[str, Sampler] = {"dense": "released", "uniform": "uniform"}
"""Maps the name of each training sampler to the name of the sampler for tests."""

_BROKEN = float("inf")  # in place of the features of a video that can't be read


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


class SharedRetrieval:
    """The recall of captioned videos; each process encodes a part of the videos and captions.

    Args:
        dataset: videos with captions, whose ``videos`` are made with ``details=True``.
        processes: the processes.
        batch_size: number of videos that a process reads at a time.
        num_workers: number of worker processes that read videos, for each of ``processes``.
        amp: dtype of autocast. Default: no autocast.
    """

    def __init__(
        self,
        dataset: CaptionedVideos,
        processes: Processes,
        *,
        batch_size: int,
        num_workers: int,
        amp: torch.dtype | None,
    ) -> None:
        self.processes, self.amp, self._batch_size = processes, amp, batch_size
        self._captions = [text for texts in dataset.captions for text in texts]
        self._counts = [len(texts) for texts in dataset.captions]
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset.videos, _share(len(dataset), processes)),
            batch_size=batch_size,
            num_workers=num_workers,
            worker_init_fn=ignore_sigterm,
            generator=torch.Generator(),
        )

    def of(self, learner: nn.Module, description: str = "validation") -> dict[str, float]:
        """Return R@1 of both directions in [0, 1]. All processes call this.

        A video that can't be read is found by none of its captions.

        Args:
            learner: a :class:`openvclip.training.PairEncoder`.
            description: label of the progress bar.
        """
        encoder: Any = learner
        device = next(learner.parameters()).device
        shown = None if self.processes.is_first else True
        bar = progress_bar(_Batches(self._loader), desc=description, disable=shown)
        # The same number of passes in each process, which gather sharded weights together.
        texts = _share(len(self._captions), self.processes)
        videos: dict[int, Tensor] = {}
        captions: dict[int, Tensor] = {}
        autocast = torch.autocast(device.type, self.amp, enabled=self.amp is not None)
        with evaluation_mode(learner), torch.no_grad(), autocast:
            for video, _, positions, errors in bar:
                features = encoder(video.to(device, non_blocking=True), None)[0].cpu()
                for position, feature, error in zip(positions, features, errors, strict=True):
                    videos[int(position)] = feature.fill_(_BROKEN) if error else feature
            for start in range(0, len(texts), self._batch_size):
                part = texts[start : start + self._batch_size]
                tokens = encoder.tokens([self._captions[i] for i in part])
                captions |= zip(part, encoder(None, tokens)[1].cpu(), strict=True)
        of_videos = self._all(videos)
        broken = of_videos.isinf().all(dim=1)
        similarities = self._all(captions) @ of_videos.masked_fill(broken[:, None], 0.0).T
        similarities[:, broken] = float("-inf")
        several = self._counts if max(self._counts) > 1 else None
        metrics = retrieval_metrics(similarities, several)
        return {f"{direction}_R1": values["R1"] / 100 for direction, values in metrics.items()}

    def _all(self, features: dict[int, Tensor]) -> Tensor:
        """Return the features of all processes in the order of their numbers, ``[n, D]``."""
        joined: dict[int, Tensor] = {}
        for part in self.processes.gather(features):
            joined |= part
        return torch.stack([joined[number] for number in sorted(joined)])


def shared_validation(
    dataset: VideoDataset | CaptionedVideos, processes: Processes, **reading: Any
) -> SharedAccuracy | SharedRetrieval:
    """Return the validation of videos with classes, or of videos with captions.

    Args:
        dataset: the validation videos.
        processes: the processes.
        reading: ``batch_size``, ``num_workers`` and ``amp`` of :class:`SharedAccuracy`.
    """
    if isinstance(dataset, CaptionedVideos):
        return SharedRetrieval(dataset, processes, **reading)
    return SharedAccuracy(dataset, processes, **reading)


def _share(number: int, processes: Processes) -> list[int]:
    """Return the items of this process; all processes have the same number of items."""
    share = processes.share(list(range(number)))
    return share + [0] * (-(-number // processes.world_size) - len(share))


class _Batches:
    """The batches of a loader whose workers ignore SIGTERM from their start."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return start_workers(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


class Validation:
    """The accuracy or the recall of a model during and after training.

    Args:
        classifier: classifier of the training classes, or the encoder of pairs.
        shared: computes the accuracy or the recall. ``None``: there are no validation videos.
        sharded: the weights are sharded (FSDP2), and so the text features can't be computed
            outside of a forward pass of the classifier.
    """

    def __init__(
        self,
        classifier: Learner,
        shared: SharedAccuracy | SharedRetrieval | None,
        *,
        sharded: bool = False,
    ) -> None:
        self.classifier, self._shared, self._sharded = classifier, shared, sharded
        self.main = "text_to_video_R1" if isinstance(shared, SharedRetrieval) else "top1"

    def accuracy(self) -> dict[str, float]:
        """Return the numbers in [0, 1] at the present weights; empty without videos.

        A classifier has ``top1`` and ``top5``, an encoder of pairs has ``text_to_video_R1`` and
        ``video_to_text_R1``.
        """
        if self._shared is None:
            return {}
        with nullcontext() if self._sharded else fixed_text(self.classifier):
            return self._shared.of(self.classifier)
