"""The LoRA adapter of a model in training: its factors and its scales.

The layers are recognised by their attributes, as peft names them. peft itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, WeightTypeError, listed
from openvclip.weights.adapter import Adapter, Layout
from openvclip.weights.adapter_names import (
    OUT_PROJ,
    OUT_PROJ_TIMES,
    Factors,
    LoRASettings,
    entry_name,
    peft_factors,
    updates_of,
)
from openvclip.weights.adapters import factor_names
from openvclip.weights.low_rank import LowRank
from openvclip.weights.names import (
    canonical_names,
    live_model,
    unwrap,
)
from openvclip.weights.shards import is_sharded

_INSIDE_PEFT = re.compile(r"(^|\.)base_model\.model\.")


def base_name(name: str) -> str:
    """Return the name of a module or an entry in the base model.

    Args:
        name: canonical name in the model of peft.
    """
    return entry_name(_INSIDE_PEFT.sub(r"\1", name))


@dataclass(frozen=True, eq=False)
class LiveLayer:
    """The change of one entry in a model in training.

    Attributes:
        entry: name of the entry in the base model.
        a: the parameter ``lora_A``, or ``None`` for the change of a bias.
        b: the parameter ``lora_B``.
        update: the change. Its factors are views of the parameters.
        layout: how the parameters store the factors.
    """

    entry: str
    a: nn.Parameter | None
    b: nn.Parameter
    update: LowRank
    layout: Layout = "linear"

    def put(self, update: LowRank) -> None:
        """Let the parameters hold another change, of any rank. They stay the same objects."""
        scaled = replace(update, up=update.up * (update.scale / self.update.scale), scale=1.0)
        if self.a is None:
            _set(self.b, scaled.product())
            return
        a, b = peft_factors(scaled, self.layout)
        _set(self.a, a)
        _set(self.b, b)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.to(parameter.device, parameter.dtype).contiguous()


def lora_layers(model: nn.Module, adapter: str | None = None) -> list[LiveLayer]:
    """Return the changes that a LoRA adapter makes, with the parameters of the model.

    Args:
        model: a model with layers of peft's LoRA.
        adapter: the name of the adapter. Default: the active adapter, which must be the only one.

    Raises:
        UsageError: the model has no LoRA, several adapters are active, or the adapter is merged
            into the weights now.
        WeightTypeError: the adapter is not plain LoRA.
    """
    return live_layers(*checked_adapter(model, adapter))


def checked_adapter(model: nn.Module, adapter: str | None) -> tuple[dict[str, Any], str]:
    """Return the layers of LoRA by name, and the name of the adapter to use.

    Args:
        model: see :func:`lora_layers`.
        adapter: see :func:`lora_layers`.

    Raises:
        UsageError, WeightTypeError: see :func:`lora_layers`.
    """
    modules = dict(_lora_modules(model))
    name = adapter_name(model, modules, adapter)
    _require_plain(model, modules, name)
    return modules, name


def live_layers(modules: Mapping[str, Any], adapter: str) -> list[LiveLayer]:
    """Return the changes of an adapter.

    Args:
        modules: the layers of LoRA by name; see :func:`checked_adapter`.
        adapter: the name of the adapter.
    """
    factors: dict[str, Factors] = {}
    parameters: dict[str, tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]] = {}
    scales: dict[str, float] = {}
    fan_in_fan_out = False
    for name, module in modules.items():
        if adapter not in module.scaling:
            continue
        if adapter in module.lora_embedding_A:
            down, up = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
            parts, bias = {"A": down, "B": up}, None
        else:
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            parts, bias = {"A": down, "B": up}, getattr(module.lora_B[adapter], "bias", None)
        if bias is not None:
            parts["Bbias"] = bias
        layer = _INSIDE_PEFT.sub(r"\1", name)
        factors[layer] = Factors(
            adapter in module.lora_embedding_A, {n: part.detach() for n, part in parts.items()}
        )
        parameters[layer], scales[layer] = (up, down, bias), float(module.scaling[adapter])
        fan_in_fan_out |= bool(getattr(module, "fan_in_fan_out", False)) and down.ndim == 2
    times = _out_proj_times(modules, adapter)
    updates, layouts = updates_of(factors, scales.__getitem__, fan_in_fan_out, "The model", times)
    layers = []
    for (layer, (up, down, bias)), entry in zip(
        parameters.items(), [n for n in updates if len(updates[n].shape) > 1], strict=True
    ):
        layers.append(LiveLayer(entry, down, up, updates[entry], layouts.get(entry, "linear")))
        name = entry_name(f"{layer}.bias")
        if bias is not None and name in updates:
            layers.append(LiveLayer(name, None, bias, updates[name]))
    return layers


_TIMES: dict[type, float] = {}  # by the class of peft


@torch.no_grad()
def _out_proj_times(modules: Mapping[str, Any], adapter: str) -> float:
    """Return how often this version of peft adds the change of ``out_proj``, from one merge."""
    attentions = (m for n, m in modules.items() if f"{n}{OUT_PROJ}" in modules)
    attention = next((module for module in attentions if adapter in module.lora_A), None)
    if attention is None:
        return OUT_PROJ_TIMES
    if type(attention) not in _TIMES:
        tried = deepcopy(attention)
        output = tried.base_layer.out_proj
        output.base_layer.weight.zero_()
        for factors in (output.lora_A, output.lora_B):
            factors[adapter].weight.fill_(1.0)
        once = output.get_delta_weight(adapter)
        tried.merge(adapter_names=[adapter])
        merged = tried.base_layer.out_proj.base_layer.weight
        _TIMES[type(attention)] = float((merged.sum() / once.sum()).round())
    return _TIMES[type(attention)]


def _lora_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and modules of LoRA's layers, under canonical names."""
    modules = dict(unwrap(model).named_modules())
    for name, raw in canonical_names(modules).items():
        module: Any = modules[raw]
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "lora_A"):
            yield name, module


