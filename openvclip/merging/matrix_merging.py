"""Merges of task vectors in which each matrix is merged by its singular values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, contiguous_copy, difference, matched, scale_of
from openvclip.merging.methods import SCALE, Method, Option
from openvclip.merging.singular import (
    Directions,
    directions,
    orthogonalised,
    rounding_floor,
    side_by_side,
)
from openvclip.weights.interpolation import Lambda
from openvclip.weights.relative import FineTuned

MergeMatrices = Callable[[str, list[Tensor], float], Tensor]
"""A function from the name of an entry, the changes of its matrix and the largest singular value
that counts as zero, to the merged change in float64."""


def merged_by_matrices(
    base: Mapping[str, Tensor],
    models: Sequence[FineTuned],
    merge_matrices: MergeMatrices,
    scale: Lambda,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Return ``base`` plus the scaled merge of the changes: matrices by a function, others by mean.

    Args:
        base: state dict of the original model.
        models: fine-tuned models.
        merge_matrices: merges the changes of one matrix.
        scale: a number, or a function from the canonical name of an entry to its number.
        dtype: dtype of the floating-point entries of the result.

    Raises:
        MergeError: there are no models.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
    """
    states = matched(base, models, what_others="models[{}]")

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        factor = scale_of(scale, name)
        deltas = [difference(end, start) for end in ends] if factor else []
        if not any(bool(delta.any()) for delta in deltas):
            return contiguous_copy(start)
        if is_merged_matrix(name, states[0][name]):
            # A complex matrix counts as a matrix of pairs.
            flat = [delta.reshape(len(delta), -1) for delta in deltas]
            floor = rounding_floor(
                start.reshape(flat[0].shape).nan_to_num(0.0, 0.0, 0.0),
                [state[name].dtype for state in states[1:]],
            )
            change = merge_matrices(name, flat, floor).reshape(start.shape)
        else:
            change = torch.stack(deltas).mean(dim=0) if len(deltas) > 1 else deltas[0]
        return start + (factor * change).to(start.dtype)

    return combined(states, combine, dtype)


def is_merged_matrix(name: str, entry: Tensor) -> bool:
    """Return whether an entry is merged by its singular values.

    These are the entries of two dimensions, as in the released code of the methods, which leaves
    out CLIP's ``text_projection`` (also ``text_projection.weight``). Convolutions are left out too.
    """
    return entry.dim() == 2 and "text_projection" not in name


