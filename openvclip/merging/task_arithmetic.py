"""Task arithmetic: task vectors, which are the changes that fine-tuning makes, and their sums."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import (
    combined,
    contiguous_copy,
    difference,
    in_pieces,
    interpolable_entries,
    matched,
    scale_of,
    task_vector_of,
)
from openvclip.merging.methods import SCALE, Method
from openvclip.weights.averageable import require_addable
from openvclip.weights.finite import may_be_broken, require_same_infinities
from openvclip.weights.interpolation import Lambda
from openvclip.weights.names import canonical_model
from openvclip.weights.numerics import dtype_of_result
from openvclip.weights.relative import FineTuned


def task_vector(
    base: Mapping[str, Tensor],
    tuned: FineTuned,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the task vector ``tuned - base`` (Ilharco et al., ICLR 2023).

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model, with the same names and shapes.
        dtype: dtype of the result. Default: at least float32, because the small differences of
            half-precision weights lose digits if they are rounded to half precision again.

    Returns:
        New tensors on the devices of ``base``, for floating-point and complex entries only. Equal
        values give 0, also two equal infinities.

    Raises:
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    return task_vector_of(matched(base, [tuned], what_others="tuned"), dtype)


def apply_task_vectors(
    base: Mapping[str, Tensor],
    vectors: Sequence[Mapping[str, Tensor]],
    scale: Lambda | Sequence[Lambda] = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Return the sum of ``base`` and scaled task vectors (task arithmetic).

    .. math:: \theta = \theta_0 + \sum_t \lambda_t \tau_t

    Several vectors add their tasks to the model. A scale of ``-1`` removes a task. Scales between
    0 and 1 weigh the tasks. (Ilharco et al., "Editing models with task arithmetic", ICLR 2023.)

    Args:
        base: state dict of the original model.
        vectors: task vectors with the floating-point and complex entries of ``base``.
        scale: a number, or a function from the canonical name of an entry to its number. A
            sequence of numbers or functions gives one scale to each vector.
        dtype: dtype of the floating-point entries of the result. Default: the dtype of each entry
            of ``base``.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: there are no vectors, or the number of scales differs from that of the vectors.
        NonFiniteMergeError: ``base`` or a vector holds NaN, or a vector holds infinity.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    base_entries, extra_state = canonical_model(base, "base")
    states = matched(
        interpolable_entries(base_entries),
        vectors,
        "the floating-point entries of base",
        "vectors[{}]",
        vectors=True,
    )
    require_addable(base_entries, states[1:])
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(vectors)
    if len(scales) != len(vectors):
        raise MergeError(
            f"Got {len(scales)} scales for {len(vectors)} task vectors. Pass one scale for each "
            "vector, or one scale for all vectors."
        )

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        factors = [scale_of(one, name) for one in scales]
        result = torch.empty_like(entries[0], memory_format=torch.contiguous_format)
        for piece, first, *parts in in_pieces([result, *entries]):
            torch.add(first, parts[0], alpha=factors[0], out=piece)
            for part, factor in zip(parts[1:], factors[1:], strict=True):
                piece.add_(part, alpha=factor)
            if may_be_broken(piece):
                # The infinities of a mask are in the model, but not in its changes.
                require_same_infinities(name, [first], ["base, the original model"])
                no_change = torch.zeros_like(first)
                require_same_infinities(name, [no_change, *parts], states.names)
        return result

    changed = combined(list(states), combine, None)
    result = {
        name: changed[name].to(dtype_of_result(value.dtype, dtype))
        if name in changed
        else contiguous_copy(value)
        for name, value in base_entries.items()
    }
    return {**result, **copy.deepcopy(extra_state)}


def _task_arithmetic(
    base: Mapping[str, Tensor],
    models: Sequence[FineTuned],
    *,
    scale: Lambda = 1.0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return ``base`` plus the scaled changes of models, without a task vector in memory."""
    states = matched(base, models, what_others="models[{}]")

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        result, factor = contiguous_copy(start), scale_of(scale, name)
        for end in ends:
            result.add_(difference(end, start), alpha=factor)
        return result

    return combined(states, combine, dtype)


TASK_ARITHMETIC = Method(
    "task_arithmetic",
    "add the scaled changes; a scale of -1 removes a task",
    "Ilharco et al., ICLR 2023",
    _task_arithmetic,
    options=(SCALE,),
)
