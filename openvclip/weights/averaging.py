"""Averages of weights along a training run: SWA (Open-VCLIP's Algorithm 1), EMA and LAWA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.weights.numerics import foreach, lerp_
from openvclip.weights.tracker import WeightTracker, shards

_BLOCK = 128  # models summed up before their sum is added to the others'


class SWATracker(WeightTracker):
    r"""Stochastic weight averaging: the uniform mean of the weights at chosen steps.

    Algorithm 1: with ``T = start`` and ``c = every``, the weights after step ``s = 1, 2, ...``
    enter the average where ``s > T`` and ``(s - T) % c == 0``. By Equation 10 the average of
    interpolated weights is the interpolation of the average, so one average serves every
    :math:`\lambda`::

        theta = interpolate(clip, swa.averaged_state_dict(), 0.5)

    What is averaged: the parameters that require gradients when the tracker is made (all
    parameters where none does, for averaging checkpoints that are loaded one after the other).
    Everything else (frozen parameters, buffers such as batch-norm statistics) is carried as it
    is at the last update, so that frozen weights stay bitwise what they were.

    Numerics: the tracker keeps the *sum* of the weights in ``dtype`` and divides when read, where
    a running mean would round at every update; an update is one foreach addition. Sums of 128
    models are added up apart from each other, so that the rounding does not grow with the length
    of the run. Sums beyond the range of ``dtype`` (weights near 1e36 in float32) are infinite:
    give ``dtype=torch.float64`` then.

    Args:
        model: the model whose weights will be given to :meth:`update`. Wrappers
            (``DistributedDataParallel``, ``torch.compile``) may be around it.
        start: number of steps before the averaging begins (``T``), for example the warm-up.
        every: number of steps between two averaged models (``c``), for example one epoch.
        dtype: dtype of the sums, at least float32; a float64 parameter is summed in float64.
        check_finite: refuse weights that hold NaN or infinity, which would spoil the average for
            good. It reads all weights once more; ``False`` is for loops that stop at the first
            loss that is not finite.
        device: where the sums are kept, for example ``"cpu"``; by default on the model's devices.

    Memory: one copy of the averaged parameters in ``dtype`` and one of the rest in its own dtype,
    from the first averaged step on; one more copy of the averaged parameters from the 129th model
    on.

    Raises:
        UsageError: ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        # The sums of the current block of models, and of all full blocks before it.
        parts = ("sums", "earlier")
        super().__init__(
            model,
            start=start,
            every=every,
            dtype=dtype,
            check_finite=check_finite,
            parts=parts,
            device=device,
        )

    def _enter(self, weights: dict[str, Tensor]) -> None:
        if self._n_averaged == 0:
            self._parts["sums"] = self._wide_copy(weights)
            return
        if self._n_averaged % _BLOCK == 0:
            self._end_block()
        live = shards(weights)
        if self._device is not None:
            live = [value.to(self._device) for value in live]
        foreach._foreach_add_(shards(self._parts["sums"]), live)

    def _end_block(self) -> None:
        sums, earlier = self._parts["sums"], self._parts["earlier"]
        if earlier:
            foreach._foreach_add_(shards(earlier), shards(sums))
        else:
            self._parts["earlier"] = {name: value.clone() for name, value in sums.items()}
        foreach._foreach_zero_(shards(sums))

    def _means(self) -> dict[str, Tensor]:
        means = {name: value.clone() for name, value in self._parts["sums"].items()}
        if self._parts["earlier"]:
            foreach._foreach_add_(shards(means), shards(self._parts["earlier"]))
        foreach._foreach_div_(shards(means), float(self._n_averaged))
        return means


