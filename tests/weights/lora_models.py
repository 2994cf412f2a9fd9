"""Small fine-tunes with peft's LoRA, whose factors are all random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import tiny_clip

State = dict[str, Tensor]


class Layers(nn.Module):
    """One layer of each kind that peft has factors for."""

    pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.linear = nn.Linear(6, 5)
        self.plain = nn.Linear(5, 6, bias=False)
        self.transposed = Conv1D(6, 6)
        self.conv = nn.Conv2d(3, 6, 2, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        pixels = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
        self.register_buffer("pixels", pixels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x) + self.conv(self.pixels).mean((0, 2, 3))
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = self.transposed(tokens) + self.plain(self.linear(tokens))
        output: Tensor = self.head(self.norm(tokens))
        return output


def inputs() -> Tensor:
    return torch.tensor([[0, 3, 6], [1, 1, 5]])


class Wide(nn.Module):
    """One weight that is larger than its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(40, 40, bias=False)


def tiny_hf(seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=4,
    )
    return CLIPModel(config).eval()


def _layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Layers()


def _wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Wide()


# The base model, and the settings of peft.
BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear layers": (
        _layers,
        {"target_modules": ["linear", "plain"], "use_rslora": True, "bias": "lora_only"},
    ),
    "all kinds of layers": (
        _layers,
        {
            "target_modules": ["linear", "attention", "embedding", "conv"],
            "modules_to_save": ["head", "norm"],
            "rank_pattern": {"linear": 3},
            "alpha_pattern": {"conv": 5, "attention": 3},
        },
    ),
    "transposed": (_layers, {"target_modules": ["transposed"], "fan_in_fan_out": True}),
    "biases": (_layers, {"target_modules": ["linear", "head"], "lora_bias": True}),
    "all biases": (_layers, {"target_modules": ["linear", "attention"], "bias": "all"}),
    "wide": (_wide, {"target_modules": ["wide"]}),
    "open_clip": (tiny_clip, {"target_modules": ["attn", "c_fc", "c_proj"]}),
    "Hugging Face": (tiny_hf, {"target_modules": ["q_proj", "v_proj", "visual_projection"]}),
}


def base(kind: str) -> nn.Module:
    return BASES[kind][0]()


def copied(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def tuned(kind: str, seed: int = 1, model: nn.Module | None = None, **settings: Any) -> Any:
    """Return a model of peft whose trained parameters are all random."""
    peft = pytest.importorskip("peft")
    build, own = BASES[kind]
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **own, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about transformers, and about its own settings
        wrapped = peft.get_peft_model(model or build(), config)
    randomise(wrapped, seed)
    return wrapped


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def merged(model: Any) -> State:
    """The weights that the model really has, by peft itself. The model is used up."""
    return copied(model.merge_and_unload())


def close(result: Any, expected: Any, limit: float = 1e-5) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        difference = (result[name].double() - value.double()).abs().max()
        assert difference <= limit * max(1.0, float(value.abs().max())), (name, float(difference))
