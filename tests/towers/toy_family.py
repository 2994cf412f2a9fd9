"""The file of a made-up family: all that a new family of towers must give.

``test_families.py`` adds it to the registry with one entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from openvclip.towers.attention import temporal_attention
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, TemporalTower, TowerFacts, call
from openvclip.towers.prompted import PromptedExpandedTower, PromptedTower
from openvclip.towers.view import FrameView

PATCH, IMAGE, WIDTH, HEADS = 4, 8, 16, 2


class ToyAttention(nn.Module):
    """Self-attention of ``[n, N, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(-3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -3) for part in self.split(x))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), ToyAttention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class ToyTower(nn.Module):
    """A tower without a class token, of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(ToyBlock(), ToyBlock())
        self.checkpointing = False

    def embed(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)

    def encode(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointing:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens.mean(-2)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(self.embed(images))


class TemporalToyAttention(ToyAttention):
    view: FrameView

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return super().forward(x)
        return self.out(temporal_attention(*self.split(x), self.view))


class TemporalToyTower(TemporalTower, ToyTower):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.ndim == 4:
            return super().forward(x)
        _require_video(self, x)
        tokens = self.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.encode(tokens)


class PromptedToyTower(PromptedTower, ToyTower):
    def forward(self, x: Tensor) -> Tensor:
        video = x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 4 else x
        _require_video(self, video)
        tokens = self.embed(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        tokens = self._through(tokens, nn.Identity(), list(self.blocks), self.checkpointing)
        features = tokens.mean(-2)
        return features.squeeze(1) if x.ndim == 4 else features


class PromptedTemporalToyTower(PromptedExpandedTower, PromptedToyTower):
    pass


def _require_video(tower: Any, video: Tensor) -> None:
    require_video(video, (IMAGE, IMAGE), tower.conv.weight)


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, ToyTower) else None


def _facts(tower: Any) -> TowerFacts:
    return TowerFacts(
        width=WIDTH,
        layers=len(tower.blocks),
        heads=HEADS,
        patch_size=(PATCH, PATCH),
        image_size=(IMAGE, IMAGE),
        feature_size=WIDTH,
        prefix=0,
        class_token=False,
        first_weight=tower.conv.weight,
    )


FAMILY = Family(
    towers={ToyTower: TemporalToyTower},
    attentions={ToyAttention: TemporalToyAttention},
    prompted={ToyTower: PromptedToyTower, TemporalToyTower: PromptedTemporalToyTower},
    layers=lambda tower: [block.attn for block in tower.blocks],
    expected="ToyAttention",
    require=_require_video,
    encoder=_encoder,
    facts=_facts,
)


def make_tower() -> ToyTower:
    torch.manual_seed(0)
    return ToyTower().eval()
