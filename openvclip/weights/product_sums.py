"""Sums of changes of low rank: as joined factors, recompressed factors, or a dense tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openvclip.weights.low_rank import LowRank


class ProductSum:
    """A weighted sum of changes of one weight, as factors or as a dense tensor.

    The factors of all changes are joined. If they would take more memory than the dense sum, the
    sum becomes dense. With ``max_rank``, the factors are recompressed instead.

    Args:
        max_rank: the largest rank that is kept. ``None``: the sum is exact.
    """

    def __init__(self, max_rank: int | None) -> None:
        self.max_rank = max_rank
        self.factors: LowRank | None = None
        self.dense: Tensor | None = None
        self.lost = 0.0

    def scale(self, factor: float) -> None:
        """Multiply the sum by a number."""
        self.lost *= abs(factor)
        if self.dense is not None:
            self.dense.mul_(factor)
        elif self.factors is not None:
            self.factors = self.factors.scaled(factor)

    def add(self, update: LowRank, weight: float) -> None:
        """Add a change, times a number."""
        if self.dense is not None:
            rows, columns = self.dense.shape[0], self.dense.numel() // self.dense.shape[0]
            wide = update.to(self.dense.device, self.dense.dtype)
            self.dense.view(rows, columns).addmm_(wide.up, wide.down, alpha=weight * update.scale)
            return
        if self.factors is None:  # a copy, because the factors are those of a model in training
            dtype = torch.promote_types(torch.float32, update.up.dtype)
            up = update.up.to(dtype=dtype, copy=True)
            down = update.down.to(dtype=dtype, copy=True)
            self._keep(LowRank(up, down, update.scale * weight, update.shape))
        else:
            device = self.factors.up.device
            self._keep(LowRank.total([self.factors, update.to(device)], [1.0, weight]))

    @property
    def nbytes(self) -> int:
        """Memory of the sum in bytes."""
        part = self.factors if self.dense is None else self.dense
        return 0 if part is None else part.nbytes

    def _keep(self, total: LowRank) -> None:
        if self.max_rank is not None and self.max_rank < _full_rank(total):
            if total.rank > 2 * self.max_rank:  # not at each update
                total, lost = total.compressed(self.max_rank)
                self.lost += lost
        elif total.rank * (total.up.shape[0] + total.down.shape[1]) >= math.prod(total.shape):
            self.dense, self.factors = total.product(), None
            return
        self.factors = total

    def value(self, scale: float) -> tuple[LowRank, float]:
        """Return the sum times a number, and a bound of the norm of what was left out."""
        if self.dense is not None:
            return _factored(self.dense).scaled(scale), 0.0
        assert self.factors is not None
        total, lost = self.factors, 0.0
        if self.max_rank is not None and self.max_rank < _full_rank(total):
            total, lost = total.compressed(self.max_rank)
        return total.scaled(scale), (self.lost + lost) * abs(scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the sum as tensors and numbers. The tensors are not copied."""
        factors = self.factors
        return {
            "dense": self.dense,
            "up": None if factors is None else factors.up,
            "down": None if factors is None else factors.down,
            "scale": 1.0 if factors is None else factors.scale,
            "lost": self.lost,
        }

    def load_state_dict(self, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Restore a sum from :meth:`state_dict`. The tensors are copied.

        Args:
            state: from :meth:`state_dict`.
            shape: shape of the weight.

        Raises:
            ValueError: the sum has another shape.
        """
        self.lost = float(state["lost"])
        self.dense = None if state["dense"] is None else state["dense"].clone()
        self.factors = None
        if self.dense is not None and tuple(self.dense.shape) != shape:
            raise ValueError(f"shape {list(self.dense.shape)}, expected {list(shape)}")
        if self.dense is None:
            up, down = state["up"].clone(), state["down"].clone()
            self.factors = LowRank(up, down, float(state["scale"]), shape)


def _full_rank(update: LowRank) -> int:
    return min(update.up.shape[0], update.down.shape[1])


def _factored(dense: Tensor) -> LowRank:
    """Return a dense change as exact factors: itself, and an identity on the smaller side."""
    flat = dense.reshape(dense.shape[0], -1)
    rows, columns = flat.shape
    eye = torch.eye(min(rows, columns), dtype=flat.dtype, device=flat.device)
    up, down = (eye, flat) if rows < columns else (flat, eye)
    return LowRank(up.clone(), down.clone(), 1.0, tuple(dense.shape))
