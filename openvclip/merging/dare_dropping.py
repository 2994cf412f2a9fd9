"""DARE: drop random changes of a fine-tuned model and rescale all other changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from openvclip.merging.entries import combined, difference, matched, require_share
from openvclip.merging.methods import Method, Option
from openvclip.weights.relative import FineTuned


def dare(
    base: Mapping[str, Tensor],
    tuned: FineTuned,
    *,
    drop: float = 0.9,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Return a fine-tuned model with random changes dropped and all other changes rescaled.

    Yu et al., "Language models are super Mario: Absorbing abilities from homologous models as a
    free lunch" (ICML 2024): with :math:`m \sim \text{Bernoulli}(p)`, one draw for each weight,

    .. math:: \hat\theta = \theta_0 + \frac{(1 - m) \odot (\theta - \theta_0)}{1 - p}

    The expectation is the fine-tuned model. The paper applies DARE before another merge method.
    Give a different seed to each model, and merge the results with :func:`ties` (``density=1``),
    with :func:`average` or as task vectors.

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model.
        drop: probability p of dropping a change, in [0, 1). A dropped weight is that of the
            original model.
        seed: seed of the draws. The draws of an entry depend only on the seed and on the canonical
            name and the shape of the entry. They do not depend on the order of the entries, on
            other entries, on the device or on the global random state.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of both models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries. The real and
        the imaginary part of a complex weight are dropped independently.

    Raises:
        MergeError: ``drop`` is out of range.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    require_share(drop, "drop", allow_one=False)

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, end = entries
        delta = difference(end, start).div_(1.0 - drop)
        uniform = torch.rand(start.shape, generator=_generator(seed, name))
        return start + delta.masked_fill_((uniform < drop).to(start.device), 0.0)

    return combined(matched(base, [tuned], what_others="tuned"), combine, dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


DARE = Method(
    "dare",
    "drop random changes and rescale all other changes",
    "Yu et al., ICML 2024",
    dare,
    most=1,
    options=(
        Option("drop", "probability of dropping a change, in [0, 1)", default=0.9, example=0.5),
        Option("seed", "seed of the draws", int, default=0),
    ),
)
