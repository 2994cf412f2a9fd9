"""Accuracy along the line between two models: the curves of Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from openvclip.evaluation.accuracy import Evaluation, evaluate_each
from openvclip.weights.interpolation import interpolate_into
from openvclip.weights.names import canonical_state, named_state
from openvclip.weights.numerics import memory_of, overwriting

FIGURE_LAMBDAS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The weights of the original CLIP in Figures 2 and 3, from the fine-tuned end."""


def sweep(
    classifier: nn.Module,
    theta_a: Mapping[str, Tensor],
    theta_b: Mapping[str, Tensor],
    loader: Iterable[Sequence[Any]],
    lams: Sequence[float] = FIGURE_LAMBDAS,
    *,
    progress: bool | None = None,
    description: str = "sweep",
) -> dict[float, Evaluation]:
    """Evaluate ``interpolate(theta_a, theta_b, lam)`` for each ``lam``, reading each clip once.

    Args:
        classifier: a :class:`~openvclip.ZeroShotClassifier`, a
            :class:`~openvclip.prompting.VideoClassifier`, or another module that gives logits and
            holds the CLIP as its ``model``. That is set to each interpolation in turn and has its
            own weights back, bitwise, at the end, also after an exception.
        theta_a: state dict of the original model, weighed by ``lam``.
        theta_b: state dict of the fine-tuned model. Either may be the model's own
            ``state_dict()``, which is then copied.
        loader: as for :func:`openvclip.evaluation.evaluate`.
        lams: the weights to try.
        progress: show a progress bar; by default where the output is a terminal.
        description: the bar's label.

    Returns:
        The evaluation at each ``lam``.
    """
    model = cast(nn.Module, classifier.model)
    own = named_state(model)
    live = [value.detach() for value in own.values()]
    theta_a = _apart_from(own, canonical_state(theta_a, "theta_a", like=own))
    theta_b = _apart_from(own, canonical_state(theta_b, "theta_b", like=own))

    def logits_at(lam: float, video: Tensor) -> Tensor:
        interpolate_into(model, theta_a, theta_b, lam)
        logits: Tensor = classifier(video)
        return logits

    variants: list[Callable[[Tensor], Tensor]] = [partial(logits_at, lam) for lam in lams]
    with overwriting(live):
        found = evaluate_each(variants, classifier, loader, progress, description)
    return dict(zip(lams, found, strict=True))


def _apart_from(live: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries, copied where they share memory with weights that will be overwritten."""
    in_use = {memory_of(value) for value in live.values()}
    return {n: v.clone() if memory_of(v) in in_use else v for n, v in state.items()}
