"""Averages of weights along a training run: SWA (Open-VCLIP's Algorithm 1), EMA and LAWA."""

from __future__ import annotations

import torch
from torch import nn

from openvclip.errors import UsageError
from openvclip.weights.arguments import is_whole
from openvclip.weights.moves import COPY, Blend, Move
from openvclip.weights.numerics import computable, foreach
from openvclip.weights.schedule import require_decay, warmed_up
from openvclip.weights.sums import SumTracker
from openvclip.weights.tracker import Entries, WeightTracker, shards


class SWATracker(SumTracker):
    r"""Stochastic weight averaging: the uniform mean of the weights at chosen steps.

    The schedule is that of Algorithm 1 with ``T = start`` and ``c = every``. The weights after step
    ``s = 1, 2, ...`` are added to the average if ``s > T`` and ``(s - T) % c == 0``. Averaging and
    interpolation commute (Equation 10), so one average can be interpolated at every
    :math:`\lambda`::

        theta = interpolate(clip, swa.averaged_state_dict(), 0.5)

    The tracker averages the parameters that require gradients when the tracker is created. If no
    parameter requires gradients, it averages all parameters. To average checkpoint files, freeze
    all parameters, load one checkpoint at a time into the model, and call :meth:`update` after
    each. All other entries (frozen parameters, and buffers such as batch-norm statistics) keep
    their values of the last averaged step. Frozen weights therefore stay bitwise the same. Running
    statistics do not fit the average: :func:`openvclip.update_statistics` makes them anew.

    Numerics: the tracker keeps the *sum* of the weights in ``dtype``, and divides it when the
    average is read. A running mean would be rounded at every update. Blocks of 128 models are
    summed first, and the block sums are then added to a total. This keeps the rounding error of
    long runs small. Sums beyond the range of ``dtype`` become infinite (weights near 1e36 in
    float32); use ``dtype=torch.float64`` for such weights.

    An update enters whole or not at all. After Ctrl-C inside :meth:`update`, the update ends before
    ``KeyboardInterrupt`` is raised. Weights with NaN or infinity do not enter. Weights in ``dtype``
    are read twice: they are checked before they are added. On a CPU, half-precision weights are
    converted, checked and added in pieces, in one pass. If a later piece holds NaN, the earlier
    pieces are subtracted again. The average is then the old one except for the rounding of one
    addition.

    Args:
        model: the model whose weights are passed to :meth:`update`, with or without wrappers
            (``DistributedDataParallel``, ``torch.compile``).
        start: number of steps before the averaging begins (``T``), for example the warm-up.
        every: number of steps between two averaged models (``c``), for example one epoch.
        dtype: dtype of the sums, at least float32. A float64 parameter is summed in float64.
        check_finite: whether to refuse weights that hold NaN or infinity, which would make the
            average useless. The check reads the memory of float32 weights once more. ``False``
            suits loops that stop at the first loss that is not finite.
        device: device of the sums, for example ``"cpu"``. Default: the device of each parameter.

    Memory: from the first averaged step on, one copy of the averaged parameters in ``dtype`` and
    one copy of all other entries in their own dtypes. From the 129th model on, one more copy of the
    averaged parameters.

    Raises:
        UsageError: ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """


