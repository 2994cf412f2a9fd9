"""The entries and settings with which peft stores a LoRA adapter, made from an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import WeightTypeError, listed
from openvclip.weights.adapter import Adapter, Layout
from openvclip.weights.adapter_names import (
    OUT_PROJ,
    OUT_PROJ_TIMES,
    OUT_PROJ_VERSION,
    PREFIX,
    peft_factors,
)
from openvclip.weights.low_rank import LowRank


def state_of_adapter(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the entries and the settings with which peft stores an adapter.

    The settings give each layer its own rank and alpha, so the layers may have different ranks.

    Raises:
        WeightTypeError: a change can't be stored: a change of a bias without a change of its
            weight.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    biases = {n: u for n, u in adapter.updates.items() if len(u.shape) == 1}
    attention = {
        n.removesuffix(".in_proj_weight") for n in adapter.updates if n.endswith(".in_proj_weight")
    }
    layers: dict[str, LowRank] = {n: u for n, u in adapter.updates.items() if n not in biases}
    for name, update in layers.items():
        module = name.rpartition(".")[0]
        parent = module.removesuffix(".out_proj")
        nested = module != parent and parent in attention
        stored = f"{parent}{OUT_PROJ}" if nested else module
        bias = biases.pop(f"{module}.bias", None)
        if nested or module in attention:  # both have the rank and the alpha of the attention
            module = parent if nested else module
            both = (f"{module}.in_proj_weight", f"{module}.out_proj.weight")
            update = _padded(update, max(layers[n].rank for n in both if n in layers))
            update = update.scaled(1.0 / OUT_PROJ_TIMES) if nested else update
        ranks[module] = update.rank
        alphas.setdefault(module, (update.scale or 1.0) * update.rank)
        scale = alphas[module] / update.rank
        layout = adapter.layouts.get(name, "linear")
        state |= _stored_factors(f"{PREFIX}{stored}.", _rescaled(update, scale), layout)
        if bias is not None:
            state[f"{PREFIX}{stored}.lora_B.bias"] = bias.product() / scale
    if biases:
        raise WeightTypeError(
            f"The adapter changes {listed(list(biases))} by factors, but not the weights of these "
            "layers, which peft can't store. Merge it: adapter.merged(base)."
        )
    has_bias = any(name.endswith(".lora_B.bias") for name in state)
    stored_values, bias_kind, modules = _stored_values(adapter, set(ranks))
    state |= stored_values
    return state, {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        **_rank_settings(ranks, alphas),
        "target_modules": "|".join(re.escape(module) for module in ranks) or None,
        "modules_to_save": modules or None,
        "bias": bias_kind,
        "lora_bias": has_bias,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": "transposed" in adapter.layouts.values(),
        "init_lora_weights": True,
        **({"peft_version": ".".join(map(str, OUT_PROJ_VERSION))} if attention else {}),
    }


def _padded(update: LowRank, rank: int) -> LowRank:
    more = rank - update.rank
    if not more:
        return update
    up = torch.nn.functional.pad(update.up, (0, more))
    down = torch.nn.functional.pad(update.down, (0, 0, 0, more))
    return LowRank(up, down, update.scale, update.shape)


def _rescaled(update: LowRank, scale: float) -> LowRank:
    if update.scale == scale:
        return update
    return LowRank(update.up * (update.scale / scale), update.down, scale, update.shape)


def _stored_factors(prefix: str, update: LowRank, layout: Layout) -> dict[str, Tensor]:
    kind, end = ("embedding_", "") if layout == "embedding" else ("", ".weight")
    a, b = peft_factors(update, layout)
    return {f"{prefix}lora_{kind}A{end}": a, f"{prefix}lora_{kind}B{end}": b}


def _stored_values(adapter: Adapter, layers: set[str]) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the entries of whole values, and the settings ``bias`` and ``modules_to_save``."""
    state: dict[str, Tensor] = {}
    bias, modules = "none", list(adapter.modules_to_save)
    leaves: dict[str, set[str]] = {}
    for name in adapter.values:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, set()).add(leaf)
    for name, value in adapter.values.items():
        module, _, leaf = name.rpartition(".")
        parent = module.removesuffix(".out_proj")
        stored = name
        if module in layers:
            stored = f"{module}.base_layer.{leaf}"
        elif module != parent and parent in layers:
            stored = f"{parent}.base_layer.out_proj.base_layer.{leaf}"
        if stored != name:
            bias = "lora_only" if bias == "none" and leaf == "bias" else bias
        elif not _is_in(name, modules):
            if leaves[module] == {"bias"}:
                bias = "all"
            else:
                modules.append(module)
        state[PREFIX + stored] = value
    return state, bias, modules


def _is_in(name: str, modules: list[str]) -> bool:
    return any(f".{name}".find(f".{module}.") >= 0 for module in modules)


def _rank_settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the rank and the alpha of most layers, and patterns for all other layers."""
    usual = _most_common(ranks.values()) or 8
    alpha = _most_common([_plain(value) for value in alphas.values()]) or 8
    exact = {module: f"^{re.escape(module)}" for module in ranks}
    return {
        "r": usual,
        "lora_alpha": alpha,
        "rank_pattern": {exact[m]: rank for m, rank in ranks.items() if rank != usual},
        "alpha_pattern": {
            exact[m]: _plain(value) for m, value in alphas.items() if _plain(value) != alpha
        },
    }


def _most_common(values: Iterable[Any]) -> Any:
    values = list(values)
    return max(values, key=values.count) if values else None


def _plain(alpha: float) -> float:
    """Return a whole number as an int, as peft writes it."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