class EMATracker(WeightTracker):
    r"""Exponential moving average of the weights: the latest count most.

    The first model that enters is the average; with each further one, of weights
    :math:`\theta`,

    .. math:: \bar\theta \leftarrow d\, \bar\theta + (1 - d)\, \theta

    where :math:`d` is ``decay``; with ``warmup`` it is the smaller of that and
    :math:`(1 + n) / (10 + n)` for the :math:`n` models that are in the average already, so that
    the first ones are soon forgotten (as in TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``, and in ``torch_ema``). What is averaged, and what is carried as it is, are the
    same as with :class:`SWATracker`.

    Numerics: the average is kept in ``dtype``, at least float32. In half precision the change of
    one update, ``1 - decay`` of the difference, would be rounded away.

    Args:
        model: the model whose weights will be given to :meth:`update`; wrappers may be around it.
        decay: the share of the average that each update keeps, in [0, 1).
        warmup: whether the decay begins smaller.
        start: number of steps before the averaging begins.
        every: number of steps between two updates of the average; ``decay`` is per update.
        dtype: dtype of the average, at least float32.
        check_finite: refuse weights that hold NaN or infinity, as with :class:`SWATracker`.
        device: where the average is kept; by default on the model's devices.

    Memory: one copy of the averaged parameters in ``dtype`` and one of the rest in its own.

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
        if not 0.0 <= decay < 1.0:
            raise UsageError(f"decay={decay!r}: expected a number in [0, 1), such as 0.9999.")
        self.decay = float(decay)
        self.warmup = warmup
        parts = ("average",)
        super().__init__(
            model,
            start=start,
            every=every,
            dtype=dtype,
            check_finite=check_finite,
            parts=parts,
            device=device,
        )

    def _enter(self, weights: dict[str, Tensor]) -> None:
        if self._n_averaged == 0:
            self._parts["average"] = self._wide_copy(weights)
            return
        lerp_(shards(self._parts["average"]), shards(weights), 1.0 - self._decay_now())

    def _decay_now(self) -> float:
        n = self._n_averaged
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    def _means(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._parts["average"].items()}


class LAWATracker(WeightTracker):
    """Latest weight averaging: the uniform mean of the last ``k`` models.

    Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight
    averaging" (2022): the mean of the weights at the ends of the latest ``k`` epochs; so
    ``every`` should be the number of steps in one. Until ``k`` models have entered, those that
    have are averaged. What is averaged, and what is carried as it is, are the same as with
    :class:`SWATracker`.

    Args:
        model: the model whose weights will be given to :meth:`update`; wrappers may be around it.
        k: number of models in the average.
        start: number of steps before the first model enters.
        every: number of steps between two models.
        dtype: dtype of the average, at least float32. The models are kept in their own dtypes.
        check_finite: refuse weights that hold NaN or infinity, as with :class:`SWATracker`.
        device: where the models are kept, for example ``"cpu"``; by default on the model's devices.

    Memory: ``k`` copies of the averaged parameters and one of the rest, in their own dtypes.

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
        if not (isinstance(k, int) and k >= 1):
            raise UsageError(f"k={k!r}: expected a whole number of models, at least 1.")
        self.k = k
        parts = tuple(f"model_{slot}" for slot in range(k))  # filled in turn, over and over
        super().__init__(
            model,
            start=start,
            every=every,
            dtype=dtype,
            check_finite=check_finite,
            parts=parts,
            device=device,
        )

    @property
    def n_averaged(self) -> int:
        """Number of models in the average, at most ``k``."""
        return min(self._n_averaged, self.k)

    def _enter(self, weights: dict[str, Tensor]) -> None:
        slot = f"model_{self._n_averaged % self.k}"
        if self._parts[slot]:
            foreach._foreach_copy_(shards(self._parts[slot]), shards(weights))
        else:
            self._parts[slot] = {
                name: value.to(self._device or value.device, copy=True)
                for name, value in weights.items()
            }

    def _means(self) -> dict[str, Tensor]:
        first, *others = list(self._parts.values())[: self.n_averaged]
        means = self._wide_copy(first)
        for other in others:
            foreach._foreach_add_(shards(means), shards(other))
        foreach._foreach_div_(shards(means), float(self.n_averaged))
        return means
