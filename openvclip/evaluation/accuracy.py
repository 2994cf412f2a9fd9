"""A classifier on a data set: predictions, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import VideoShapeError
from openvclip.models.classifier import evaluation_mode
from openvclip.video import VideoSample

NO_RANK = torch.iinfo(torch.int64).max
"""The rank of the true class of a clip that could not be read, or whose logits hold NaN."""


@dataclass(frozen=True)
class Evaluation:
    """What a classifier answered on N clips of K classes.

    Attributes:
        predictions: the class of the highest logit, int64 ``[N]``; -1 where there was none (NaN).
        labels: the true classes, int64 ``[N]``.
        ranks: the place of the true class among the logits, 0 for the first, int64 ``[N]``.
            Ties count against the classifier. A clip without an answer has :data:`NO_RANK`,
            which is wrong at every ``k``.
    """

    predictions: Tensor
    labels: Tensor
    ranks: Tensor

    @property
    def n_clips(self) -> int:
        """Number of clips N."""
        return self.labels.numel()

    @property
    def top1(self) -> float:
        """Fraction of clips whose true class has the highest logit, in [0, 1]."""
        return self.top(1)

    def top(self, k: int) -> float:
        """Fraction of clips whose true class is among the ``k`` highest logits, in [0, 1]."""
        return float((self.ranks < k).double().mean()) if self.n_clips else float("nan")

    def per_class(self, n_classes: int) -> Tensor:
        """Top-1 accuracy on the clips of each class, float64 ``[K]``; NaN for a class without."""
        right = torch.bincount(self.labels[self.ranks == 0], minlength=n_classes)
        return right.double() / torch.bincount(self.labels, minlength=n_classes)

    def confusion(self, n_classes: int) -> Tensor:
        """How many clips of class ``i`` were taken for class ``j``, int64 ``[K, K]`` at ``[i, j]``.

        Clips without an answer are in no column: rows sum to the clips that had one.
        """
        answered = self.predictions >= 0
        cells = self.labels[answered] * n_classes + self.predictions[answered]
        return torch.bincount(cells, minlength=n_classes**2).view(n_classes, n_classes)


def evaluate(
    classifier: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    progress: bool | None = None,
    description: str = "evaluate",
) -> Evaluation:
    """Run a classifier over a data set, in eval mode and without gradients.

    Args:
        classifier: gives logits ``[B, K]`` for clips ``[B, T, C, H, W]``; batches are moved to
            its device.
        loader: gives ``(video, label)``: ``[B, T, C, H, W]``, or ``[B, V, T, C, H, W]`` with V
            views a clip, whose logits are summed (the paper's 3 x 1 views); labels int64 ``[B]``.
            Batches of :class:`openvclip.video.VideoSample` do as well: clips that could not be
            read count as wrong.
        progress: show a progress bar; by default where the output is a terminal.
        description: the bar's label.

    Raises:
        VideoShapeError: a video has another rank.
    """
    (result,) = evaluate_each(
        [lambda video: classifier(video)], classifier, loader, progress, description
    )
    return result


def evaluate_each(
    variants: list[Callable[[Tensor], Tensor]],
    classifier: nn.Module,
    loader: Iterable[Sequence[Any]],
    progress: bool | None = None,
    description: str = "evaluate",
) -> list[Evaluation]:
    """:func:`evaluate` for several functions from clips to logits, reading each batch once."""
    from tqdm import tqdm  # comes with open_clip

    device = next(classifier.parameters()).device
    found: list[list[Evaluation]] = [[] for _ in variants]
    bar = tqdm(loader, desc=description, disable=None if progress is None else not progress)
    with evaluation_mode(classifier), torch.no_grad():
        for batch in bar:
            video, label = batch[:2]
            moved = video.to(device, non_blocking=True)
            for logits_of, kept in zip(variants, found, strict=True):
                logits = _over_views(logits_of, moved).cpu()
                if isinstance(batch, VideoSample):
                    logits[[bool(error) for error in batch.error]] = float("nan")
                kept.append(score(logits, label))
    return [_joined(kept) for kept in found]


def _over_views(logits_of: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    if video.ndim == 6:
        logits = logits_of(video.flatten(0, 1))
        return logits.unflatten(0, video.shape[:2]).sum(dim=1)  # type: ignore[no-any-return]
    if video.ndim != 5:
        raise VideoShapeError(
            f"The loader gave a video batch of shape {list(video.shape)}; expected "
            "[B, T, C, H, W], or [B, V, T, C, H, W] with V views a clip."
        )
    return logits_of(video)


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """What logits say, ``[N, K]``, with the true classes ``[N]``; both on the CPU.

    A row that holds NaN is no answer: that is how clips are marked that could not be read.
    """
    labels = labels.cpu().long()
    silent = logits.isnan().any(dim=1)
    true = logits.gather(1, labels[:, None])
    ranks = logits.shape[1] - 1 - (logits < true).sum(dim=1)
    return Evaluation(
        logits.argmax(dim=1).masked_fill(silent, -1), labels, ranks.masked_fill(silent, NO_RANK)
    )


def _joined(parts: list[Evaluation]) -> Evaluation:
    if not parts:
        empty = torch.empty(0, dtype=torch.long)
        return Evaluation(empty, empty, empty)
    columns = ([getattr(part, entry.name) for part in parts] for entry in fields(Evaluation))
    return Evaluation(*(torch.cat(column) for column in columns))
