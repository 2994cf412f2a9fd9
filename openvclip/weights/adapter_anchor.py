"""The original weights of a LoRA fine-tune, as the anchor of a regulariser."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, listed
from openvclip.weights.adapter_model import (
    LiveLayer,
    base_name,
    checked_adapter,
    is_lora_factor,
    live_layers,
    saved_name,
    trained_values,
)
from openvclip.weights.adapters import factors_by_layer
from openvclip.weights.names import canonical_model, live_model, named_parameters


def lora_anchor(
    model: nn.Module, original: Mapping[str, Tensor] | None = None, adapter: str | None = None
) -> dict[str, Tensor]:
    """Return the anchor of a LoRA fine-tune for :class:`~openvclip.InterpolatedWeightRegularizer`.

    The original CLIP is the base model without the adapter. The anchor therefore holds zeros for
    one factor of each product (``lora_B``). The regulariser then scales each product by
    ``1 - alpha``, which is the exact interpolation of the merged weights::

        iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=lora_anchor(model))

    No copy of the base model is made.

    Args:
        model: a model of peft.
        original: state dict of the original CLIP, by the names of the base model. It gives the
            anchor of entries that are trained whole. Default: ``modules_to_save`` keep their
            original values in the model, and all other entries have their present values.
        adapter: the name of the adapter. Default: the active adapter, which must be the only one.

    Raises:
        UsageError: the model has no LoRA, or no parameter of it is trained, or a change is frozen.
        WeightTypeError: the adapter is not plain LoRA, or its initialisation changed the weights of
            the base model (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
    """
    modules, name = checked_adapter(model, adapter)
    trained = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    if not any(is_lora_factor(n) for n in trained):
        raise UsageError(
            "No factor of LoRA requires gradients. Set requires_grad before you take the anchor."
        )
    _require_trained(live_layers(modules, name))
    anchor = _zeros(trained)
    originals = {} if original is None else canonical_model(original, "original")[0]
    entries, _ = live_model(model)
    for n, value in trained_values(model, name).items():
        if n not in trained:
            continue
        inside = n.replace(f".modules_to_save.{name}.", ".original_module.")
        first = originals.get(base_name(saved_name(n, name)), entries.get(inside, value))
        anchor[n] = first.detach().clone()
    return anchor


def _require_trained(layers: list[LiveLayer]) -> None:
    """Raise an error if a change is frozen, so that a regulariser could not scale it."""
    frozen = [
        layer.entry
        for layer in layers
        if not any(p is not None and p.requires_grad for p in (layer.a, layer.b))
        and bool(layer.update.up.any() and layer.update.down.any())
    ]
    if frozen:
        raise UsageError(
            f"{len(frozen)} changes of the adapter are frozen ({listed(frozen)}), so they can't be "
            "interpolated with the original weights. Train lora_B of these layers, or merge the "
            "adapter first."
        )


def _zeros(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return zeros for one trained factor of each product: ``lora_B``, or else ``lora_A``."""
    anchor = {}
    for parts in factors_by_layer(trained).values():
        factors = sorted((n for n in parts if not n.endswith(".bias")), key=_is_a)
        for n in (*factors[:1], *(n for n in parts if n.endswith(".bias"))):
            anchor[n] = torch.zeros_like(trained[n], requires_grad=False)
    return anchor


def _is_a(name: str) -> bool:
    return re.search(r"\.lora_(embedding_)?A\.", name) is not None
