"""Choose the interpolation weight λ without labels, and mix the predictions of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from openvclip.commands.progress import progress_bar
from openvclip.errors import EvaluationError, LambdaError, UsageError
from openvclip.evaluation.accuracy import (
    Evaluation,
    broken_clips,
    evaluate_each,
    summed_over_views,
    weights_of,
)
from openvclip.evaluation.lambda_sweep import interpolated_logits
from openvclip.models.finite import require_finite
from openvclip.models.modes import evaluation_mode
from openvclip.models.text_weights import TextSource
from openvclip.weights.relative import FineTuned

__all__ = [
    "CHOICE_LAMBDAS",
    "LambdaChoice",
    "choose_lambda",
    "dawin_weights",
    "evaluate_mixed",
    "mix_logits",
]

CHOICE_LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The interpolation weights of the original CLIP that the methods with a grid compare."""

Method = Literal["dawin", "entropy", "information"]


@dataclass(frozen=True, eq=False)
class LambdaChoice:
    """An interpolation weight that was chosen without labels, from N clips.

    Attributes:
        lam: the interpolation weight λ of the original CLIP.
        method: the method that chose it.
        n_clips: number of clips N. Clips that could not be read are not counted.
        entropies: the entropies of the predictions in nats, float64 ``[N]``, by λ. ``"dawin"`` has
            λ = 1 (the original CLIP) and λ = 0 (the fine-tuned model).
        scores: the number that a method with a grid minimises, by λ. Empty for ``"dawin"``.
        weights: the weight of the fine-tuned model for each clip, float64 ``[N]``; empty for a
            method with a grid.
    """

    lam: float
    method: str
    n_clips: int
    entropies: Mapping[float, Tensor]
    scores: Mapping[float, float] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    @property
    def mean_entropies(self) -> dict[float, float]:
        """The mean entropy of the predictions in nats, by λ."""
        return {lam: float(values.mean()) for lam, values in self.entropies.items()}


def choose_lambda(
    classifier: nn.Module,
    base: Mapping[str, Tensor],
    tuned: FineTuned,
    unlabelled_loader: Iterable[Any],
    method: Method = "dawin",
    *,
    lams: Sequence[float] = CHOICE_LAMBDAS,
    text: TextSource = "own",
    progress: bool | None = None,
    description: str = "choose lambda",
) -> LambdaChoice:
    """Choose the interpolation weight of the original CLIP from clips without labels.

    - ``"dawin"``: the weight of the fine-tuned model for a clip is ``exp(-H_tuned) / (exp(-H_tuned)
      + exp(-H_base))``, where H are the entropies of the two models' predictions. λ is 1 minus the
      mean of these weights. This takes two passes over the clips. The entropies of the two models
      differ by at most ln K for K classes, and mostly by less, so λ stays near 0.5.
    - ``"entropy"``: the λ of ``lams`` whose interpolated model has the least mean entropy. This
      takes one pass for each λ. A model that is sure and wrong has a small entropy too.
    - ``"information"``: the λ of ``lams`` whose interpolated model has the most mutual information
      between clips and predictions: the entropy of the mean prediction minus the mean entropy. This
      takes one pass for each λ, and a model that predicts one class for all clips loses. Use it if
      the clips are of many classes.

    If several λ are equally good, the λ that is nearest to 0.5 is chosen.

    Each clip is read once. The weights of ``classifier.model`` are set to each interpolation in
    turn. On exit, also after an exception, the model has its original weights, bitwise.

    Args:
        classifier: see :func:`openvclip.evaluation.sweep`. Its class names decide what the
            entropies are of, so use the names of the test.
        base: state dict of the original CLIP.
        tuned: state dict of the fine-tuned model, or the :class:`openvclip.weights.Adapter` of a
            LoRA fine-tune of ``base``.
        unlabelled_loader: yields batches of clips ``[B, T, C, H, W]``, of clips with V views
            ``[B, V, T, C, H, W]``, or of images ``[B, C, H, W]``; or sequences whose first entry is
            such a batch. Other entries, such as labels, are ignored. The logits of the views are
            averaged.
        method: ``"dawin"``, ``"entropy"`` or ``"information"``.
        lams: interpolation weights of the original CLIP to compare, within [0, 1]. ``"dawin"`` does
            not use them.
        text: see :func:`openvclip.evaluation.sweep`.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Raises:
        UsageError: ``method`` or ``text`` is unknown, or the loader gives no tensors.
        LambdaError: ``lams`` is empty or holds a number outside of [0, 1].
        EvaluationError: the loader gives no clips, the classifier has fewer than two classes, or
            logits are NaN or infinite although all weights are finite.
        NonFiniteWeightsError, StateMismatchError, VideoShapeError: see
            :func:`openvclip.evaluation.sweep`.

    Sources: Oh et al., ICLR 2025 (DaWin); Morerio et al., ICLR 2018 (entropy as a criterion of
    choice); Krause, Perona and Gomes, NIPS 2010 (information).
    """
    if method not in get_args(Method):
        known = " or ".join(map(repr, get_args(Method)))
        raise UsageError(f"method={method!r}: expected {known}.")
    grid = (1.0, 0.0) if method == "dawin" else _require_lams(lams)
    with interpolated_logits(classifier, base, tuned, grid, text=text) as variants:
        views = _predicted(variants, classifier, unlabelled_loader, progress, description)
    entropies = {lam: seen.entropies for lam, seen in zip(grid, views, strict=True)}
    if method == "dawin":
        weights = _weights(*entropies.values())
        lam = 1.0 - float(weights.mean())
        return LambdaChoice(lam, method, len(weights), entropies, weights=weights)
    scores = {lam: float(values.mean()) for lam, values in entropies.items()}
    if method == "information":
        for lam, seen in zip(grid, views, strict=True):
            scores[lam] -= float(_entropy(seen.mean[None]))
    best = min(scores, key=lambda lam: (scores[lam], abs(lam - 0.5)))
    return LambdaChoice(best, method, len(entropies[best]), entropies, scores)