def adapter_name(model: nn.Module, modules: Mapping[str, Any], adapter: str | None) -> str:
    """Return the name of the adapter to use, after checks.

    Raises:
        UsageError: there is no such adapter, or several are active, or the adapter is merged.
        WeightTypeError: the model has adapters of another kind.
    """
    names = list(dict.fromkeys(name for module in modules.values() for name in module.scaling))
    if not names:
        for config in _configs(model).values():  # refuses other adapters by name
            LoRASettings.from_config(config, "The model")
        raise UsageError(
            "The model has no layers of LoRA: expected a model of peft (get_peft_model, "
            "PeftModel.from_pretrained or add_adapter)."
        )
    active = [n for n in names if any(n in _active(module) for module in modules.values())]
    chosen = [adapter] if adapter is not None else active
    if len(chosen) != 1 or chosen[0] not in names:
        raise UsageError(
            f"adapter={adapter!r}: the model has the adapters {listed(names, 10)}, and "
            f"{listed(active, 10) or 'none'} active. Name one of them, or activate only one with "
            "model.set_adapter(name)."
        )
    if any(module.merged_adapters for module in modules.values()):
        raise UsageError(
            "The adapter is merged into the weights of the model now. Call "
            "model.unmerge_adapter() first."
        )
    return chosen[0]


def _active(module: Any) -> list[str]:
    active = module.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _require_plain(model: nn.Module, modules: Mapping[str, Any], adapter: str) -> None:
    settings_of(model, adapter)
    variants = [n for n, m in modules.items() if adapter in getattr(m, "lora_variant", {})]
    wrapped = [n for n, m in modules.items() if hasattr(m, "parameter_name")]
    if variants or wrapped:
        raise WeightTypeError(
            f"{len(variants or wrapped)} layers of the model ({listed(variants or wrapped)}) have "
            "a variant of LoRA, whose change is not a product that is added to the weights. Use "
            "plain LoRA, or merge the adapter first (merge_and_unload() in peft)."
        )


def settings_of(model: nn.Module, adapter: str) -> LoRASettings | None:
    """Return the settings of an adapter, or ``None`` if the model does not hold them.

    Raises:
        WeightTypeError: the adapter is not plain LoRA, or its initialisation changes the base.
    """
    config = _config(model, adapter)
    return None if config is None else LoRASettings.from_config(config, "The model")


