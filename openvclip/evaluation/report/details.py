"""What a model does on the classes and clips of a test at each λ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openvclip.evaluation.predictions import Predictions, SplitPredictions

__all__ = [
    "Clips",
    "Details",
    "accuracies_only",
    "details_of_confusion",
    "details_of_predictions",
]

_DIGITS = 5  # of an accuracy in [0, 1]
_BEST = 3  # classes that a wrong clip names


@dataclass(frozen=True)
class Clips:
    """The answers on M clips. A video that is in two splits counts twice.

    Attributes:
        paths: path of each clip.
        splits: name of the split of each clip.
        targets: index of the true class, ``[M]``.
        ranks: rank of the true class, ``[L, M]``.
        labels: indices of the best classes, ``[L, M, C]``; -1 without a prediction.
        scores: cosine similarities of the best classes, ``[L, M, C]``.
    """

    paths: list[str]
    splits: list[str]
    targets: Tensor
    ranks: Tensor
    labels: Tensor
    scores: Tensor

    def right(self, lam: int) -> dict[tuple[str, str], bool]:
        """Return whether each clip is right at the λ with index ``lam``, by split and path."""
        keys = zip(self.splits, self.paths, strict=True)
        return dict(zip(keys, (self.ranks[lam] == 0).tolist(), strict=True))


@dataclass(frozen=True)
class Details:
    """Accuracies of K classes, and confusions and clips if they are known.

    Attributes:
        classes: the class names. A class that is in several splits is one class.
        counts: number of clips of each class, or ``None`` if it is not known.
        accuracy: top-1 accuracy at each λ and of each class, float64 ``[L, K]``; NaN without clips.
        cells: for each λ: ``(true class, predicted class, number of clips)``, the most clips first.
            ``None`` if they are not known.
        clips: the answers on each clip, or ``None`` if they are not known.
    """

    classes: list[str]
    counts: list[int] | None
    accuracy: Tensor
    cells: list[list[tuple[int, int, int]]] | None = None
    clips: Clips | None = field(default=None, repr=False)

    def as_json(self, most: int, clip: tuple[Details | None, int] | None) -> dict[str, Any]:
        """Return the details as JSON objects.

        Args:
            most: largest number of wrong clips at each λ.
            clip: the details of the original CLIP and the index of its λ, if they are known.
        """
        result: dict[str, Any] = {
            "classes": self.classes,
            "counts": self.counts,
            "accuracy": [_rounded(row) for row in self.accuracy.tolist()],
            "clip": None,
            "cells": None,
            "wrong": None,
        }
        right: Mapping[tuple[str, str], bool] = {}
        reference, at = (None, 0) if clip is None else clip
        if reference is not None:
            row = dict(
                zip(reference.classes, _rounded(reference.accuracy[at].tolist()), strict=True)
            )
            result["clip"] = [row.get(name) for name in self.classes]
            right = reference.clips.right(at) if reference.clips is not None else {}
        if self.cells is not None:
            result["cells"] = [[value for cell in row for value in cell] for row in self.cells]
        if self.clips is not None:
            result["wrong"] = [
                _wrong_clips(self.clips, i, right, most) for i in range(len(self.accuracy))
            ]
        return result


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, _DIGITS) for value in values]


def details_of_predictions(predictions: Predictions, protocol: str) -> Details:
    """Return the details of a test; the splits of its protocol are taken together.

    Args:
        predictions: the predictions of an evaluation.
        protocol: the protocol of the test.
    """
    splits = [split for split in predictions.splits if split.protocol == protocol]
    classes = list(dict.fromkeys(name for split in splits for name in split.class_names))
    lams = predictions.lams
    order = sorted(range(len(lams)), key=lambda i: lams[i] or 0.0)  # as Results.of sorts
    clips = _joined(splits, {name: index for index, name in enumerate(classes)}, order)
    counts = torch.bincount(clips.targets, minlength=len(classes))
    correct = torch.stack(
        [torch.bincount(clips.targets[row == 0], minlength=len(classes)) for row in clips.ranks]
    )
    accuracy = correct.double() / counts
    cells = [_cells(clips.targets, labels[:, 0], len(classes)) for labels in clips.labels]
    return Details(classes, counts.tolist(), accuracy, cells, clips)


def _joined(splits: list[SplitPredictions], index_of: dict[str, int], order: list[int]) -> Clips:
    """Return the clips of all splits, with class indices for all splits, smallest λ first."""
    widest = max(split.labels.shape[2] for split in splits)
    targets, labels, scores = [], [], []
    for split in splits:
        # The last entry is for -1: a clip without a prediction.
        table = torch.tensor([*(index_of[name] for name in split.class_names), -1])
        missing = widest - split.labels.shape[2]  # a split of fewer classes than answers
        targets.append(table[split.targets])
        labels.append(torch.nn.functional.pad(table[split.labels[order]], (0, missing), value=-1))
        padded = torch.nn.functional.pad(split.scores[order], (0, missing), value=float("nan"))
        scores.append(padded)
    return Clips(
        [path for split in splits for path in split.paths],
        [split.name for split in splits for _ in split.paths],
        torch.cat(targets),
        torch.cat([split.ranks[order] for split in splits], dim=1),
        torch.cat(labels, dim=1),
        torch.cat(scores, dim=1),
    )


def _cells(targets: Tensor, predicted: Tensor, classes: int) -> list[tuple[int, int, int]]:
    known = predicted >= 0
    pairs, counts = (targets[known] * classes + predicted[known]).unique(return_counts=True)
    cells = [
        (*divmod(pair, classes), n) for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    return sorted(cells, key=lambda cell: -cell[2])


def details_of_confusion(entries: Sequence[Mapping[str, Any]]) -> Details | None:
    """Return the details of a test from confusion matrices in ``results.json``, if it has them.

    Args:
        entries: the entries of a protocol, smallest λ first.
    """
    splits = [split for entry in entries for split in entry["splits"]]
    if not all("confusion" in split and "per_class" in split for split in splits):
        return None
    classes = list(dict.fromkeys(name for split in splits for name in split["class_names"]))
    index_of = {name: index for index, name in enumerate(classes)}
    details = accuracies_only(entries)
    if details is None or details.classes != classes:
        return None
    cells = []
    for entry in entries:
        matrix = torch.zeros(len(classes), len(classes), dtype=torch.long)
        for split in entry["splits"]:
            places = torch.tensor([index_of[name] for name in split["class_names"]])
            matrix[places[:, None], places] += torch.tensor(split["confusion"])
        pairs = matrix.nonzero().tolist()
        found = [(i, j, int(matrix[i, j])) for i, j in pairs]
        cells.append(sorted(found, key=lambda cell: -cell[2]))
    return Details(classes, None, details.accuracy, cells)


def accuracies_only(entries: Sequence[Mapping[str, Any]]) -> Details | None:
    """Return the accuracies of classes in ``results.json``, if it has them.

    The accuracy of a class in several splits is the mean over these splits.

    Args:
        entries: the entries of a protocol, smallest λ first.
    """
    splits = [split for entry in entries for split in entry["splits"]]
    if not all("per_class" in split for split in splits):
        return None
    classes = list(dict.fromkeys(name for split in splits for name in split["per_class"]))
    rows = []
    for entry in entries:
        values: dict[str, list[float]] = {name: [] for name in classes}
        for split in entry["splits"]:
            for name, value in split["per_class"].items():
                if value is not None:
                    values[name].append(value)
        rows.append([sum(v) / len(v) if v else math.nan for v in values.values()])
    return Details(classes, None, torch.tensor(rows, dtype=torch.float64))


def _wrong_clips(
    clips: Clips, lam: int, right: Mapping[tuple[str, str], bool], most: int
) -> dict[str, Any]:
    """Return the wrong clips at a λ.

    Clips that the original CLIP gets right come first. Within both groups, the clips with the
    surest wrong answer come first: the greatest distance between the score of the answer and the
    score of the true class.
    """
    wrong = (clips.ranks[lam] != 0).nonzero().flatten().tolist()
    keys = [(clips.splits[i], clips.paths[i]) for i in wrong]
    labels, scores = clips.labels[lam], clips.scores[lam]
    hits = labels == clips.targets[:, None]
    true = torch.where(hits, scores, 0).sum(dim=1)
    # Beyond the best classes, the score of the true class is at most the last of them.
    true = torch.where(hits.any(dim=1), true, scores.nan_to_num(0)[:, -1])
    margin = (scores[:, 0] - true).nan_to_num(-1).tolist()
    flags = [right.get(key) for key in keys]
    order = sorted(range(len(wrong)), key=lambda n: (not flags[n], -margin[wrong[n]]))
    shown = [
        {
            "path": clips.paths[wrong[n]],
            "split": clips.splits[wrong[n]],
            "true": int(clips.targets[wrong[n]]),
            "rank": int(clips.ranks[lam, wrong[n]]) if labels[wrong[n], 0] >= 0 else -1,
            "labels": [label for label in labels[wrong[n], :_BEST].tolist() if label >= 0],
            "scores": [
                round(score, 3) if math.isfinite(score) else None
                for score in scores[wrong[n], :_BEST].tolist()
            ],
            "clip": flags[n],
        }
        for n in order[:most]
    ]
    return {"total": len(wrong), "lost": sum(flag is True for flag in flags), "shown": shown}