def dawin_weights(base_logits: Tensor, tuned_logits: Tensor) -> Tensor:
    """Return the weight of the fine-tuned model for each clip, from the entropies of both models.

    Args:
        base_logits: logits of the original CLIP ``[N, K]``.
        tuned_logits: logits of the fine-tuned model ``[N, K]``.

    Returns:
        ``exp(-H_tuned) / (exp(-H_tuned) + exp(-H_base))``, float64 ``[N]``, within [0, 1].

    Raises:
        UsageError: the shapes differ, or are not ``[N, K]``.

    Source: Oh et al., ICLR 2025 (DaWin).

    Example:
        >>> dawin_weights(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    if base_logits.shape != tuned_logits.shape or base_logits.ndim != 2:
        raise UsageError(
            f"base_logits has shape {list(base_logits.shape)} and tuned_logits has shape "
            f"{list(tuned_logits.shape)}; expected [N, K] twice."
        )
    rows = (base_logits, tuned_logits)
    return _weights(*(_entropy(row.double().softmax(dim=1)) for row in rows))


def mix_logits(base_logits: Tensor, tuned_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mix the logits of two models, with a weight for each clip.

    This is a reference for what one λ for all clips can reach. It needs both models in each test,
    while an interpolated model is one model.

    Args:
        base_logits: logits of the original CLIP ``[N, K]``.
        tuned_logits: logits of the fine-tuned model ``[N, K]``.
        weights: the weight of the fine-tuned model for each clip ``[N]``. Default: those of
            :func:`dawin_weights`.

    Returns:
        ``weights * tuned_logits + (1 - weights) * base_logits``, ``[N, K]``.

    Raises:
        UsageError: the shapes do not fit.
    """
    own = dawin_weights(base_logits, tuned_logits) if weights is None else weights
    if own.shape != base_logits.shape[:1] or base_logits.shape != tuned_logits.shape:
        raise UsageError(
            f"weights has shape {list(own.shape)}, base_logits {list(base_logits.shape)} and "
            f"tuned_logits {list(tuned_logits.shape)}; expected [N] and twice [N, K]."
        )
    column = own.to(tuned_logits.device)[:, None]
    mixed: Tensor = column * tuned_logits + (1 - column) * base_logits
    return mixed.to(tuned_logits.dtype)


