"""Tiny models, tokenizers and image processors of transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import randomise

transformers = pytest.importorskip("transformers", minversion="5")

PIXELS = 8  # height and width of the images
LENGTH = 12  # tokens of a text
WORDS = ["a", "photo", "of", "video", "archery", "surfing", "horse", "race", "the", "."]
SPECIAL = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
VOCABULARY = 4 + len(WORDS)

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": SPECIAL["bos"],
    "eos_token_id": SPECIAL["eos"],
    "pad_token_id": SPECIAL["pad"],
}
_BERT = {**TEXT, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0}


def _clip_like(prefix: str, **text: Any) -> Callable[..., Any]:
    """Return a function that makes a model with the parts of CLIP."""

    def make(**vision: Any) -> Any:
        config = getattr(transformers, f"{prefix}Config")(
            vision_config={**VISION, **vision}, text_config={**TEXT, **text}, projection_dim=8
        )
        return getattr(transformers, f"{prefix}Model")(config)

    return make


def _siglip2(**vision: Any) -> Any:
    sizes = {**VISION, "num_patches": (PIXELS // 4) ** 2, **vision}
    del sizes["image_size"]
    return transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config=sizes, text_config=TEXT)
    )


def _align() -> Any:
    vision = {
        "image_size": 32,
        "hidden_dim": 16,
        "kernel_sizes": [3],
        "in_channels": [32],
        "out_channels": [16],
        "depthwise_padding": [],
        "strides": [1],
        "num_block_repeats": [1],
        "expand_ratios": [1],
        "width_coefficient": 0.5,
        "depth_coefficient": 0.5,
    }
    return transformers.AlignModel(
        transformers.AlignConfig(vision_config=vision, text_config=_BERT, projection_dim=8)
    )


def _dual() -> Any:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.CLIPVisionConfig(**VISION), transformers.BertConfig(**_BERT), projection_dim=8
    )
    return transformers.VisionTextDualEncoderModel(config)


EXPANDED: dict[str, Callable[..., Any]] = {
    "CLIPModel": _clip_like("CLIP"),
    "SiglipModel": _clip_like("Siglip"),
    "Siglip2Model": _siglip2,
    "MetaClip2Model": _clip_like("MetaClip2"),
    "AltCLIPModel": _clip_like("AltCLIP", project_dim=16, max_position_embeddings=32),
    "ChineseCLIPModel": _clip_like("ChineseCLIP", max_position_embeddings=32),
    "CLIPSegModel": _clip_like("CLIPSeg"),
    "VisionTextDualEncoderModel": _dual,
}
"""The models that can be expanded."""

FRAME_BY_FRAME: dict[str, Callable[..., Any]] = {
    "AlignModel": _align,
    "GroupViTModel": lambda: transformers.GroupViTModel(
        transformers.GroupViTConfig(
            text_config=TEXT,
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "num_group_tokens": [4, 0],
                "num_output_groups": [4, 2],
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 2,
            },
            projection_dim=8,
            projection_intermediate_dim=8,
        )
    ),
    "BlipModel": _clip_like("Blip", hidden_dropout_prob=0.0, encoder_hidden_size=16),
    "OwlViTModel": _clip_like("OwlViT"),
    "Aimv2Model": lambda: transformers.Aimv2Model(
        transformers.Aimv2Config(text_config=TEXT, vision_config=VISION, projection_dim=8)
    ),
}
"""The models whose image tower can't be expanded."""

MODELS = {**EXPANDED, **FRAME_BY_FRAME}


TEXT_PROMPTS = ["CLIPModel", "MetaClip2Model", "CLIPSegModel", "SiglipModel", "Siglip2Model"]
"""The models whose text tower takes prompts."""


def make(name: str, **vision: Any) -> Any:
    """Return a tiny model in eval mode with random weights."""
    torch.manual_seed(0)
    model = MODELS[name](**vision)
    temperature = {n for n, _ in model.named_parameters() if n in ("logit_scale", "temperature")}
    randomise(model)
    with torch.no_grad():
        for module in model.modules():  # transformers may set this row to 0 when it loads
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        for parameter in temperature:
            model.get_parameter(parameter).fill_(1.3)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-2.5)
    return model.eval()


def pixels_of(model: nn.Module) -> int:
    """Return the height and width of the images of a tiny model."""
    size: int = getattr(model.config.vision_config, "image_size", PIXELS)  # type: ignore[union-attr]
    return size


def make_tokenizer(**settings: Any) -> Any:
    """Return a fast tokenizer of whole words, as ``AutoTokenizer`` would load it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {f"<{name}>": index for name, index in SPECIAL.items()}
    vocabulary |= {word: index for index, word in enumerate(WORDS, start=4)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.NFC()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(f"<{n}>", SPECIAL[n]) for n in ("bos", "eos")]
    )
    names = {f"{name}_token": f"<{name}>" for name in SPECIAL}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **{"model_max_length": LENGTH, **names, **settings}
    )


def save_folder(name: str, folder: Path, **vision: Any) -> Any:
    """Save a tiny model with its tokenizer and image processor; return the model."""
    model = make(name, **vision)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if name.startswith("Siglip"):
        images = transformers.SiglipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    else:
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
        )
    images.save_pretrained(folder)
    return model
