"""Evaluate a classifier along the line between two models: the curves of Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, SupportsFloat

from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.evaluation.accuracy import Evaluation, evaluate_each
from openvclip.evaluation.frozen import require_live_weights
from openvclip.models.classifier import TextClassifier, text_classifiers
from openvclip.models.text_weights import (
    TextSource,
    require_text_source,
    require_whole_text,
    same_text,
)
from openvclip.weights.averageable import require_own_memory
from openvclip.weights.interpolation import as_number, interpolate_into
from openvclip.weights.names import canonical_model, named_state
from openvclip.weights.numerics import memory_of, overwriting
from openvclip.weights.relative import FineTuned, RelativeWeights, resolved

FIGURE_LAMBDAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The interpolation weights of the original CLIP in Figures 2 and 3. 0 is the fine-tuned model."""


def sweep(
    classifier: nn.Module,
    theta_a: Mapping[str, Tensor],
    theta_b: FineTuned,
    loader: Iterable[Sequence[Any]],
    *,
    lams: Iterable[SupportsFloat] = FIGURE_LAMBDAS,
    text: TextSource = "own",
    progress: bool | None = None,
    description: str = "sweep",
) -> dict[float, Evaluation]:
    """Evaluate ``interpolate(theta_a, theta_b, lam)`` for each ``lam``. Each clip is read once.

    The weights of ``classifier.model`` are set to each interpolation in turn. On exit, also after
    an exception, the model has its original weights, bitwise. During the sweep no other thread may
    use the model.

    The text features are those of each interpolation. If both ends have the same text weights, the
    class names are encoded at most once, otherwise once for each ``lam``.

    Args:
        classifier: a :class:`openvclip.ZeroShotClassifier`, a
            :class:`openvclip.prompting.VideoClassifier`, or another module that returns logits and
            holds the CLIP model in the attribute ``model``. Another module has to compute its text
            features itself, or to hold one of these two classifiers.
        theta_a: state dict of the original CLIP.
        theta_b: state dict of the fine-tuned model. ``theta_a`` or ``theta_b`` may be the
            ``state_dict()`` of ``classifier.model``; its tensors are copied. Or the
            :class:`openvclip.weights.Adapter` of a LoRA fine-tune of ``theta_a``. Entries that the
            adapter does not change are not copied.
        loader: see :func:`openvclip.evaluation.evaluate`.
        lams: interpolation weights of ``theta_a``.
        text: the weights that encode the class names. ``"own"``: those of each interpolation.
            ``"original"``: those of ``theta_a`` for every ``lam``.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Returns:
        The evaluation at each ``lam``.

    Raises:
        StateMismatchError: a state dict does not fit the model.
        VideoShapeError, NonFiniteWeightsError, EvaluationError: see
            :func:`openvclip.evaluation.evaluate`.
        UsageError: the loader returns something else than ``(video, label)``; or ``text`` is
            unknown; or ``classifier`` has no model; or the text weights are sharded and differ; or
            the classifier or its model is compiled with Inductor's ``freezing=True``, which keeps
            the old weights; or ``theta_a`` and ``theta_b`` share the memory of all their entries.
        LambdaError: a weight is not a finite number.
    """
    weights = [as_number(lam, "lam") for lam in lams]
    with interpolated_logits(classifier, theta_a, theta_b, weights, text=text) as variants:
        evaluations = evaluate_each(
            variants, classifier, loader, progress=progress, description=description
        )
    return dict(zip(weights, evaluations, strict=True))


@contextmanager
def interpolated_logits(
    classifier: nn.Module,
    theta_a: Mapping[str, Tensor],
    theta_b: FineTuned,
    lams: Sequence[float],
    *,
    text: TextSource = "own",
) -> Iterator[list[Callable[[Tensor], Tensor]]]:
    """Context manager that returns one function from clips to logits for each ``lam``.

    A call of a function sets the weights of ``classifier.model`` to the interpolation at this
    ``lam``. On exit, also after an exception, the model has its original weights, bitwise.

    Args:
        classifier: see :func:`sweep`.
        theta_a: see :func:`sweep`.
        theta_b: see :func:`sweep`.
        lams: interpolation weights of ``theta_a``.
        text: see :func:`sweep`.

    Raises:
        StateMismatchError, UsageError: see :func:`sweep`.
    """
    require_text_source(text)
    require_live_weights(classifier)
    model = getattr(classifier, "model", None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{type(classifier).__name__} has no attribute 'model'; expected a classifier with the "
            "interpolated model as this attribute, such as ZeroShotClassifier(model, ...). Pass "
            "the classifier without a wrapper such as DataParallel."
        )
    live = named_state(model)
    theta_a, _ = canonical_model(theta_a, "theta_a", like=live)
    if not isinstance(theta_b, RelativeWeights):
        theta_b, _ = canonical_model(theta_b, "theta_b", like=live)
        require_own_memory(theta_a, theta_b, "theta_a and theta_b")
    theta_a = _not_shared(live, theta_a)
    # The changed entries of an adapter are merged once, and not at each lambda.
    theta_b = _not_shared(live, dict(resolved(theta_b, theta_a)))

    def set_weights(lam: float) -> None:
        interpolate_into(model, theta_a, theta_b, lam)

    def logits_at(lam: float, features: list[Tensor], video: Tensor) -> Tensor:
        set_weights(lam)
        with ExitStack() as stack:
            for part, text_features in zip(parts, features, strict=True):
                stack.enter_context(part.using_text(text_features))
            logits: Tensor = classifier(video)
        return logits

    parts = text_classifiers(classifier)
    fixed = text == "original" or same_text(theta_a, theta_b)
    if parts and not fixed:
        require_whole_text(live)
    with overwriting(list(live.values())):
        features = _features_at([1.0] if fixed else lams, parts, set_weights)
        pairs = zip(lams, features * len(lams) if fixed else features, strict=True)
        yield [partial(logits_at, lam, rows) for lam, rows in pairs]


def _features_at(
    lams: Sequence[float], parts: list[TextClassifier], set_weights: Callable[[float], None]
) -> list[list[Tensor]]:
    """Return the text features of each classifier at each lambda."""
    features = []
    for lam in lams if parts else ():
        set_weights(lam)
        features.append([part.present_text() for part in parts])
    return features or [[] for _ in lams]


def _not_shared(live: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with copies of the tensors that share memory with the live weights.

    The sweep overwrites the live weights, but not the copies.
    """
    live_memory = {memory_of(value) for value in live.values()}
    return {n: v.clone() if memory_of(v) in live_memory else v for n, v in state.items()}
