"""A change of low rank of one weight, as LoRA trains it: ``scale * up @ down``.

A sum of such changes is again a change of low rank: the factors are joined, and the ranks add up.
The singular value decomposition gives the closest change of a smaller rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openvclip.errors import MergeError, StateMismatchError, WeightTypeError, listed
from openvclip.weights.arguments import as_float, is_whole
from openvclip.weights.numerics import compute_dtype


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of low rank of one weight: ``scale * up @ down``.

    LoRA calls the factors ``B`` (``up``) and ``A`` (``down``). All results are exact up to rounding
    in the dtype of the factors, at least float32. Only :meth:`compressed` leaves something out.

    Attributes:
        up: the factor on the side of the outputs, ``[out, rank]``.
        down: the factor on the side of the inputs, ``[rank, inputs]``. The inputs of a convolution
            are its input channels times its kernel.
        scale: factor of the product. ``alpha / rank`` in most fine-tunes.
        shape: shape of the weight. ``shape[0]`` is ``out``, and the product of all other sizes is
            ``inputs``. Default: ``(out, inputs)``.

    Raises:
        WeightTypeError: a factor is not a matrix of floating-point numbers.
        StateMismatchError: the shapes of the factors and of the weight do not fit together.

    Example:
        >>> update = LowRank(torch.ones(3, 1), torch.ones(1, 2), scale=0.5)
        >>> update.product()[0]
        tensor([0.5000, 0.5000])
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, factor in (("up", self.up), ("down", self.down)):
            if not (isinstance(factor, Tensor) and factor.is_floating_point() and factor.ndim == 2):
                kind = tuple(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
                raise WeightTypeError(
                    f"{name}: expected a matrix of floating-point numbers, got {kind}."
                )
        if not math.isfinite(as_float(self.scale)):
            raise MergeError(f"scale={self.scale!r}: expected a finite number.")
        sizes = (self.up.shape[0], self.down.shape[1])
        object.__setattr__(self, "shape", tuple(self.shape) or sizes)
        expected = (self.shape[0], math.prod(self.shape[1:]))
        if self.up.shape[1] != self.down.shape[0] or sizes != expected:
            raise StateMismatchError(
                f"The factors {list(self.up.shape)} and {list(self.down.shape)} do not give a "
                f"weight of shape {list(self.shape)}: expected [{expected[0]}, rank] and "
                f"[rank, {expected[1]}]."
            )

    @property
    def rank(self) -> int:
        """The number of columns of ``up``, which bounds the rank of the product."""
        return self.up.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of both factors in bytes."""
        return self.up.nbytes + self.down.nbytes

    def scaled(self, factor: float) -> LowRank:
        """Return ``factor`` times this change, with the same factors."""
        return replace(self, scale=self.scale * factor)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        """Return this change with its factors on another device or in another dtype."""
        device = device or self.up.device
        return replace(self, up=self.up.to(device, dtype), down=self.down.to(device, dtype))

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return the change as a dense tensor in the shape of the weight, at least in float32."""
        up, down = _wide(self.up), _wide(self.down)
        return torch.mm(up, down).mul_(self.scale).reshape(self.shape)

    @torch.no_grad()
    def rows(self, start: int, end: int) -> Tensor:
        """Return the rows ``start`` to ``end`` of the change, ``[end - start, inputs]``."""
        return torch.mm(_wide(self.up[start:end]), _wide(self.down)).mul_(self.scale)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return ``weight`` plus this change, in the dtype of ``weight`` and rounded once.

        Raises:
            StateMismatchError: ``weight`` has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise StateMismatchError(
                f"The change has the shape {list(self.shape)}, but the weight has the shape "
                f"{list(weight.shape)}. Give the base model that the adapter was trained on."
            )
        change = self.to(weight.device).product()
        return change.add_(weight.detach().to(change.dtype)).to(weight.dtype)

    def norm(self) -> float:
        """Return the Frobenius norm of the change."""
        return float(torch.linalg.vector_norm(self._decomposed()[1]))

    @torch.no_grad()
    def compressed(self, rank: int) -> tuple[LowRank, float]:
        """Return the closest change of at most this rank, and the distance to it.

        The singular value decomposition of the product is computed from the factors, in float64 and
        without the product itself. The scale of the result is 1. Its factors have the dtype of
        these factors, at least float32.

        Args:
            rank: the largest rank of the result, at least 1.

        Returns:
            The change of lower rank, and the Frobenius norm of what was left out. The norm is 0 if
            the change had at most this rank.

        Raises:
            MergeError: ``rank`` is below 1.
        """
        update, lost, _ = self.compressed_with_norm(rank)
        return update, lost

    @torch.no_grad()
    def compressed_with_norm(self, rank: int) -> tuple[LowRank, float, float]:
        """Return the result of :meth:`compressed`, and the Frobenius norm of what was kept.

        One decomposition gives all three.

        Args:
            rank: see :meth:`compressed`.

        Raises:
            MergeError: ``rank`` is below 1.
        """
        if not is_whole(rank, 1):
            raise MergeError(f"rank={rank!r}: expected a whole number, at least 1.")
        if self.rank <= rank:
            return self, 0.0, self.norm()
        left, values, right = self._decomposed()
        root = values[:rank].sqrt()
        dtype = compute_dtype(torch.promote_types(self.up.dtype, self.down.dtype))
        kept = replace(
            self,
            up=(left[:, :rank] * root).to(dtype),
            down=(root[:, None] * right[:rank]).to(dtype),
            scale=1.0,
        )
        lost, norm = (float(torch.linalg.vector_norm(v)) for v in (values[rank:], values[:rank]))
        return kept, lost, norm

    @torch.no_grad()
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular value decomposition, whose size is the rank and not the weight."""
        # Some devices have no float64.
        wide = torch.float32 if self.up.device.type == "mps" else torch.float64
        left, left_small = torch.linalg.qr(self.up.to(wide))
        right, right_small = torch.linalg.qr(self.down.to(wide).mT)
        inner = torch.mm(left_small, right_small.mT) * self.scale
        u, values, v = torch.linalg.svd(inner, full_matrices=False)
        return torch.mm(left, u), values, torch.mm(v, right.mT)

    @staticmethod
    @torch.no_grad()
    def total(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
        """Return the weighted sum of several changes of one weight. The ranks add up.

        Args:
            updates: one or more changes of weights of one shape.
            weights: one number for each change. Default: 1 for each.

        Raises:
            MergeError: there are no changes, or the number of weights differs.
            StateMismatchError: the changes are for weights of different shapes.
        """
        weights = [1.0] * len(updates) if weights is None else weights
        if not updates or len(weights) != len(updates):
            raise MergeError(
                f"Got {len(updates)} changes and {len(weights)} weights; expected one weight for "
                "each change, and at least one change."
            )
        first = updates[0]
        shapes = {update.shape for update in updates}
        if len(shapes) > 1:
            raise StateMismatchError(f"The changes are for weights of the shapes {sorted(shapes)}.")
        if len(updates) == 1:
            return first.scaled(weights[0])
        dtype = compute_dtype(first.up.dtype)
        for update in updates[1:]:
            dtype = torch.promote_types(dtype, compute_dtype(update.up.dtype))
        device = first.up.device
        ups, downs = [], []
        for update, weight in zip(updates, weights, strict=True):
            ups.append(update.up.to(device, dtype) * (update.scale * weight))
            downs.append(update.down.to(device, dtype))
        return LowRank(torch.cat(ups, 1), torch.cat(downs), 1.0, first.shape)


def _wide(factor: Tensor) -> Tensor:
    return factor.to(compute_dtype(factor.dtype))


@dataclass(frozen=True)
class CompressionLoss:
    """What a compression to a lower rank left out.

    Attributes:
        lost: Frobenius norm of what was left out of each change.
        kept: Frobenius norm of each change after the compression.
    """

    lost: Mapping[str, float]
    kept: Mapping[str, float]

    @property
    def relative(self) -> float:
        """The norm of all that was left out, divided by the norm of all changes. 0 is exact."""
        lost, kept = math.hypot(*self.lost.values()), math.hypot(*self.kept.values())
        return lost / math.hypot(lost, kept) if lost else 0.0

    def __str__(self) -> str:
        worst = sorted(self.lost, key=lambda name: -self.lost[name])
        names = [f"{name} {self.lost[name]:.3g}" for name in worst if self.lost[name]]
        return f"{100 * self.relative:.3g} % of the change was left out" + (
            f" (largest: {listed(names)})" if names else ""
        )