def tsv_merge(
    base: Mapping[str, Tensor],
    models: Sequence[FineTuned],
    *,
    scale: Lambda = 1.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Merge models by the leading singular vectors of their changes, made orthogonal (TSV-M).

    Gargiulo et al., "Task singular vectors: Reducing task interference in model merging" (CVPR
    2025). Each change of a matrix is :math:`D_i = U_i S_i V_i^T`. Of its :math:`r` singular
    triplets, the first :math:`\lfloor r / N \rfloor` are kept for each of :math:`N` models. The
    kept triplets of all models stand side by side in :math:`U`, :math:`S` and :math:`V`. Models
    whose vectors are not orthogonal to each other disturb each other, so :math:`U` and :math:`V`
    are replaced by the nearest orthogonal matrices :math:`U_\perp` and :math:`V_\perp`:

    .. math:: W = W_0 + \text{scale} \cdot U_\perp S V_\perp^T

    Entries of two dimensions are matrices, except names with ``text_projection``. Convolutions and
    all other entries get the mean of the changes, times ``scale``. This is what the authors' code
    does. For one model, the result is the scaled change of this model.

    Singular values that rounding alone gives count as zero, and their vectors are not used. So a
    LoRA fine-tune of rank 8 has 8 directions in a matrix, also if the models are stored in half
    precision.

    Args:
        base: state dict of the original model.
        models: state dicts of one or more models that were fine-tuned from the original model.
        scale: a number, or a function from the canonical name of an entry to its number.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries. An entry
        with scale 0, or that no model changed, equals that of ``base`` bitwise.

    Raises:
        MergeError: there are no models, a matrix has fewer rows or columns than there are models,
            or its decomposition did not converge.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    return merged_by_matrices(base, models, _tsv, scale, dtype)


def iso_c(
    base: Mapping[str, Tensor],
    models: Sequence[FineTuned],
    *,
    scale: Lambda = 1.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Merge models by the sum of their changes, with equal singular values (Iso-C).

    Marczak et al., "No task left behind: Isotropic model merging with common and task-specific
    subspaces" (ICML 2025). The sum of the changes of a matrix is :math:`\sum_i D_i = U S V^T`. All
    singular values are replaced by their mean :math:`\bar s`, so that no direction dominates:

    .. math:: W = W_0 + \text{scale} \cdot \bar s \, U V^T

    Which entries are matrices, and what all other entries get, is as in :func:`tsv_merge`.
    Singular values that rounding alone gives count as zero: they stay zero and are not part of the
    mean.

    Args:
        base: state dict of the original model.
        models: state dicts of one or more models that were fine-tuned from the original model.
        scale: a number, or a function from the canonical name of an entry to its number.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict, as in :func:`tsv_merge`.

    Raises:
        MergeError: there are no models, or the decomposition of a matrix did not converge.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """

    def merge_matrices(name: str, deltas: list[Tensor], floor: float) -> Tensor:
        return _isotropic(directions(_sum(deltas), name, floor))

    return merged_by_matrices(base, models, merge_matrices, scale, dtype)


def iso_cts(
    base: Mapping[str, Tensor],
    models: Sequence[FineTuned],
    *,
    scale: Lambda = 1.0,
    common: float = 0.8,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Merge models by common and own directions of their changes, with equal singular values.

    Iso-CTS of Marczak et al., "No task left behind: Isotropic model merging with common and
    task-specific subspaces" (ICML 2025). A matrix has :math:`r` directions. The leading singular
    vectors of the sum of the changes take about ``common * r`` of them. The rest is divided equally
    among the models: each model adds the leading singular vectors of
    :math:`D_i - U_c U_c^T D_i`, where :math:`U_c` are the common left singular vectors. All left
    vectors, and all right vectors, are then replaced by the nearest orthogonal matrix, and all
    singular values by their mean.

    The rest is rounded to a multiple of the number of models. If it has no direction for each
    model, or with ``common=1``, the result is that of :func:`iso_c`. So it is for one model.

    Which entries are matrices, and what all other entries get, is as in :func:`tsv_merge`.
    Singular values that rounding alone gives are treated as in :func:`iso_c`.

    Args:
        base: state dict of the original model.
        models: state dicts of one or more models that were fine-tuned from the original model.
        scale: a number, or a function from the canonical name of an entry to its number.
        common: share of the directions that the sum of the changes takes, in (0, 1].
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict, as in :func:`tsv_merge`.

    Raises:
        MergeError: ``common`` is out of range, there are no models, or the decomposition of a
            matrix did not converge.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    if not 0.0 < common <= 1.0:
        raise MergeError(f"common={common!r}: expected a share in (0, 1].")

    def merge_matrices(name: str, deltas: list[Tensor], floor: float) -> Tensor:
        own = _own_count(min(deltas[0].shape), len(deltas), common)
        shared = directions(_sum(deltas), name, floor).first(
            min(deltas[0].shape) - own * len(deltas)
        )
        if not own:
            return _isotropic(shared)
        parts = []
        for delta in deltas:
            wide = delta.double()
            rest = wide - shared.left @ (shared.left.T @ wide)
            # What the projection leaves of a change within the common space is rounding.
            noise = max(floor, 1e-6 * float(torch.linalg.matrix_norm(wide)))
            parts.append(directions(rest, name, noise).first(own))
        return _isotropic(_orthogonal([*parts, shared], name))

    return merged_by_matrices(base, models, merge_matrices, scale, dtype)


def _own_count(rank: int, models: int, common: float) -> int:
    """Return the number of directions of each model beside the common ones."""
    return min(round((rank - int(rank * common)) / models), rank // models)


def _tsv(name: str, deltas: list[Tensor], floor: float) -> Tensor:
    rank = min(deltas[0].shape)
    if rank < len(deltas):
        raise MergeError(
            f"{name} of shape {list(deltas[0].shape)} has {rank} singular values, which is fewer "
            f"than the {len(deltas)} models. tsv_merge keeps an equal number for each model. Merge "
            "fewer models, or use iso_c."
        )
    count = rank // len(deltas)
    parts = [directions(delta, name, floor).first(count) for delta in deltas]
    return _orthogonal(parts, name).matrix()


def _orthogonal(parts: list[Directions], name: str) -> Directions:
    """Return all directions with left and right vectors that are orthogonal to each other."""
    if len(parts) == 1:
        return parts[0]
    joined = side_by_side(parts)
    if not len(joined.values):
        return joined
    left = orthogonalised(joined.left, name)
    right = orthogonalised(joined.right.T, name).T
    return Directions(left, joined.values, right)


def _isotropic(parts: Directions) -> Tensor:
    mean = parts.values.sum() / max(1, len(parts.values))
    return mean * (parts.left @ parts.right)


def _sum(deltas: list[Tensor]) -> Tensor:
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    return total


TSV_MERGE = Method(
    "tsv_merge",
    "TSV-M: leading singular vectors, made orthogonal",
    "Gargiulo et al., CVPR 2025",
    tsv_merge,
    options=(SCALE,),
)

ISO_C = Method(
    "iso_c",
    "Iso-C: the sum of the changes, with equal singular values",
    "Marczak et al., ICML 2025",
    iso_c,
    options=(SCALE,),
)

ISO_CTS = Method(
    "iso_cts",
    "Iso-CTS: common and own directions, equal singular values",
    "Marczak et al., ICML 2025",
    iso_cts,
    options=(
        SCALE,
        Option("common", "share of the common directions, in (0, 1]", default=0.8, example=0.3),
    ),
)