def _config(model: nn.Module, adapter: str) -> dict[str, Any] | None:
    return _configs(model).get(adapter)


def _configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of all adapters of a model, by their names."""
    for module in unwrap(model).modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return {name: dict(vars(config)) for name, config in configs.items()}
    return {}


# --- the adapter as a value ----------------------------------------------------------------------


def adapter_of(model: nn.Module, adapter: str | None = None, *, copy: bool = True) -> Adapter:
    """Return the LoRA adapter of a model: its products, and the entries that were trained whole.

    Args:
        model: a model of peft, with or without wrappers, of open_clip or Hugging Face.
        adapter: the name of the adapter. Default: the active adapter, which must be the only one.
        copy: whether to copy the values. Without copies, the adapter changes with the training.

    Returns:
        The adapter, by the names of the base model (without ``base_model.model.``). Entries trained
        whole are those of ``modules_to_save``, the biases that the settings name, and all other
        parameters that require gradients.

    Raises:
        UsageError: the model has no LoRA, several adapters are active, the adapter is merged into
            the weights now, or its weights are sharded (``fully_shard``).
        WeightTypeError: the adapter is not plain LoRA: DoRA, AdaLoRA, LoHa, LoKr, IA3 and others.
    """
    modules, name = checked_adapter(model, adapter)
    layers = live_layers(modules, name)
    settings = settings_of(model, name)
    values = {base_name(saved_name(n, name)): v for n, v in trained_values(model, name).items()}
    result = Adapter(
        {layer.entry: layer.update for layer in layers},
        {n: value.detach() for n, value in values.items()},
        {layer.entry: layer.layout for layer in layers if layer.layout != "linear"},
        settings.modules_to_save if settings else (),
        settings.base if settings else None,
    )
    _require_whole(result)
    return copied(result) if copy else result


def _require_whole(adapter: Adapter) -> None:
    parts = [part for update in adapter.updates.values() for part in (update.up, update.down)]
    if any(is_sharded(part) for part in (*parts, *adapter.values.values())):
        raise UsageError(
            "The weights of the adapter are sharded (fully_shard), which adapters and their "
            "averages do not support. Train the adapter with DistributedDataParallel, which keeps "
            "it whole."
        )


def copied(adapter: Adapter) -> Adapter:
    """Return an adapter with copies of all factors and values."""
    return Adapter(
        {
            name: LowRank(u.up.clone(), u.down.clone(), u.scale, u.shape)
            for name, u in adapter.updates.items()
        },
        {name: value.clone() for name, value in adapter.values.items()},
        adapter.layouts,
        adapter.modules_to_save,
        adapter.base,
    )


def trained_values(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the live entries that are trained whole beside LoRA, by their names in the model.

    Args:
        model: a model of peft.
        adapter: the name of the adapter.

    Raises:
        WeightTypeError: the model trains factors of another kind than LoRA's.
    """
    entries, _ = live_model(model)
    inside = f".modules_to_save.{adapter}."
    config = _config(model, adapter) or {}
    bias = config.get("bias", "none")
    factors = set(factor_names(entries))
    values = {}
    for name, value in entries.items():
        if ".original_module." in name or (".modules_to_save." in name and inside not in name):
            continue
        if name in factors:
            if value.requires_grad and not is_lora_factor(name):
                raise WeightTypeError(
                    f"The model trains {name}, which is not a factor of plain LoRA. Merge the "
                    "adapter first (merge_and_unload() in peft)."
                )
            continue
        is_bias = name.endswith("bias") and (
            bias == "all" or (bias == "lora_only" and ".base_layer." in name)
        )
        if inside in name or value.requires_grad or is_bias:
            values[name] = value
    return values


def is_lora_factor(name: str) -> bool:
    """Whether an entry is a factor of plain LoRA."""
    return re.search(r"\.lora_(embedding_)?[AB]\.", name) is not None


def saved_name(name: str, adapter: str) -> str:
    """Return the name of an entry without the part that names the adapter."""
    return name.replace(f".modules_to_save.{adapter}.", ".")
