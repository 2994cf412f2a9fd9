"""Files of predictions: what a model answers on each video of an evaluation, at each λ.

A file is in the safetensors format. For split number ``i`` it holds the tensors ``i.videos``
``[N]``, ``i.targets`` ``[N]``, ``i.ranks`` ``[L, N]``, ``i.labels`` ``[L, N, C]`` and ``i.scores``
``[L, N, C]``. Names, paths and the values of λ are in the metadata of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.errors import RecordsError
from openvclip.evaluation.accuracy import NO_RANK
from openvclip.evaluation.results import Answers, ProtocolEvaluation, SplitScore

__all__ = [
    "PREDICTIONS_FILE",
    "Predictions",
    "SplitPredictions",
    "read_predictions",
    "write_predictions",
]

PREDICTIONS_FILE = "predictions.safetensors"
"""The name of the file of predictions in a folder of results."""

_FORMAT = "openvclip predictions"
_VERSION = 1
_PARTS = ("videos", "targets", "ranks", "labels", "scores")


@dataclass(frozen=True)
class SplitPredictions:
    """What a model answers on the N videos of a split at L interpolation weights.

    Attributes:
        name: name of the split.
        protocol: protocol of the split.
        class_names: K class names in the order of their indices.
        paths: path of each video, relative to the folder of the videos.
        targets: index of the true class, int64 ``[N]``.
        ranks: rank of the true class, int64 ``[L, N]``; see
            :class:`openvclip.evaluation.Evaluation`.
        labels: indices of the best classes, best first, int64 ``[L, N, C]``. -1 for a video
            without a prediction.
        scores: cosine similarities of the best classes, float32 ``[L, N, C]``, rounded to float16.
    """

    name: str
    protocol: str
    class_names: list[str]
    paths: list[str]
    targets: Tensor
    ranks: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Predictions:
    """The content of a file of predictions.

    Attributes:
        lams: L interpolation weights of the original CLIP. ``(None,)`` if the model was evaluated
            with its own weights.
        splits: the predictions on each split.
        videos: the folder of the videos on the machine of the evaluation; ``""`` if not known.
    """

    lams: tuple[float | None, ...]
    splits: list[SplitPredictions]
    videos: str = ""


def write_predictions(path: str | os.PathLike[str], result: ProtocolEvaluation) -> bool:
    """Write the predictions of an evaluation to a file.

    Args:
        path: the file to write. An existing file is replaced.
        result: the result of :func:`openvclip.evaluation.evaluate_protocol`.

    Returns:
        Whether the file was written. It is not written if a score has no ``answers``.

    Raises:
        CheckpointError: the file can't be written.
    """
    columns = list(zip(*result.scores.values(), strict=True))  # for each split: a score for each λ
    paths: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    splits = []
    for number, scores in enumerate(columns):
        answers = [score.answers for score in scores if score.answers is not None]
        if len(answers) < len(scores):
            return False
        splits.append(_described(scores[0]))
        parts = _stored(scores, answers, paths)
        tensors.update({f"{number}.{name}": value for name, value in parts.items()})
    about = {
        "lams": list(result.scores),
        "videos": result.videos,
        "splits": splits,
        "paths": list(paths),
    }
    metadata = {"format": _FORMAT, "version": str(_VERSION), "about": json.dumps(about)}
    from safetensors.torch import save

    with write_errors(path), atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # save_file makes a file for its owner only
    return True


def _described(score: SplitScore) -> dict[str, Any]:
    return {"name": score.name, "protocol": score.protocol, "class_names": score.class_names}


def _stored(
    scores: tuple[SplitScore, ...], answers: list[Answers], paths: dict[str, int]
) -> dict[str, Tensor]:
    """Return the tensors of a split in small dtypes; add its paths to ``paths``."""
    classes = len(scores[0].class_names)
    small = torch.int16 if classes <= torch.iinfo(torch.int16).max else torch.int32
    # A rank without a prediction is stored as -1.
    ranks = torch.stack([score.evaluation.ranks for score in scores])
    return {
        "videos": torch.tensor(
            [paths.setdefault(path, len(paths)) for path in answers[0].paths], dtype=torch.int32
        ),
        "targets": scores[0].evaluation.targets.to(small),
        "ranks": ranks.masked_fill(ranks == NO_RANK, -1).to(small),
        "labels": torch.stack([answer.labels for answer in answers]).to(small),
        "scores": torch.stack([answer.scores for answer in answers]).to(torch.float16),
    }


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read a file of predictions.

    Args:
        path: a file that :func:`write_predictions` or ``openvclip evaluate`` wrote.

    Raises:
        RecordsError: the file does not exist, is damaged, is no file of predictions, or has a
            version that this openvclip can't read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _require_version(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _assembled(json.loads(metadata["about"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, RecordsError):
            raise
        raise RecordsError(
            f"{os.fspath(path)} can't be read as a file of predictions ({error}). Remove it, and "
            "run the same 'openvclip evaluate' again: the features are kept."
        ) from error


def _require_version(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise RecordsError(
            f"{os.fspath(path)} is no file of predictions: its metadata has the format "
            f"{metadata.get('format')!r}; expected {_FORMAT!r}."
        )
    if metadata.get("version") != str(_VERSION):
        raise RecordsError(
            f"{os.fspath(path)} has version {metadata.get('version')}; this openvclip reads "
            f"version {_VERSION}. Update openvclip, or run 'openvclip evaluate' again with this "
            "version."
        )


def _assembled(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Predictions:
    lams, paths = tuple(about["lams"]), about["paths"]
    splits = []
    for number, entry in enumerate(about["splits"]):
        videos, targets, ranks, labels, scores = (tensors[f"{number}.{n}"] for n in _PARTS)
        names = entry["class_names"]
        if len(videos) and int(videos.min()) < 0:
            raise ValueError("the index of a path is negative")
        _require_shapes(lams, len(names), videos, targets, ranks, labels, scores)
        ranks = ranks.long()
        splits.append(
            SplitPredictions(
                entry["name"],
                entry["protocol"],
                list(names),
                [paths[index] for index in videos.tolist()],
                targets.long(),
                ranks.masked_fill(ranks < 0, NO_RANK),
                labels.long(),
                scores.float(),
            )
        )
    return Predictions(lams, splits, about["videos"])


def _require_shapes(
    lams: tuple[float | None, ...],
    classes: int,
    videos: Tensor,
    targets: Tensor,
    ranks: Tensor,
    labels: Tensor,
    scores: Tensor,
) -> None:
    n, shape = len(videos), tuple(labels.shape)
    if (
        tuple(targets.shape) != (n,)
        or tuple(ranks.shape) != (len(lams), n)
        or labels.ndim != 3
        or shape[:2] != (len(lams), n)
        or not shape[2]
        or tuple(scores.shape) != shape
    ):
        raise ValueError("the tensors have shapes that do not fit together")
    for indices, least in ((targets, 0), (labels, -1)):  # -1: a video without a prediction
        if indices.numel() and not (least <= int(indices.min()) <= int(indices.max()) < classes):
            raise ValueError(f"a class index is not below {classes}, the number of class names")
