"""Methods on task vectors, the differences that fine-tuning made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, difference, matched, own, require_share
from openvclip.weights.interpolation import Lambda, as_number
from openvclip.weights.lambdas import by_depth
from openvclip.weights.names import canonical_state
from openvclip.weights.numerics import is_interpolable


def task_vector(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The task vector ``tuned - base`` of Ilharco et al. (ICLR 2023).

    Args:
        base: state dict of the original model.
        tuned: state dict of the model that was fine-tuned from it: the same names and shapes.
        dtype: dtype of the result. By default at least float32, since the small differences of
            half-precision weights lose digits when they are rounded to half precision again.

    Returns:
        New tensors on the devices of ``base``, for floating-point and complex entries only:
        integer and boolean ones have no direction. Entries that are equal give 0, also infinite
        ones.

    Raises:
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    states = matched(base, [tuned], what_others="tuned")
    return combined(
        [_with_direction(states[0]), states[1]],
        lambda _, entries: difference(entries[1], entries[0]),
        dtype,
        narrow=False,
    )


def apply_task_vectors(
    base: Mapping[str, Tensor],
    vectors: Sequence[Mapping[str, Tensor]],
    scale: Lambda | Sequence[Lambda] = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Task arithmetic: :math:`\theta = \theta_0 + \sum_t \lambda_t \tau_t`.

    Ilharco et al., "Editing models with task arithmetic" (ICLR 2023): several vectors add their
    tasks, a negative scale (``-1``) takes one away, scales between 0 and 1 weigh them.

    Args:
        base: state dict of the original model.
        vectors: task vectors, with the floating-point entries of ``base``.
        scale: a number, or a function from an entry's plain name to its number; a sequence of
            these gives each vector its own.
        dtype: dtype of the floating-point entries of the result; by default that of ``base``.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: there are no vectors, or not as many scales as vectors.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    whole = canonical_state(base, "base")
    states = matched(_with_direction(whole), vectors, "base's floats", "vectors[{}]")
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(vectors)
    if len(scales) != len(vectors):
        raise MergeError(f"Got {len(scales)} scales for {len(vectors)} task vectors.")

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        result = own(entries[0])
        for vector, one in zip(entries[1:], scales, strict=True):
            result.add_(vector, alpha=_number(one, name))
        return result

    kept = {name: dtype or value.dtype for name, value in states[0].items()}
    changed = combined(states, combine, None)
    return {
        name: changed[name].to(kept[name]) if name in kept else own(value)
        for name, value in whole.items()
    }


def ties(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    density: float = 0.2,
    scale: Lambda = 1.0,
    trim: Literal["tensor", "model"] = "tensor",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""TIES-Merging: trim, elect signs, and take the mean of those that agree.

    Yadav et al., "TIES-Merging: Resolving interference when merging models" (NeurIPS 2023). Of
    each task vector :math:`\tau_t` only the largest values are kept; the sign of each weight's
    change is that of the sum over the models, :math:`\text{sgn}(\sum_t \hat\tau_t)`; and the
    change is the mean of the values with that sign, times ``scale``. Zeros have no vote and do
    not count in the mean. A weight on which the models balance exactly stays the original's.

    Args:
        base: state dict of the original model.
        tuned: state dicts of models that were fine-tuned from it.
        density: share of the values of a task vector that are kept (the paper's k is 20 %), in
            [0, 1]: ``int(density * n)`` of n and at least one, unless it is 0. Values as large as
            the smallest that is kept are kept too.
        scale: the paper's lambda: a number, or a function from an entry's plain name to it.
        trim: what the share is of: ``"tensor"`` keeps the largest of each tensor, as mergekit
            does, and looks at one entry at a time; ``"model"`` keeps the largest of all tensors
            together, as the paper's code does.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries. Fine-tuned
        weights that are not finite are kept by the trimming and may not survive the mean.

    Raises:
        MergeError: there are no models, or a setting is out of range.
        LambdaError: a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    require_share(density, "density", one=True)
    if trim not in ("tensor", "model"):
        raise MergeError(f"trim={trim!r}: expected 'tensor' or 'model'.")
    states = matched(base, tuned)
    least = _least_of_models(states, density) if trim == "model" else None

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        deltas = [difference(end, entries[0]) for end in entries[1:]]
        bounds = least or [_least_kept([delta], density) for delta in deltas]
        for delta, bound in zip(deltas, bounds, strict=True):
            delta.masked_fill_(delta.abs() < bound, 0.0)
        return _disjoint_mean(deltas).mul_(_number(scale, name)).add_(entries[0])

    return combined(states, combine, dtype)


def _disjoint_mean(deltas: list[Tensor]) -> Tensor:
    elected = torch.zeros_like(deltas[0])
    for delta in deltas:
        elected += delta
    elected.sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas:
        agrees = delta * elected > 0
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total.div_(count.clamp_(min=1.0))


def _least_of_models(states: list[dict[str, Tensor]], density: float) -> list[float]:
    """For each fine-tuned model the smallest change that is kept, of all its entries together."""
    base, *ends = [_with_direction(state) for state in states]
    least = []
    for end in ends:
        vector = task_vector(base, end)
        flat = [torch.view_as_real(v) if v.is_complex() else v for v in vector.values()]
        least.append(_least_kept(flat, density))
    return least


def _least_kept(deltas: list[Tensor], density: float) -> float:
    """The smallest magnitude among the share ``density`` of largest ones."""
    sizes = torch.cat([delta.reshape(-1).abs().to(deltas[0].device) for delta in deltas])
    count = sizes.numel()
    if density == 0.0 or count == 0:
        return math.inf
    kept = max(1, int(density * count))
    return float(sizes.kthvalue(count - kept + 1).values) if kept < count else 0.0


def dare(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    drop: float = 0.9,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""DARE: drop changes at random and rescale those that stay.

    Yu et al., "Language models are super Mario: Absorbing abilities from homologous models as a
    free lunch" (ICML 2024): with :math:`m \sim \text{Bernoulli}(p)`, one draw for each weight,

    .. math:: \hat\theta = \theta_0 + \frac{(1 - m) \odot (\theta - \theta_0)}{1 - p}

    whose expectation is the fine-tuned model. The paper puts it before other methods: give each
    model a seed of its own and merge the results, with :func:`ties` (``density=1``), with
    :func:`average` or as task vectors.

    Args:
        base: state dict of the original model.
        tuned: state dict of the model that was fine-tuned from it.
        drop: probability p of dropping a change, in [0, 1). Dropped weights are the original's.
        seed: what is dropped depends on this, the entry's plain name and its shape alone: not on
            the order of entries, other entries, the device or the global random state.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of both models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries. The two
        parts of a complex entry are dropped by themselves.

    Raises:
        MergeError: ``drop`` is out of range.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    require_share(drop, "drop", one=False)

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, end = entries
        delta = difference(end, start).div_(1.0 - drop)
        uniform = torch.rand(start.shape, generator=_generator(seed, name))
        return start + delta.masked_fill_((uniform < drop).to(start.device), 0.0)

    return combined(matched(base, [tuned], what_others="tuned"), combine, dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def lines(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    alpha: float,
    beta: float,
    blocks: int | Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""LiNeS: scale the change of each block by its depth.

    Wang et al., "LiNeS: Post-training layer scaling prevents forgetting and enhances model
    merging" (ICLR 2025): the task vector of block :math:`\ell` of :math:`L` is scaled by

    .. math:: \lambda^{(\ell)} = \alpha + \beta \frac{\ell - 1}{L - 1}

    and that of everything outside the blocks by :math:`\alpha`, as in the authors' code. For one
    fine-tuned model they take :math:`\beta = 1 - \alpha`, so that the last block is kept whole;
    of several models the task vectors are added up.

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model, or a list of several.
        alpha: scale of the first block.
        beta: what the last block's scale is greater by.
        blocks: number of blocks, or names to count them in, as in :func:`by_depth`; by default
            the names of ``base``. Give it where ``base`` is only a part of a model.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: there are no fine-tuned models.
        LambdaError: there are no blocks, or a scale is not a finite number.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    states = matched(base, tuned if isinstance(tuned, Sequence) else [tuned])
    scale = by_depth(alpha, alpha + beta, states[0] if blocks is None else blocks)

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        share, result = _number(scale, name), own(start)
        for end in ends:
            result.add_(difference(end, start), alpha=share)
        return result

    return combined(states, combine, dtype)


def _with_direction(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if is_interpolable(value)}


def _number(scale: Lambda, name: str) -> float:
    if callable(scale):
        return as_number(scale(name), f"scale({name!r})")
    return as_number(scale, "scale")