def evaluate_mixed(
    classifier: nn.Module,
    base: Mapping[str, Tensor],
    tuned: FineTuned,
    loader: Iterable[Sequence[Any]],
    *,
    text: TextSource = "own",
    progress: bool | None = None,
    description: str = "evaluate mixed logits",
) -> Evaluation:
    """Evaluate the mixed logits of two models; see :func:`mix_logits`. Each clip is read once.

    If clips have several views, the logits of each view are mixed before they are summed.

    Args:
        classifier: see :func:`openvclip.evaluation.sweep`.
        base: see :func:`choose_lambda`.
        tuned: see :func:`choose_lambda`.
        loader: yields batches with labels; see :func:`openvclip.evaluation.evaluate`.
        text: see :func:`openvclip.evaluation.sweep`.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Raises:
        UsageError, StateMismatchError, VideoShapeError, NonFiniteWeightsError, EvaluationError: see
            :func:`openvclip.evaluation.sweep`.
    """
    with interpolated_logits(classifier, base, tuned, (1.0, 0.0), text=text) as (first, second):
        (result,) = evaluate_each(
            # On the CPU, because the weights are in float64, which Apple's devices do not have.
            [lambda video: mix_logits(first(video).cpu(), second(video).cpu())],
            classifier,
            loader,
            progress=progress,
            description=description,
        )
    return result


def _require_lams(lams: Sequence[float]) -> tuple[float, ...]:
    values = tuple(dict.fromkeys(float(lam) for lam in lams))
    if not values or not all(math.isfinite(lam) and 0 <= lam <= 1 for lam in values):
        raise LambdaError(
            f"lams={list(lams)}: expected at least one number, and all numbers within [0, 1]."
        )
    return values


class _Predictions(NamedTuple):
    """The predictions of a model: the entropy of each clip ``[N]``, and their mean ``[K]``."""

    entropies: Tensor
    mean: Tensor


def _predicted(
    variants: Sequence[Callable[[Tensor], Tensor]],
    classifier: nn.Module,
    loader: Iterable[Any],
    progress: bool | None,
    description: str,
) -> list[_Predictions]:
    """Return the predictions for all readable clips, in float64, for each variant."""
    device = next(classifier.parameters()).device
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in variants]
    bar = progress_bar(loader, desc=description, disable=None if progress is None else not progress)
    with evaluation_mode(classifier), torch.no_grad():
        for batch in bar:
            video = _video_of(batch)
            broken = broken_clips(batch)
            readable = [not error for error in broken] if broken else ...
            on_device = video.to(device, non_blocking=True)
            for logits_of, rows in zip(variants, parts, strict=True):
                logits = summed_over_views(logits_of, on_device).cpu().double()[readable]
                _require_classes(logits)
                require_finite(logits, lambda: weights_of(classifier), "The logits")
                chances = (logits / (video.shape[1] if video.ndim == 6 else 1)).softmax(dim=1)
                rows.append((_entropy(chances), chances.sum(dim=0)))
    if not any(len(entropies) for entropies, _ in parts[0]):
        raise EvaluationError(
            "The loader gave no clips that can be read; expected at least one clip. A generator is "
            "empty after its first pass: pass a list or a DataLoader."
        )
    predictions = []
    for rows in parts:
        entropies, sums = (torch.cat([row[0] for row in rows]), [row[1] for row in rows])
        predictions.append(_Predictions(entropies, torch.stack(sums).sum(dim=0) / len(entropies)))
    return predictions


def _video_of(batch: Any) -> Tensor:
    video = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(video, Tensor):
        raise UsageError(
            f"The loader returned a {type(batch).__name__}; expected a tensor of videos, or a list "
            "or tuple whose first entry is this tensor."
        )
    return video


def _require_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise EvaluationError(
            "The classifier has one class, so all predictions are equally sure; expected at least "
            "two classes."
        )


def _entropy(chances: Tensor) -> Tensor:
    """Return the entropy in nats of each row of probabilities."""
    parts: Tensor = torch.special.entr(chances)
    return parts.sum(dim=1)


def _weights(base_entropies: Tensor, tuned_entropies: Tensor) -> Tensor:
    return torch.sigmoid(base_entropies - tuned_entropies)
