"""Evaluate a classifier along the line between two models: the curves of Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from openvclip.evaluation.accuracy import Evaluation, evaluate_each
from openvclip.evaluation.frozen import require_live_weights
from openvclip.weights.interpolation import interpolate_into
from openvclip.weights.names import canonical_state, named_state
from openvclip.weights.numerics import memory_of, overwriting

FIGURE_LAMBDAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The interpolation weights of the original CLIP in Figures 2 and 3. 0 is the fine-tuned model."""


def sweep(
    classifier: nn.Module,
    theta_a: Mapping[str, Tensor],
    theta_b: Mapping[str, Tensor],
    loader: Iterable[Sequence[Any]],
    *,
    lams: Sequence[float] = FIGURE_LAMBDAS,
    progress: bool | None = None,
    description: str = "sweep",
) -> dict[float, Evaluation]:
    """Evaluate ``interpolate(theta_a, theta_b, lam)`` for each ``lam``. Each clip is read once.

    The weights of ``classifier.model`` are set to each interpolation in turn. On exit, also after
    an exception, the model has its original weights, bitwise. During the sweep no other thread may
    use the model.

    Args:
        classifier: a :class:`openvclip.ZeroShotClassifier`, a
            :class:`openvclip.prompting.VideoClassifier`, or another module that returns logits and
            holds the CLIP model in the attribute ``model``.
        theta_a: state dict of the original CLIP.
        theta_b: state dict of the fine-tuned model. ``theta_a`` or ``theta_b`` may be the
            ``state_dict()`` of ``classifier.model``; its tensors are copied.
        loader: see :func:`openvclip.evaluation.evaluate`.
        lams: interpolation weights of ``theta_a``.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Returns:
        The evaluation at each ``lam``.

    Raises:
        StateMismatchError: a state dict does not fit the model.
        VideoShapeError: a video batch has neither 5 nor 6 dimensions.
        UsageError: the classifier or its model is compiled with Inductor's ``freezing=True``, which
            keeps the old weights.
    """
    require_live_weights(classifier)
    model = cast(nn.Module, classifier.model)
    live = named_state(model)
    theta_a = _not_shared(live, canonical_state(theta_a, "theta_a", like=live))
    theta_b = _not_shared(live, canonical_state(theta_b, "theta_b", like=live))

    def logits_at(lam: float, video: Tensor) -> Tensor:
        interpolate_into(model, theta_a, theta_b, lam)
        logits: Tensor = classifier(video)
        return logits

    variants: list[Callable[[Tensor], Tensor]] = [partial(logits_at, lam) for lam in lams]
    with overwriting(list(live.values())):
        evaluations = evaluate_each(
            variants, classifier, loader, progress=progress, description=description
        )
    return dict(zip(lams, evaluations, strict=True))


def _not_shared(live: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with copies of the tensors that share memory with the live weights.

    The sweep overwrites the live weights, but not the copies.
    """
    live_memory = {memory_of(value) for value in live.values()}
    return {n: v.clone() if memory_of(v) in live_memory else v for n, v in state.items()}
