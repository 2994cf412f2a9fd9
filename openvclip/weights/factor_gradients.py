"""Gradients of factors of LoRA whose product is scaled by one of the factors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from openvclip.errors import RegularizationError, UsageError, listed
from openvclip.weights.adapters import factors_by_layer
from openvclip.weights.shards import is_sharded


def unscaled_factors(names: Collection[str], anchored: Collection[str]) -> list[str]:
    """Return the trained factors without an anchor whose product has a factor with an anchor.

    Args:
        names: names of all trained parameters.
        anchored: names of the parameters that have an anchor.
    """
    result: list[str] = []
    for parts in factors_by_layer(names).values():
        with_anchor = [name for name in parts if name in anchored]
        if len(with_anchor) == 1:
            result += [name for name in parts if name not in anchored]
    return result


@contextmanager
def product_gradients(factors: Mapping[str, nn.Parameter], alpha: float) -> Iterator[None]:
    """Give the factors of scaled products the gradients of the products, inside the block.

    IWR applies the gradient at the interpolated weights ``W + (1 - alpha) s B A`` to the weights
    themselves, so the gradients of the factors are ``s G A^T`` and ``s B^T G``. In the block,
    ``(1 - alpha) B`` stands for ``B``. Autograd then computes ``s G A^T`` for ``B``, and
    ``(1 - alpha) s B^T G`` for ``A``. The gradient of ``A`` is divided by ``1 - alpha``.

    Args:
        factors: the factors that are not scaled, by name. They are those of
            :func:`unscaled_factors`.
        alpha: weight of the anchor.

    Raises:
        RegularizationError: alpha is 1, at which the gradient of ``A`` is not known.
        UsageError: a factor is sharded.
    """
    if factors and alpha == 1.0:
        raise RegularizationError(
            f"alpha=1.0: both factors of LoRA are trained ({listed(list(factors))}), and at 1 the "
            "interpolated weights do not depend on lora_A. Use an alpha below 1."
        )
    sharded = [name for name, factor in factors.items() if is_sharded(factor)]
    if sharded:
        raise UsageError(
            f"{len(sharded)} factors of LoRA are sharded ({listed(sharded)}). Under fully_shard, "
            "freeze lora_A and train lora_B only, or train with DistributedDataParallel."
        )
    with ExitStack() as stack:
        for factor in factors.values() if alpha else ():
            hook = factor.register_hook(_Divided(1.0 - alpha))
            stack.callback(hook.remove)
        yield


class _Divided:
    def __init__(self, share: float) -> None:
        self._share = share

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / self._share
