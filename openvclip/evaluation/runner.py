"""Evaluate a model on published protocols: encode each video once, score it on every split."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import EvaluationError, UsageError, VideoNotFoundError, listed, near_path
from openvclip.evaluation.accuracy import score
from openvclip.evaluation.encoding import BatchOptions, batches_of, encode_videos
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.records import Records
from openvclip.evaluation.results import ProtocolEvaluation, SplitScore
from openvclip.models.classifier import VIDEO_TEMPLATES, class_features
from openvclip.models.finite import require_finite
from openvclip.models.labels import warn_of_equal_labels
from openvclip.models.preprocess import transform_for
from openvclip.processes import Processes, joined_processes
from openvclip.towers.view import FrameView
from openvclip.video import Failure, VideoDataset
from openvclip.video.protocols import Split
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state


@dataclass(frozen=True)
class RunOptions(BatchOptions):
    """How :func:`evaluate_protocol` runs, and how it treats videos that can't be read.

    Attributes:
        batch_size: number of videos to encode at a time, each with all its views.
        num_workers: number of processes that decode. 0 decodes in the calling process.
        amp: dtype for autocast while encoding. ``None`` encodes without autocast.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.
        pooling: how the features of frames become the feature of a clip.
        leave_out_broken: whether the accuracies are computed without the videos that can't be read.
            Default: such videos count as wrong.
        allow_missing: whether to treat missing videos as videos that can't be read. Default:
            missing videos are an error, which is raised before a video is encoded.
        settings: further settings of the run, as JSON objects, such as the name of the model. A run
            with different settings can't continue in the same folder.
    """

    description: str = "evaluate"
    leave_out_broken: bool = False
    allow_missing: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def evaluate_protocol(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    splits: Sequence[Split],
    videos: str | os.PathLike[str],
    *,
    mixture: Mixture | None = None,
    sampling: Sampling = PAPER_SAMPLING,
    transform: Transform | None = None,
    templates: Sequence[str] = VIDEO_TEMPLATES,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> ProtocolEvaluation:
    """Evaluate a model on the splits of one or more protocols.

    Each video of the splits is decoded once, and encoded once for each λ of ``mixture``. Each split
    is then scored among its own class names. So ``ucf101-ep1`` (ten splits) and ``ucf101-ep3``
    (three splits) together take as long as ``ucf101-ep2`` (one split). The logits are cosines,
    averaged over the frames and summed over the views.

    Under ``torchrun``, or within a process group, each process encodes a part of the videos. The
    processes exchange their results through the folder ``out``. Every process returns the whole
    result.

    Args:
        model: an open_clip model, expanded or not, with the weights of the original CLIP. On exit
            the model has its original weights, bitwise.
        tokenizer: a function from a list of texts to token ids, such as the result of
            ``open_clip.get_tokenizer``.
        splits: the splits of :func:`openvclip.video.protocols.load`, splits of several protocols in
            one list, or other splits.
        videos: the folder of the videos. The paths of the splits are relative to this folder.
        mixture: the weights to evaluate. ``Mixture(tuned, lams)`` interpolates between the weights
            of ``model`` and of a fine-tuned model. The text features are those of each
            interpolation: the class names are encoded once for each λ if the text weights of both
            models differ, otherwise once. ``Mixture(tuned, lams, text="original")`` takes the text
            features of ``model`` at every λ. Default: the weights of ``model``.
        sampling: the frames to read. Default: the 3 views of 8 frames of the paper.
        transform: a transform from 8-bit frames to the input of the model. Default: the transform
            of the released evaluation, at the image size of the model.
        templates: strings in which the class name replaces ``{}``.
        out: folder for the results. The results are saved while they are computed. With the same
            settings, a run continues where an earlier run stopped. ``None`` keeps the results in
            memory.
        run: batch size, worker processes, progress bar and treatment of unreadable videos. Default:
            ``RunOptions()``.

    Raises:
        VideoNotFoundError: ``videos`` does not exist, or videos are missing.
        RecordsError: ``out`` holds results of other settings, or can't be written.
        EvaluationError: there are no splits or no videos, or a video has different classes in two
            splits.
        UsageError: there are several processes, and ``out`` is ``None``.
        ClassNamesError: the class names or templates are not valid.
        StateMismatchError: the fine-tuned weights do not fit the model.
        NonFiniteWeightsError: features are NaN or infinite, because weights are. The error names
            the entries.
        VideoOptionError: the videos can't be read with this ``sampling``.
    """
    mixture, run = mixture or Mixture(), run or RunOptions()
    transform = transform or transform_for(model)
    paths, split_indices = _all_videos(splits)
    root = os.fspath(videos)
    if not run.allow_missing:
        require_videos(paths, root)
    settings = _settings(model, paths, mixture, sampling, transform, run)
    names = list(dict.fromkeys(name for split in splits for name in split.class_names))
    samples = [(path, 0) for path in paths]
    dataset = VideoDataset(samples, root, transform=transform, sampling=sampling, details=True)
    with joined_processes() as processes:
        _require_folder(processes, out)
        with Records(None if out is None else Path(out), settings, processes.rank) as records:
            texts = mixture.text_features(
                model, lambda: class_features(model, tokenizer, names, templates)
            )
            _warn_of_equal_labels(splits, names, texts[0])
            timing = encode_videos(
                model, dataset, records, mixture=mixture, options=run, processes=processes
            )
    weights: list[float | None] = [*mixture.lams] or [None]
    shape = (len(paths), len(weights), texts[0].shape[1])
    features, errors = _features_of(records, shape, run.batch_size)
    _require_finite(features, errors, model, mixture)
    rows = [dict(zip(names, text.float().cpu(), strict=True)) for text in texts]
    left_out = errors if run.leave_out_broken else ()
    scores = {
        lam: [
            _scored(split, indices, features[:, i], left_out, rows[i])
            for split, indices in zip(splits, split_indices, strict=True)
        ]
        for i, lam in enumerate(weights)
    }
    failures = [Failure(index, dataset.path(index), why) for index, why in sorted(errors.items())]
    # The features of the videos do not depend on the texts, so a run with other texts reuses them.
    return ProtocolEvaluation(scores, failures, timing, {**settings, "text": mixture.text})


def require_videos(paths: Sequence[str], root: str) -> None:
    """Check that all videos exist.

    Args:
        paths: paths of the videos, relative to ``root``.
        root: the folder of the videos.

    Raises:
        VideoNotFoundError: the folder or videos do not exist. The error states how many videos are
            missing.
    """
    if not os.path.isdir(root):
        raise VideoNotFoundError(f"{root}: no such folder of videos{near_path(root)}.")
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise VideoNotFoundError(
            f"{len(missing)} of {len(paths)} videos are not in {root} ({listed(missing)})"
            f"{near_path(os.path.join(root, missing[0]))}. Check that the paths start from this "
            "folder, or allow missing videos."
        )


def _require_folder(processes: Processes, out: str | os.PathLike[str] | None) -> None:
    if processes.world_size > 1 and out is None:
        raise UsageError(
            f"out is None with {processes.world_size} processes. Give out, a folder that all "
            "processes can reach: the processes exchange their results through this folder."
        )


def _all_videos(splits: Sequence[Split]) -> tuple[list[str], list[list[int]]]:
    """Return the paths of all videos, each once, and the indices of the videos of each split."""
    if not splits or not all(split.samples for split in splits):
        raise EvaluationError(
            "There is nothing to evaluate: splits is empty, or a split has no videos."
        )
    index_of: dict[str, int] = {}
    class_of: dict[str, str] = {}
    indices = []
    for split in splits:
        for path, class_index in split.samples:
            name = split.class_names[class_index]
            if class_of.setdefault(path, name) != name:
                raise EvaluationError(
                    f"{path} is of class {class_of[path]!r} in one split and of {name!r} in "
                    f"{split.name}; expected one class for each video."
                )
        indices.append([index_of.setdefault(path, len(index_of)) for path, _ in split.samples])
    return list(index_of), indices


def _features_of(
    records: Records, shape: tuple[int, ...], batch_size: int
) -> tuple[Tensor, dict[int, str]]:
    """Return the features ``[N, L, D]`` of all videos, NaN for unreadable videos, and the errors.

    The errors are the reasons why videos are unreadable, by index of the video.
    """
    features = torch.full(shape, float("nan"))
    errors: dict[int, str] = {}
    for key, indices in enumerate(batches_of(len(features), batch_size)):
        record = records.by_key[key]
        errors.update({indices[index]: reason for index, reason in record.errors.items()})
        readable = [index for index in indices if index not in errors]
        if readable:
            features[readable] = record.values
    return features, errors


def _require_finite(
    features: Tensor, errors: Container[int], model: nn.Module, mixture: Mixture
) -> None:
    """Raise if the features of a readable video are NaN or infinite."""
    readable = [index for index in range(len(features)) if index not in errors]
    require_finite(
        features[readable],
        lambda: {**named_state(model), **(mixture.tuned_state(model) or {})},
        "The features of videos",
    )


def _warn_of_equal_labels(splits: Sequence[Split], names: list[str], texts: Tensor) -> None:
    """Warn once if a split has class names that the text tower can't tell apart."""
    row_of = {name: index for index, name in enumerate(names)}
    for class_names in dict.fromkeys(tuple(split.class_names) for split in splits):
        rows = [row_of[name] for name in class_names]
        if warn_of_equal_labels(class_names, texts[rows]):
            return


