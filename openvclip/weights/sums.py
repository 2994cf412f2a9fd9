"""The base class of averages that keep a weighted sum of the models."""

from __future__ import annotations

import torch
from torch import nn

from openvclip.weights.moves import ADD, COPY, Blend, Move
from openvclip.weights.numerics import foreach
from openvclip.weights.tracker import Entries, WeightTracker, shards

_BLOCK = 128  # models in one partial sum


class SumTracker(WeightTracker):
    """Base class of averages that keep a weighted sum of the models, and divide it when it is read.

    Blocks of 128 models are summed first. The block sums are then added to a total. This keeps the
    rounding error of long runs small. A subclass can override :meth:`_weight` and
    :meth:`_total_weight`.

    Args:
        model: the model whose weights are passed to :meth:`update`.
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        dtype: dtype of the sums, at least float32.
        check_finite: whether to refuse weights that hold NaN or infinity.
        device: device of the sums. Default: the device of each parameter.
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
        super().__init__(
            model, start=start, every=every, dtype=dtype, check_finite=check_finite, device=device
        )
        self._sums: Entries = {}  # of the current block of models
        self._earlier: Entries = {}  # of all earlier blocks

    def _weight(self) -> tuple[float, float]:
        """Return the weight of the model that enters, and the factor of the sums before that."""
        return 1.0, 1.0

    def _total_weight(self) -> float:
        """Return the sum of the weights of all models."""
        return float(self._n_averaged)

    def _add(self, weights: Entries) -> None:
        weight, _ = self._weight()
        assert weight == 1.0, "the first model has the weight 1"
        self._sums.update(self._wide_copy(weights))

    def _moves(self, weights: Entries, look: bool) -> list[Move] | None:
        if self._n_averaged == 0:
            return None
        weight, factor = self._weight()
        moves = []
        if factor != 1.0:
            scale = Blend("scale", factor)
            moves += [self._move(s, s, scale) for s in (self._sums, self._earlier) if s]
        if self._n_averaged % _BLOCK == 0:
            moves += self._end_block()
        look = look and not moves  # only a single move can be taken back
        return [*moves, self._move(self._sums, weights, Blend("add", weight), look)]

    def _end_block(self) -> list[Move]:
        if not self._earlier:
            zeros = {name: torch.zeros_like(value) for name, value in self._sums.items()}
            self._earlier.update(zeros)
        sums = shards(self._sums)
        nothing = [value.new_zeros(()).expand_as(value) for value in sums]
        return [
            self._move(self._earlier, self._sums, ADD),
            Move(sums, nothing, COPY, look=False),
        ]

    def _mean(self) -> Entries:
        mean = {name: value.clone() for name, value in self._sums.items()}
        if self._earlier:
            foreach._foreach_add_(shards(mean), shards(self._earlier))
        foreach._foreach_div_(shards(mean), self._total_weight())
        return mean

    def _tensors(self) -> dict[str, Entries]:
        return {"sums": self._sums, "earlier": self._earlier}
