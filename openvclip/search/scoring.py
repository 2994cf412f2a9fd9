"""The similarity of queries to all windows of an index.

Two steps give exact scores at the speed of the memory. :func:`approximate_scores` reads all vectors
once, in half precision if the processor is fast at it, and says how far its results can be off.
:func:`exact_scores` computes the scores of the few windows that matter in float64.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openvclip.errors import SearchError

__all__ = ["ApproximateScores", "VectorBlock", "approximate_scores", "exact_scores", "unit_vectors"]

Floats: TypeAlias = NDArray[np.float32]

_HALF_ROUNDING = 2.0**-11  # the largest relative error of a number that is rounded to float16
_NORM = 1.001  # the largest length of a unit vector that was rounded to float16
_GROUP_BYTES = 64 << 20  # of the scores in half precision that are in memory at a time
_GROUP_VECTORS = 16  # queries of one product; the time grows slowly up to this number
_CACHED_NUMBERS = 524_288  # numbers of a block in float32, which stay in the cache of a core
_EXACT_ROWS = 4096  # rows that are in memory in float64 at a time


class VectorBlock(Protocol):
    """Some vectors of an index: the file of a shard, or an array in memory."""

    @property
    def first_row(self) -> int:
        """The row of the first vector, counted over all blocks."""

    @property
    def vectors(self) -> Any:
        """Vectors of unit length, float16 ``[n, D]``: an array of NumPy or a tensor on the CPU."""

    @property
    def live(self) -> NDArray[np.bool_] | None:
        """Bool ``[n]``, false for rows that no query finds; ``None`` if there are none."""


class ApproximateScores(NamedTuple):
    """Scores of all rows for some vectors.

    Attributes:
        values: float32 ``[V, rows]``; ``-inf`` for rows that are not live.
        error: float64 ``[V]``, the largest distance of a value from the exact score.
    """

    values: Floats
    error: NDArray[np.float64]


def unit_vectors(vectors: Any, width: int | None = None) -> Floats:
    """Return query vectors as float32 ``[V, D]`` with rows of unit length.

    Args:
        vectors: ``[D]`` or ``[V, D]``: an array, a tensor, or lists of numbers.
        width: D of the index. Default: any.

    Raises:
        SearchError: the vectors have another shape, or a vector is zero or not finite.
    """
    if isinstance(vectors, Tensor):
        vectors = vectors.detach().cpu().double().numpy()
    try:
        rows = np.atleast_2d(np.asarray(vectors, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise SearchError(f"A query vector can't be read as numbers ({error}).") from error
    if rows.ndim != 2 or rows.shape[1] == 0 or width not in (None, rows.shape[1]):
        raise SearchError(
            f"A query vector has the shape {list(np.shape(vectors))}; expected "
            f"[{'D' if width is None else width}], the length of the vectors of the index."
        )
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise SearchError(
            "A query vector is zero, NaN or infinite; expected the feature of a text, an image or "
            "a clip."
        )
    unit: Floats = (rows / lengths).astype(np.float32)
    return unit


def approximate_scores(
    blocks: Sequence[VectorBlock], queries: Sequence[Floats]
) -> Iterator[ApproximateScores]:
    """Compute the scores of all rows, query by query, in float16 or float32.

    Memory holds the scores of the queries of one pass over the vectors: 2 bytes for each row and
    vector, at most 64 MB or the scores of one query, and the result.

    Args:
        blocks: the vectors of the index.
        queries: for each query its vectors, float32 ``[V, D]`` with rows of unit length: the query
            itself, and its negative texts.

    Yields:
        The :class:`ApproximateScores` of each query.

    Raises:
        SearchError: the length of a vector is not that of the vectors of the index.
    """
    total = sum(len(block.vectors) for block in blocks)
    for group in _groups(queries, total):
        vectors = np.concatenate(group)
        values = np.empty((len(vectors), total), dtype=np.float32)
        error = np.full(len(vectors), vectors.shape[1] * 2.0**-23)
        for block in blocks:
            _require_width(block, vectors)
            part = values[:, block.first_row : block.first_row + len(block.vectors)]
            products = torch.from_numpy(part)
            rows = _tensor(block.vectors)
            if rows.dtype == torch.float16 and _is_half_fast(len(vectors) > 1):
                error = np.maximum(error, _half_products(rows, vectors, products))
            else:
                _float_products(rows, torch.from_numpy(vectors), products)
            if block.live is not None:
                part[:, ~block.live] = -np.inf
        begin = 0
        for query in group:
            end = begin + len(query)
            yield ApproximateScores(values[begin:end], error[begin:end])
            begin = end


def exact_scores(
    blocks: Sequence[VectorBlock], rows: NDArray[np.int64], vectors: Floats
) -> NDArray[np.float64]:
    """Compute the scores of some rows in float64.

    A score is the dot product of a stored vector and a query vector, at most 1 and at least -1. It
    does not depend on the processor or on the other rows, so equal vectors have equal scores.

    Args:
        blocks: the vectors of the index.
        rows: the rows, counted over all blocks.
        vectors: query vectors of unit length, float32 ``[V, D]``.

    Returns:
        float64 ``[V, len(rows)]``.
    """
    scores = np.empty((len(vectors), len(rows)), dtype=np.float64)
    for block in blocks:
        inside = (rows >= block.first_row) & (rows < block.first_row + len(block.vectors))
        places = np.flatnonzero(inside)
        stored = block.vectors
        if isinstance(stored, Tensor):
            stored = stored.numpy()
        for begin in range(0, len(places), _EXACT_ROWS):
            chosen = places[begin : begin + _EXACT_ROWS]
            part = stored[rows[chosen] - block.first_row].astype(np.float64)
            for place, vector in enumerate(vectors.astype(np.float64)):
                scores[place, chosen] = (part * vector).sum(axis=1)
    return scores.clip(-1.0, 1.0)


def _groups(queries: Sequence[Floats], rows: int) -> Iterator[list[Floats]]:
    """Divide queries into groups whose scores are computed together."""
    limit = min(_GROUP_VECTORS, max(1, _GROUP_BYTES // max(2 * rows, 1)))
    group: list[Floats] = []
    for query in queries:
        if group and sum(map(len, group)) + len(query) > limit:
            yield group
            group = []
        group.append(query)
    if group:
        yield group


def _require_width(block: VectorBlock, vectors: Floats) -> None:
    width = block.vectors.shape[1]
    if width != vectors.shape[1]:
        raise SearchError(
            f"The vectors of the index have {width} numbers and the query has {vectors.shape[1]}; "
            "expected a query that the model of the index encoded."
        )


def _tensor(vectors: Any) -> Tensor:
    """Return an array as a tensor that shares its memory, also if it is read-only."""
    if isinstance(vectors, Tensor):
        return vectors
    if vectors.flags.writeable or not vectors.flags.c_contiguous or not vectors.size:
        return torch.from_numpy(vectors if vectors.flags.writeable else vectors.copy())
    # torch.from_numpy warns about read-only memory, such as that of a file. Nothing is written.
    memory = (ctypes.c_char * vectors.nbytes).from_address(vectors.ctypes.data)
    memory._owner = vectors
    dtype = torch.from_numpy(np.empty(0, vectors.dtype)).dtype
    return torch.frombuffer(memory, dtype=dtype).view(vectors.shape)


def _half_products(rows: Tensor, vectors: Floats, products: Tensor) -> NDArray[np.float64]:
    """Write the products ``[V, n]`` in half precision; return the error of each vector."""
    rounded = torch.from_numpy(vectors).half()
    products.copy_(rounded @ rows.T)
    off = np.linalg.norm(rounded.double().numpy() - vectors, axis=1)
    # Of the rounded query, of the rounded result, and of the sum in float32.
    return np.asarray(_NORM * (off + _HALF_ROUNDING) + vectors.shape[1] * 2.0**-23)


def _float_products(rows: Tensor, vectors: Tensor, products: Tensor) -> None:
    """Write the products ``[V, n]`` in float32, in blocks that stay in the cache."""
    size = max(1, _CACHED_NUMBERS // rows.shape[1])
    buffer = torch.empty(size, rows.shape[1])
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        block = buffer[: len(part)].copy_(part)
        products[:, begin : begin + size] = vectors @ block.T


@lru_cache(maxsize=2)
def _is_half_fast(several: bool) -> bool:
    """Return whether this processor multiplies vectors in half precision as fast as it reads them.

    Args:
        several: whether there are several query vectors. Without instructions for half precision,
            each of them takes the time of one pass. Blocks in float32 then take one pass for all.
    """
    if several:
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
        return supported is not None and bool(supported())
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    # Every processor with AVX2 converts half precision in hardware.
    return not is_x86 or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
