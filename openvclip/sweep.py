"""Accuracy along the line between two models: the curves of Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from openvclip.evaluation import Evaluation, evaluate_each
from openvclip.interpolation import interpolate_into
from openvclip.state import canonical_state, named_state, overwriting

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
    live = [value.detach() for value in named_state(model).values()]
    theta_a, theta_b = (_apart_from(live, theta) for theta in (theta_a, theta_b))

    def logits_at(lam: float, video: Tensor) -> Tensor:
        interpolate_into(model, theta_a, theta_b, lam)
        logits: Tensor = classifier(video)
        return logits

    variants: list[Callable[[Tensor], Tensor]] = [partial(logits_at, lam) for lam in lams]
    with overwriting(live):
        found = evaluate_each(variants, classifier, loader, progress, description)
    return dict(zip(lams, found, strict=True))


def _apart_from(live: list[Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries, copied where they share memory with weights that will be overwritten."""
    in_use = {value.untyped_storage().data_ptr() for value in live}
    return {
        name: value.clone() if value.untyped_storage().data_ptr() in in_use else value
        for name, value in canonical_state(state).items()
    }
