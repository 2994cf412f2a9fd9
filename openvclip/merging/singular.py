"""Singular directions of the change of a matrix, for the merge methods that work on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openvclip.errors import MergeError

_SMALLEST = 1e-6  # singular values below this share of the largest one count as zero
_Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Directions:
    """Singular triplets of a matrix, in float64, the largest singular value first.

    Attributes:
        left: left singular vectors, ``[rows, count]``.
        values: singular values, ``[count]``. None is zero.
        right: right singular vectors, ``[count, columns]``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Directions:
        """Return the ``count`` directions of the largest singular values, or all."""
        return Directions(self.left[:, :count], self.values[:count], self.right[:count])

    def matrix(self) -> Tensor:
        """Return the matrix with these singular triplets."""
        return (self.left * self.values) @ self.right


def side_by_side(parts: Sequence[Directions]) -> Directions:
    """Return the directions of several matrices as one object. They are not orthogonal."""
    return Directions(
        torch.cat([part.left for part in parts], dim=1),
        torch.cat([part.values for part in parts]),
        torch.cat([part.right for part in parts]),
    )


def directions(matrix: Tensor, name: str, floor: float = 0.0) -> Directions:
    """Return the singular triplets of a matrix whose singular values are not zero.

    A singular value counts as zero if it is at most ``floor`` or at most a millionth of the
    largest one. Its singular vectors are then only rounding errors. A matrix of zeros has no
    directions.

    The computation runs in float64. For a float32 matrix it uses the eigenvectors of
    ``matrix @ matrix.T``, whose products are exact in float64. This is more accurate than a
    singular value decomposition in float32, and takes less time.

    Args:
        matrix: matrix in float32 or float64, without NaN and infinity.
        name: name of the entry, for the error text.
        floor: largest singular value that counts as zero.

    Raises:
        MergeError: the decomposition did not converge.
    """
    left, values, right = _decomposed(matrix, name)
    count = int((values > max(floor, _SMALLEST * float(values[:1].sum()))).sum())
    return Directions(left, values, right).first(count)


def orthogonalised(vectors: Tensor, name: str) -> Tensor:
    """Return the matrix with orthonormal columns that is nearest to ``vectors``.

    With the singular value decomposition ``vectors = A B C'``, this is ``A C'``. If columns of
    ``vectors`` are linearly dependent, the nearest matrix is not unique. The smallest one is then
    returned: it leaves out the singular vectors whose singular values are zero.

    Args:
        vectors: matrix in float64, ``[rows, count]`` with ``count <= rows``.
        name: name of the entry, for the error text.

    Raises:
        MergeError: the decomposition did not converge.
    """
    parts = directions(vectors, name)
    return parts.left @ parts.right


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor of two or more dimensions as a matrix ``[rows, rest]``."""
    return tensor.reshape(tensor.shape[0], -1)


def rounding_floor(matrix: Tensor, dtypes: Iterable[torch.dtype]) -> float:
    """Return the spectral norm that the rounding errors of the values of a matrix have, at most.

    Args:
        matrix: the matrix.
        dtypes: dtypes in which models store the matrix. The least accurate one counts. Dtypes of
            8 bits do not count: their errors are as large as the changes of a fine-tune, and no
            direction would be left.
    """
    rows, columns = matrix.shape
    rms = float(matrix.norm()) / math.sqrt(max(1, matrix.numel()))
    eps = max(
        torch.finfo(dtype).eps for dtype in (matrix.dtype, *(d for d in dtypes if d.itemsize > 1))
    )
    return eps * rms * (math.sqrt(rows) + math.sqrt(columns))


def _decomposed(matrix: Tensor, name: str) -> _Parts:
    wide = matrix.double()
    ways: list[Callable[[Tensor], _Parts]] = [_by_eigenvectors, _by_svd]
    if matrix.dtype == torch.float64:
        ways.reverse()  # its products are not exact in float64
    errors = []
    for way in ways:
        try:
            return way(wide)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            errors.append(error)
    raise MergeError(
        f"{name}: the singular values of the change of shape {list(matrix.shape)} can't be "
        f"computed; two algorithms did not converge ({errors[0]}). Leave out the model with the "
        "largest change of this entry."
    ) from errors[-1]


def _by_svd(matrix: Tensor) -> _Parts:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _by_eigenvectors(matrix: Tensor) -> _Parts:
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _by_eigenvectors(matrix.T)
        return right.T, values, left.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    left = vectors.flip(1)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    # Directions with a singular value of zero are left out by the caller.
    right = (left.T @ matrix) / values.clamp(min=torch.finfo(values.dtype).tiny).unsqueeze(1)
    return left, values, right
