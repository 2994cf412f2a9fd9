"""Averages of weights along a training run whose weights follow a Gaussian over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from openvclip.errors import UsageError
from openvclip.weights.arguments import as_float
from openvclip.weights.sums import SumTracker

_LARGEST = 16  # binary logarithm of the largest weight in a sum
_FAR = 1e6  # beyond this binary logarithm, a ratio of weights is 0 or infinite


class _Scale(NamedTuple):
    """The scale of the weights in the sums. Their ratios alone matter.

    Attributes:
        step: a step whose model is in the average.
        weight: weight of the model of this step.
        total: sum of the weights of all models.
    """

    step: int
    weight: float
    total: float


class GaussianTracker(SumTracker):
    r"""Weighted average of the weights: models near the step ``mu`` weigh most.

    The model after step :math:`t = 1, 2, \dots` has the weight

    .. math:: w_t = \exp\left(-\frac{(t - \mu)^2}{2 \sigma^2}\right), \qquad
              \bar\theta = \frac{\sum_t w_t\, \theta_t}{\sum_t w_t}

    where the sum goes over the models of the schedule (``start``, ``every``). Open-MeDe
    (arXiv 2502.20158) updates :math:`\bar\theta` by
    :math:`w_t / \sum_{s \le t} w_s \, (\theta_t - \bar\theta)`, which is the same average. The
    first models have moved little from the pretrained model, and the last models fit the training
    data most. A Gaussian over the run lets both weigh less. The weights from before the first step
    do not enter. The average can be read at any step::

        average = GaussianTracker(model, mu=0.75 * steps, sigma=0.2 * steps)

    ``mu`` and ``sigma`` are numbers of steps, as ``start`` and ``every`` are: calls of
    :meth:`update`, and not epochs or averaged models. With ``sigma=math.inf``, all models weigh the
    same, and the average is bitwise that of :class:`openvclip.SWATracker`. Averaged entries and all
    other entries are those of :class:`openvclip.SWATracker`.

    Numerics: sums are kept in ``dtype`` and divided when the average is read, as in
    :class:`openvclip.SWATracker`. Only ratios of weights are computed, so ``mu`` can be any number
    of ``sigma`` away from all steps. A model whose weight is less than about 1e-38 of the weight
    of the models before it does not change the average.

    Args:
        model: the model whose weights are passed to :meth:`update`, with or without wrappers.
        mu: step whose model weighs most. It can lie before ``start`` or after the end of the run.
        sigma: standard deviation of the Gaussian in steps, above 0, at most ``math.inf``.
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        dtype: dtype of the sums, at least float32.
        check_finite: whether to refuse weights that hold NaN or infinity, as in
            :class:`openvclip.SWATracker`.
        device: device of the sums. Default: the device of each parameter.

    Memory: as :class:`openvclip.SWATracker`.

    Raises:
        UsageError: ``mu``, ``sigma``, ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """

    _settings = ("start", "every", "mu", "sigma")

    def __init__(
        self,
        model: nn.Module,
        *,
        mu: float,
        sigma: float,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not math.isfinite(as_float(mu)):
            raise UsageError(f"mu={mu!r}: expected a number of steps, for example 1000.")
        if not as_float(sigma) > 0:
            raise UsageError(
                f"sigma={sigma!r}: expected a number of steps above 0, for example 200, or "
                "math.inf for equal weights."
            )
        super().__init__(
            model, start=start, every=every, dtype=dtype, check_finite=check_finite, device=device
        )
        self.mu = float(mu)
        self.sigma = float(sigma)
        self._scale = self._next = _Scale(0, 1.0, 0.0)

    def _weight(self) -> tuple[float, float]:
        step, (origin, weight, total) = self._steps, self._scale
        if self._n_averaged == 0:
            self._next = _Scale(step, 1.0, 1.0)
            return 1.0, 1.0
        log_ratio = self._log_ratio(step, origin)
        size = math.log2(weight) + max(-_FAR, min(_FAR, log_ratio / math.log(2)))
        if size <= _LARGEST:
            new = weight * math.exp(log_ratio)
            self._next = self._scale._replace(total=total + new)
            return new, 1.0
        # Weights grow until step mu. A division by a power of 2 is exact.
        shift = math.floor(size)
        new, factor = 2.0 ** (size - shift), math.ldexp(1.0, -shift)
        self._next = _Scale(step, new, total * factor + new)
        return new, factor

    def _log_ratio(self, step: int, other: int) -> float:
        """Return the natural logarithm of the weight of a step over that of another step."""
        # The difference of two large squares would be rounded.
        difference = (step - other) / self.sigma
        distance = (step - self.mu + (other - self.mu)) / self.sigma
        return -difference * distance / 2 if difference and distance else 0.0

    def _keep_numbers(self) -> None:
        self._scale = self._next

    def _total_weight(self) -> float:
        return self._scale.total

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker, with which a run resumes bitwise.

        The tensors are not copied. Save them, or clone them before the next call of
        :meth:`update`.
        """
        return {**super().state_dict(), "scale": self._scale._asdict()}

    def _require_own_state(self, state: Mapping[str, Any]) -> None:
        super()._require_own_state(state)
        self._require_entries(state, "scale", (int, float))
        if state["scale"].keys() != set(_Scale._fields):
            raise self._damaged("scale", f"has the entries {', '.join(map(str, state['scale']))}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`. The tensors are copied.

        Raises:
            StateMismatchError: an entry is missing or unknown, or the state belongs to another
                model or to a run that trained other parameters.
        """
        super().load_state_dict(state)
        scale = state["scale"]
        self._scale = _Scale(int(scale["step"]), float(scale["weight"]), float(scale["total"]))