class EMATracker(WeightTracker):
    r"""Exponential moving average of the weights, in which the latest models weigh most.

    The average starts as a copy of the first model. Each further model with weights :math:`\theta`
    changes the average to

    .. math:: \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta

    where :math:`d` is ``decay``. With ``warmup``, :math:`d` is the smaller of ``decay`` and
    :math:`(1 + n) / (10 + n)`, where :math:`n` is the number of models in the average before the
    update. The weight of the first models then falls quickly (as in TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``, and in ``torch_ema``). The averaged entries
    and the treatment of all other entries are those of :class:`SWATracker`.

    Numerics: the average is kept in ``dtype``, at least float32. One update changes the average by
    ``(1 - decay) * (theta - average)``. In half precision, this small change would be lost to
    rounding.

    Args:
        model: the model whose weights are passed to :meth:`update`, with or without wrappers.
        decay: share of the average that each update keeps, in [0, 1).
        warmup: whether the decay starts small and grows to ``decay``.
        start: number of steps before the averaging begins.
        every: number of steps between two updates of the average. ``decay`` applies to each
            update.
        dtype: dtype of the average, at least float32.
        check_finite: whether to refuse weights that hold NaN or infinity, as in
            :class:`SWATracker`.
        device: device of the average. Default: the device of each parameter.

    Memory: one copy of the averaged parameters in ``dtype`` and one copy of all other entries in
    their own dtypes.

    Raises:
        UsageError: ``decay``, ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """

    _settings = ("start", "every", "decay", "warmup")

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9999,
        warmup: bool = False,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        decay = require_decay(decay)
        super().__init__(
            model, start=start, every=every, dtype=dtype, check_finite=check_finite, device=device
        )
        self.decay = decay
        self.warmup = warmup
        self._average: Entries = {}

    def _add(self, weights: Entries) -> None:
        self._average.update(self._wide_copy(weights))

    def _moves(self, weights: Entries, look: bool) -> list[Move] | None:
        if self._n_averaged == 0:
            return None
        blend = Blend("lerp", 1.0 - self._current_decay())
        look = look and blend.weight <= 0.5  # taking back a large part loses digits
        return [self._move(self._average, weights, blend, look)]

    def _current_decay(self) -> float:
        return warmed_up(self.decay, self._n_averaged) if self.warmup else self.decay

    def _mean(self) -> Entries:
        return {name: value.clone() for name, value in self._average.items()}

    def _tensors(self) -> dict[str, Entries]:
        return {"average": self._average}


class LAWATracker(WeightTracker):
    """Latest weight averaging: the uniform mean of the last ``k`` models.

    Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight
    averaging" (2022), averages the weights at the ends of the last ``k`` epochs. Set ``every`` to
    the number of steps in one epoch to do the same. The average of fewer than ``k`` models is the
    mean of all models that were added. The averaged entries and the treatment of all other entries
    are those of :class:`SWATracker`.

    Args:
        model: the model whose weights are passed to :meth:`update`, with or without wrappers.
        k: number of models in the average.
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        dtype: dtype of the average, at least float32. The models are kept in their own dtypes.
        check_finite: whether to refuse weights that hold NaN or infinity, as in
            :class:`SWATracker`.
        device: device of the kept models, for example ``"cpu"``. Default: the device of each
            parameter.

    Memory: ``k`` copies of the averaged parameters and one copy of all other entries, in their own
    dtypes.

    Raises:
        UsageError: ``k``, ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        k: int = 6,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not is_whole(k, 1):
            raise UsageError(f"k={k!r}: expected a whole number of models, at least 1.")
        super().__init__(
            model, start=start, every=every, dtype=dtype, check_finite=check_finite, device=device
        )
        self.k = int(k)
        self._models: list[Entries] = [{} for _ in range(k)]  # a ring buffer

    @property
    def n_averaged(self) -> int:
        """Number of models in the average, at most ``k``."""
        return min(self._n_averaged, self.k)

    def _add(self, weights: Entries) -> None:
        copies = {n: v.to(self._device or v.device, copy=True) for n, v in weights.items()}
        self._models[self._n_averaged].update(copies)

    def _moves(self, weights: Entries, look: bool) -> list[Move] | None:
        if self._n_averaged < self.k:
            return None
        return [self._move(self._models[self._n_averaged % self.k], weights, COPY)]

    def _mean(self) -> Entries:
        first, *others = self._models[: self.n_averaged]
        mean = self._wide_copy(first)
        for other in others:
            foreach._foreach_add_(shards(mean), [computable(value) for value in shards(other)])
        foreach._foreach_div_(shards(mean), float(self.n_averaged))
        return mean

    def _tensors(self) -> dict[str, Entries]:
        return {f"model_{slot}": weights for slot, weights in enumerate(self._models)}
