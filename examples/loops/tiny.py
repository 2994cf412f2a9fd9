"""A tiny CLIP with random weights and random clips, in place of yours."""

from __future__ import annotations

import open_clip
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import openvclip

CLASSES = ("juggling balls", "playing drums", "surfing water")


def classifier_and_clip(seed: int = 0) -> tuple[openvclip.ZeroShotClassifier, dict[str, Tensor]]:
    """An expanded model in its classifier, ready to be trained, and the original weights."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=2, width=64, head_width=32, patch_size=8, image_size=32
        ),
        text_cfg=open_clip.CLIPTextCfg(layers=1, width=32, heads=1),
    )
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    openvclip.expand_temporal_attention(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return openvclip.ZeroShotClassifier(model, tokenizer, list(CLASSES)), clip


def clips(number: int = 8, seed: int = 0) -> TensorDataset:
    """Clips ``[4, 3, 32, 32]`` of noise, each with a label."""
    generator = torch.Generator().manual_seed(seed)
    videos = torch.randn(number, 4, 3, 32, 32, generator=generator)
    labels = torch.randint(0, len(CLASSES), (number,), generator=generator)
    return TensorDataset(videos, labels)