def _scored(
    split: Split,
    indices: list[int],
    features: Tensor,
    left_out: Container[int],
    texts: dict[str, Tensor],
) -> SplitScore:
    """Score the videos of a split.

    The logit scale is left out. It is positive and the same for all classes, so it does not change
    the ranks.
    """
    counted = torch.tensor([index not in left_out for index in indices])
    rows = torch.stack([texts[name] for name in split.class_names])
    targets = torch.tensor([class_index for _, class_index in split.samples])
    return SplitScore(
        split.name,
        list(split.class_names),
        score((features[indices] @ rows.T)[counted], targets[counted]),
        left_out=int((~counted).sum()),
        protocol=split.protocol,
    )


def _settings(
    model: nn.Module,
    paths: Sequence[str],
    mixture: Mixture,
    sampling: Sampling,
    transform: Transform,
    run: RunOptions,
) -> dict[str, Any]:
    """Return everything that the features depend on. The names are those of ``settings.json``."""
    tuned = mixture.tuned_state(model)
    return {
        **run.settings,
        "videos": len(paths),
        "list": _digest_text(json.dumps(paths)),
        **_model_settings(model),
        "tuned": None if tuned is None else weights_hash(tuned),
        "lams": list(mixture.lams),
        **asdict(sampling),
        "transform": asdict(transform),
        "batch_size": run.batch_size,
        "amp": None if run.amp is None else str(run.amp),
        "device": next(model.parameters()).device.type,
        # Folders of results that were written before there was this option go on.
        **({} if run.pooling == "unit_frames" else {"pooling": run.pooling}),
    }


def _model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model that its features depend on.

    These are the temporal attention, a hash of the architecture and a hash of the weights.
    """
    views = [getattr(module, "view", None) for module in model.modules()]
    windows = [f"{view.window} {view.boundary}" for view in views if isinstance(view, FrameView)]
    return {
        "expand": ", ".join(sorted(set(windows))) or None,
        "architecture": _digest_text(f"{model} {windows}"),
        "weights": weights_hash(model.state_dict()),
    }


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
