"""Evaluate a model on published protocols: encode each video once, score it on every split."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor, nn

from openvclip.errors import EvaluationError
from openvclip.evaluation.accuracy import score
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.results import Answers, ProtocolEvaluation, SplitScore
from openvclip.evaluation.video_pass import RunOptions, VideoPass, require_videos
from openvclip.models.classifier import VIDEO_TEMPLATES, class_features
from openvclip.models.labels import warn_of_equal_labels
from openvclip.models.preprocess import transform_for
from openvclip.video.protocols import Split
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform

__all__ = ["RunOptions", "evaluate_protocol", "require_videos"]

N_ANSWERS = 5  # classes of each video that are kept


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
        model: a CLIP of open_clip or transformers, expanded or not, with the weights of the
            original CLIP. On exit the model has its original weights, bitwise.
        tokenizer: a function from a list of texts to token ids, such as the result of
            ``open_clip.get_tokenizer``; or a tokenizer of transformers.
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
    paths, split_indices = _all_videos(splits)
    root = os.fspath(videos)
    if not run.allow_missing:
        require_videos(paths, root)
    names = list(dict.fromkeys(name for split in splits for name in split.class_names))
    job = VideoPass(paths, root, mixture, sampling, transform or transform_for(model), out, run)
    encoded = job.encode(
        model,
        lambda: class_features(model, tokenizer, names, templates),
        lambda texts: _warn_of_equal_labels(splits, names, texts),
    )
    weights: list[float | None] = [*mixture.lams] or [None]
    features, texts = encoded.features, encoded.texts
    left_out = encoded.errors if run.leave_out_broken else ()
    views = sampling.views * job.transform.crops
    rows = [dict(zip(names, text.float().cpu(), strict=True)) for text in texts]
    scores = {
        lam: [
            _scored(split, indices, features[:, i], left_out, rows[i], views)
            for split, indices in zip(splits, split_indices, strict=True)
        ]
        for i, lam in enumerate(weights)
    }
    return ProtocolEvaluation(
        scores, encoded.failures, encoded.timing, encoded.settings, os.path.abspath(root)
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
    views: int,
) -> SplitScore:
    """Score the videos of a split.

    The logit scale is left out. It is positive and the same for all classes, so it does not change
    the ranks. The features are sums over ``views`` views.
    """
    counted = torch.tensor([index not in left_out for index in indices])
    rows = torch.stack([texts[name] for name in split.class_names])
    targets = torch.tensor([class_index for _, class_index in split.samples])
    logits = (features[indices] @ rows.T)[counted]
    paths = [path for (path, _), kept in zip(split.samples, counted.tolist(), strict=True) if kept]
    return SplitScore(
        split.name,
        list(split.class_names),
        score(logits, targets[counted]),
        left_out=int((~counted).sum()),
        protocol=split.protocol,
        answers=_best(paths, logits / views),
    )


def _best(paths: list[str], cosines: Tensor) -> Answers:
    """Return the classes with the highest cosines ``[N, K]``; the first of equal ones first."""
    scores, labels = cosines.sort(dim=1, descending=True, stable=True)
    labels, scores = labels[:, :N_ANSWERS], scores[:, :N_ANSWERS]
    return Answers(paths, labels.masked_fill(scores.isnan(), -1).clone(), scores.clone())
