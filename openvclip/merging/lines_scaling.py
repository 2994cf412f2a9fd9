"""LiNeS: scale the changes of each block of a transformer by the depth of the block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from openvclip.merging.entries import combined, contiguous_copy, difference, matched, scale_of
from openvclip.merging.methods import Method, Option
from openvclip.weights.lambdas import by_depth
from openvclip.weights.relative import FineTuned


def lines(
    base: Mapping[str, Tensor],
    tuned: FineTuned | Sequence[FineTuned],
    *,
    alpha: float,
    beta: float,
    blocks: int | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Return ``base`` plus the changes of fine-tuned models, scaled by the depth of each block.

    Wang et al., "LiNeS: Post-training layer scaling prevents forgetting and enhances model
    merging" (ICLR 2025), scale the task vector of block :math:`\ell` of :math:`L` by

    .. math:: \lambda^{(\ell)} = \alpha + \beta \frac{\ell - 1}{L - 1}

    Entries outside the blocks are scaled by :math:`\alpha`, as in the authors' code. For one
    fine-tuned model the authors use :math:`\beta = 1 - \alpha`, which keeps the whole change of the
    last block. The task vectors of several models are added.

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model, or a list of several state dicts.
        alpha: scale of the first block.
        beta: difference between the scales of the last and the first block.
        blocks: number of blocks, or names of entries in which the blocks are counted, as in
            :func:`by_depth`. Default: the names of ``base``. If ``base`` is only a part of a model,
            pass ``blocks``.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: there are no fine-tuned models.
        LambdaError: there are no blocks, or a scale is not a finite number.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    states = matched(base, tuned if isinstance(tuned, Sequence) else [tuned])
    depth_scale = by_depth(alpha, alpha + beta, states[0] if blocks is None else blocks)

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        scale, result = scale_of(depth_scale, name), contiguous_copy(start)
        for end in ends:
            result.add_(difference(end, start), alpha=scale)
        return result

    return combined(states, combine, dtype)


LINES = Method(
    "lines",
    "add the changes, scaled by the depth of the block",
    "Wang et al., ICLR 2025",
    lines,
    options=(
        Option("alpha", "scale of the first block", required=True, example=0.3),
        Option(
            "beta",
            "difference between the scales of the last and the first block",
            required=True,
            example=0.7,
        ),
        Option("blocks", "number of blocks (default: counted in the names)", int, example=2),
    ),
    names="blocks",
)
