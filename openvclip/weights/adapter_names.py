"""The names and settings with which peft stores a LoRA adapter. peft itself is not needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import StateMismatchError, WeightTypeError, listed
from openvclip.weights.adapter import Adapter, Layout
from openvclip.weights.adapters import factor_names
from openvclip.weights.low_rank import LowRank

PREFIX = "base_model.model."
"""The text in front of the names of the base model in files of peft."""

OUT_PROJ = ".base_layer.out_proj"
"""The text between the names of ``nn.MultiheadAttention`` and its ``out_proj``."""

_FACTOR = re.compile(
    r"^(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?P<rest>(\.weight|\.bias)?)$"
)
_MERGE = (
    "Merge the adapter into its base model with peft (merge_and_unload()), save the merged model "
    "with openvclip.save_checkpoint, and use the merged model."
)

# Settings of peft whose product is not added to the weights of the base model as s B A.
_NOT_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "megatron_config": "Megatron",
}
OUT_PROJ_TIMES = 2.0
"""How often peft adds the change of the ``out_proj`` of ``nn.MultiheadAttention``.

peft adds the change twice, in the forward pass and in ``merge_and_unload()``, so the trained model
has it twice. This is so up to the version :data:`OUT_PROJ_VERSION`. A later version may add it once
(pull request 3774 of peft).
"""
OUT_PROJ_VERSION = (0, 21)
# Initialisations that change the base model, so that base + s B A is not on the original weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRASettings:
    """The settings of ``adapter_config.json`` that the weights depend on.

    Attributes:
        r: rank of layers without a pattern.
        alpha: alpha of layers without a pattern. The scale of a product is ``alpha / rank``.
        rslora: whether the scale is ``alpha / sqrt(rank)``.
        rank_pattern: ranks by regular expressions of layer names.
        alpha_pattern: alphas by regular expressions of layer names.
        fan_in_fan_out: whether weights are stored as ``[inputs, out]``.
        modules_to_save: names of modules that were trained whole.
        base: name of the base model.
        version: version of peft that wrote the adapter. Older versions do not write it.
    """

    r: int = 8
    alpha: float = 8
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None
    version: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], what: str) -> LoRASettings:
        """Return the settings of a LoRA adapter.

        Args:
            config: the entries of ``adapter_config.json``, or the attributes of a ``LoraConfig``.
            what: name of the adapter, for error texts.

        Raises:
            WeightTypeError: the adapter is not LoRA, or a variant whose change is not ``s B A``.
        """
        kind = config.get("peft_type")
        kind = str(getattr(kind, "value", kind))
        if kind != "LORA":
            raise WeightTypeError(f"{what} is an adapter of the kind {kind}, not LoRA. {_MERGE}")
        variants = [text for name, text in _NOT_LORA.items() if config.get(name)]
        if variants:
            raise WeightTypeError(
                f"{what} is LoRA with {listed(variants)}, which is not a product that is added to "
                f"the weights. {_MERGE}"
            )
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise WeightTypeError(
                f"{what} has init_lora_weights={init!r}, which changes the weights of the base "
                "model, so the adapter alone is not the change of the original model. Save it as "
                "plain LoRA: model.save_pretrained(path, path_initial_model_for_weight_conversion="
                f"...) of peft. Or: {_MERGE}"
            )
        return cls(
            r=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            rslora=bool(config.get("use_rslora")),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            base=config.get("base_model_name_or_path") or None,
            version=str(config.get("peft_version") or ""),
        )

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer of the base model."""
        return int(_matching(self.rank_pattern, layer, self.r))

    def scale_of(self, layer: str) -> float:
        """Return the scale of the product of a layer of the base model."""
        alpha, rank = _matching(self.alpha_pattern, layer, self.alpha), self.rank_of(layer)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def _matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    # The first pattern that matches whole last parts of the name, as in peft.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


@dataclass
class Factors:
    """The factors of one layer, as peft stores them.

    Attributes:
        embedding: whether the layer is an embedding.
        parts: ``"A"`` and ``"B"``, and ``"Bbias"`` if the change has a bias.
    """

    embedding: bool = False
    parts: dict[str, Tensor] = field(default_factory=dict)


