"""Factors of adapters (LoRA and its kind), which can't be averaged one by one.

LoRA changes a weight ``W`` to ``W + s B A``. The mean of two such weights has the update
``s (B1 A1 + B2 A2) / 2``. The means of the factors give ``s (B1 + B2) (A1 + A2) / 4`` instead. The
two agree if only one of the factors differs: the product is linear in ``B`` if ``A`` is the same
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from openvclip.errors import WeightTypeError, listed

# Factors of a product: the weight is linear in each of them if all others stay the same.
_PRODUCT = (
    r"lora_(?:embedding_)?[ABE]|lora_[ab]|lora_(?:up|down|mid)"
    r"|lora(?:_linear_layer|_layer)?\.(?:up|down|mid|A|B)|gralora_[AB](?:_general)?"
    r"|hira_(?:embedding_)?[AB]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    r"|ia3_l|p?vera_(?:[AB]|lambda_[bd])|randlora_(?:A|B|lambda|gamma)"
)
# Parts of other adapters: norms, rotations and scales, in which the weight is not linear.
_OTHER = (
    r"lora_magnitude_vector|dora_scale|delora_(?:A|B|lambda)|glora_[A-E]|oft_(?:embedding_)?[rR]"
    r"|oft_(?:blocks|diag)|boft_[Rs]|psoft_R|hra_u|road_(?:theta|alpha)|(?:miss|bone)_block"
    r"|vblora_(?:logits_[AB]|vector_bank)|unilora_theta_d"
)
_FACTOR = re.compile(
    rf"^(?P<layer>(?:.*?[._])??)(?:(?P<product>{_PRODUCT})|(?:{_OTHER}))(?P<rest>(?:\..*)?)$"
)
_SCALED_BY_IA3 = ("base_layer.weight", "base_layer.bias", "weight", "bias")


class Factor(NamedTuple):
    """What the name of a factor says.

    Attributes:
        layer: the adapter and the layer that the factor belongs to. All factors of a product have
            the same ``layer``.
        in_product: whether the weight is linear in this factor, if all other factors of the layer
            stay the same.
    """

    layer: tuple[str, str]
    in_product: bool


@lru_cache(maxsize=2**14)
def factor_of(name: str) -> Factor | None:
    """Return what a name says if an entry of this name is a factor of an adapter, else None."""
    match = _FACTOR.match(name)
    if match is None:
        return None
    adapter = match["rest"].removesuffix(".weight")
    return Factor((match["layer"], adapter), match["product"] is not None)


def factor_names(names: Iterable[str]) -> list[str]:
    """Return the names of factors of adapters, in their order.

    The names of peft, loralib, diffusers, kohya and LyCORIS are known: ``lora_A``, ``lora_down``,
    ``hada_w1_a``, ``lokr_w1``, ``oft_r``, ``ia3_l``, ``vera_lambda_b`` and others.
    """
    return [name for name in names if factor_of(name) is not None]


def mixed_factors(names: Iterable[str], changes: Callable[[str], bool]) -> list[str]:
    """Return the factors for which a mean of the factors is not the mean of the models.

    A product is averaged exactly if at most one of its factors differs between the models. Adapters
    with norms and rotations (DoRA, OFT) are averaged exactly only if nothing differs.

    Args:
        names: names of all entries.
        changes: function from the name of an entry to whether its values differ between the
            models. It is called only for parts of adapters.
    """
    mixed = []
    for parts in factors_by_layer(names).values():
        different = [name for name in parts if changes(name)]
        if len(different) > 1 or (different and not all(parts.values())):
            mixed.extend(different)
    return mixed


def factors_by_layer(names: Iterable[str]) -> dict[tuple[str, str], dict[str, bool]]:
    """Return the factors of each layer, and whether the weight is linear in each of them.

    The entries beside the factors that belong to the product are included: the ``alpha`` of kohya,
    and the weight that the scales of IA3 multiply.
    """
    names = list(names)
    layers: dict[tuple[str, str], dict[str, bool]] = {}
    for name in names:
        factor = factor_of(name)
        if factor is not None:
            layers.setdefault(factor.layer, {})[name] = factor.in_product
    if layers:
        known = set(names)
        for (prefix, adapter), parts in layers.items():
            others = {f"{prefix}alpha{adapter}": True, f"{prefix}magnitude{adapter}": False}
            if any("ia3_l" in name for name in parts):
                others |= {prefix + weight: True for weight in _SCALED_BY_IA3}
            parts.update({name: linear for name, linear in others.items() if name in known})
    return layers


def refuse_factors(
    names: Iterable[str], what: str, action: str = "interpolate", advice: str = ""
) -> None:
    """Raise an error if there are factors that would be averaged one by one.

    Args:
        names: the factors, from :func:`factor_names` or :func:`mixed_factors`. No error is raised
            if there are none.
        what: name of the argument or the file, for the error text.
        action: what to do after the adapter is merged, for the error text.
        advice: sentences that replace the advice to merge the adapter first.

    Raises:
        WeightTypeError: there are factors.
    """
    factors = list(names)
    if factors:
        merge = (
            "Merge the adapter into the base model first (merge_and_unload() in peft), then "
            f"{action}. Or pass adapters in place of their state dicts: "
            "openvclip.checkpoints.load_adapter(folder) or openvclip.weights.adapter_of(model)."
        )
        raise WeightTypeError(
            f"{what} holds {len(factors)} factors of an adapter ({listed(factors)}). "
            f"{advice or merge} The factors can't be averaged one by one: the product of two means "
            "is not the mean of the products."
        )