def adapter_from_state(
    state: Mapping[str, Tensor], settings: LoRASettings, what: str = "The adapter"
) -> Adapter:
    """Return the adapter that a state dict of peft holds.

    Args:
        state: the entries of ``adapter_model.safetensors``.
        settings: the settings of the adapter.
        what: name of the adapter, for error texts.

    Raises:
        WeightTypeError: there are factors of another kind than LoRA's, or a version of peft that
            is not known changed ``nn.MultiheadAttention``.
        StateMismatchError: a factor is missing, or the factors have another rank than in the
            settings.
    """
    layers: dict[str, Factors] = {}
    values: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name.removeprefix(PREFIX)
        match = _FACTOR.match(short)
        if match is None:
            values[entry_name(short)] = value
            continue
        factors = layers.setdefault(match["layer"], Factors(bool(match["embedding"])))
        factors.parts[match["part"] + ("bias" if match["rest"] == ".bias" else "")] = value
    require_known(values, layers, what)
    if any(layer.endswith(OUT_PROJ) for layer in layers) and _is_later(settings.version):
        raise WeightTypeError(
            f"{what} changes nn.MultiheadAttention, and peft {settings.version} wrote it. Versions "
            "after 0.21 may add the change of out_proj once or twice, so the trained weights are "
            f"not known. {_MERGE}"
        )
    updates, layouts = updates_of(layers, settings.scale_of, settings.fan_in_fan_out, what)
    for layer, factors in layers.items():
        rank, expected = factors.parts["A"].shape[0], settings.rank_of(_module(layer))
        if rank != expected:
            raise StateMismatchError(
                f"{what}: {layer} has factors of rank {rank}, but adapter_config.json says "
                f"{expected}. The file of settings belongs to another adapter."
            )
    return Adapter(updates, values, layouts, settings.modules_to_save, settings.base)


def _is_later(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) > OUT_PROJ_VERSION


def require_known(values: Iterable[str], layers: Iterable[str], what: str) -> None:
    """Raise an error if there are factors of another kind than LoRA's, or none at all.

    Args:
        values: names of the entries that are no factors of LoRA.
        layers: names of the layers with factors of LoRA.
        what: name of the adapter, for the error text.

    Raises:
        WeightTypeError: there are other factors.
        StateMismatchError: there are no entries.
    """
    names, layers = list(values), list(layers)
    unknown = factor_names(names)
    unknown += [layer for layer in layers if layer.endswith(".base_layer")]
    if unknown:
        raise WeightTypeError(
            f"{what} holds {len(unknown)} factors that are not those of plain LoRA "
            f"({listed(unknown)}). {_MERGE}"
        )
    if not layers and not names:
        raise StateMismatchError(f"{what} holds no factors of LoRA.", missing=["lora_A", "lora_B"])


def updates_of(
    layers: Mapping[str, Factors],
    scale_of: Callable[[str], float],
    fan_in_fan_out: bool,
    what: str,
    out_proj_times: float = OUT_PROJ_TIMES,
) -> tuple[dict[str, LowRank], dict[str, Layout]]:
    """Return the changes of the entries of the base model, and their layouts.

    Args:
        layers: the factors of each layer, by its name in the model of peft.
        scale_of: function from the name of a module of the base model to the scale of its product.
        fan_in_fan_out: whether weights are stored as ``[inputs, out]``.
        what: name of the adapter, for error texts.
        out_proj_times: how often the model adds the change of ``out_proj``.

    Raises:
        StateMismatchError: a factor is missing.
    """
    updates: dict[str, LowRank] = {}
    layouts: dict[str, Layout] = {}
    for layer, factors in layers.items():
        scale = scale_of(_module(layer))
        is_attention = f"{layer}{OUT_PROJ}" in layers
        if layer.endswith(OUT_PROJ):
            scale *= out_proj_times
        entry = entry_name(f"{layer}.in_proj_weight" if is_attention else f"{layer}.weight")
        update, layout = _update(factors, scale, fan_in_fan_out, f"{what}: {layer}")
        updates[entry] = update
        if layout != "linear":
            layouts[entry] = layout
        bias = factors.parts.get("Bbias")
        if bias is not None and _module(layer) == layer and not is_attention:
            one = torch.ones((1, 1), dtype=bias.dtype, device=bias.device)
            name = entry_name(f"{layer}.bias")
            updates[name] = LowRank(bias[:, None], one, scale, tuple(bias.shape))
    return updates, layouts


def _module(layer: str) -> str:
    """Return the module whose settings hold for a layer: ``out_proj`` has those of its parent."""
    return layer.removesuffix(OUT_PROJ)


def _update(
    factors: Factors, scale: float, fan_in_fan_out: bool, what: str
) -> tuple[LowRank, Layout]:
    missing = [f"lora_{part}" for part in "AB" if part not in factors.parts]
    if missing:
        raise StateMismatchError(f"{what} lacks a factor.", missing=missing)
    down, up = factors.parts["A"], factors.parts["B"]
    if down.ndim > 2:  # a convolution
        shape = (up.shape[0], *down.shape[1:])
        return LowRank(up.flatten(1), down.flatten(1), scale, shape), "linear"
    if factors.embedding or fan_in_fan_out:
        layout: Layout = "embedding" if factors.embedding else "transposed"
        return LowRank(down.mT, up.mT, scale), layout
    return LowRank(up, down, scale), "linear"


def entry_name(name: str) -> str:
    """Return the name in the base model, without the parts that peft adds."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def peft_factors(update: LowRank, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return ``lora_A`` and ``lora_B`` of a change, without its scale."""
    if layout != "linear":
        return update.up.mT, update.down.mT
    kernel = update.shape[2:]
    a = update.down.reshape(-1, *update.shape[1:])
    return a, update.up.reshape(*update.up.shape, *(1 for _ in kernel))
