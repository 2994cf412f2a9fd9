"""Small models and exact comparisons that several test files share."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"  # numbers of the released implementations
FACTS = GOLDEN / "facts"  # numbers and names of the papers
# Real clips and the official lists of UCF-101 and HMDB-51: not part of the repository.
SHARED = REPO.parent / "shared"
DATA = SHARED / "data"
CLIPS = DATA / "clips"

needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips in ../shared/data/clips")
needs_lists = pytest.mark.skipif(not DATA.is_dir(), reason="no official lists in ../shared/data")

VISION = {"layers": 3, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TINY_PIXELS = 8

_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return tensor.detach().cpu().contiguous().view(_INTS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same names in the same order, and every entry bitwise the same."""
    assert list(a) == list(b)
    assert [name for name in a if not same_bits(a[name], b[name])] == []


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter random values, so that none sits at a neutral 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))
    return module


def tiny_tower(seed: int = 0, **changes: Any) -> VisionTransformer:
    """open_clip's vision tower: 3 layers, 2 heads, width 16, 5 tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "image_size": TINY_PIXELS,
        "patch_size": 4,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 8,
    }
    tower = VisionTransformer(**(settings | changes))
    randomise(tower, seed)
    return tower.eval()


def with_the_batch_second(tower: VisionTransformer) -> VisionTransformer:
    """Change a tower to the layout ``[N, B, D]``, which open_clip 4 no longer has."""
    if not hasattr(tower.transformer, "batch_first"):
        pytest.skip("towers of open_clip 4 always have the batch first")
    tower.transformer.batch_first = False
    for block in tower.transformer.resblocks:
        block.attn.batch_first = False
    return tower


def set_attention_dropout(tower: VisionTransformer, probability: float) -> None:
    """Set the dropout of the attention weights in each block."""
    for block in tower.transformer.resblocks:
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn.dropout = probability
        else:
            block.attn.attn_drop.p = probability


def tiny_clip(seed: int = 0, **vision: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    model = open_clip.CLIP(embed_dim=8, vision_cfg={**VISION, **vision}, text_cfg=dict(TEXT))
    return randomise(model, seed).eval()


def tiny_tokenizer(texts: list[str]) -> Tensor:
    """Characters as token ids, ended by the largest id as in CLIP; ``[len(texts), 8]``."""
    tokens = torch.zeros(len(texts), TEXT["context_length"], dtype=torch.long, device="cpu")
    for row, text in zip(tokens, texts, strict=True):
        ids = [1 + hash_of(text[i::6]) % 60 for i in range(6)]
        row[:7] = torch.tensor([*ids, 63])
    return tokens


def hash_of(text: str) -> int:
    """A hash that is the same in every process."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text))


def random_video(clips: int, frames: int, seed: int = 0, pixels: int = TINY_PIXELS) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(clips, frames, 3, pixels, pixels, generator=generator)


class Net(nn.Module):
    """Two layers, a batch norm with its buffers, and a frozen embedding: ``[B, 4] -> [B, 2]``."""

    def __init__(self, seed: int = 0, *, freeze: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(4, 4)
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)
        self.frozen.requires_grad_(not freeze)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(torch.tanh(self.frozen(x))))))


class Smooth(nn.Module):
    """A model without buffers, for gradient laws: ``[B, 4] -> [B, 2]``."""

    def __init__(self, seed: int = 0, *, freeze: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor(0.7))
        if freeze:
            self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(torch.tanh(self.first(x)))


def batch(seed: int = 0, n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 2, (n,), generator=generator)


def cross_entropy(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(seed, dtype=dtype)
    return functional.cross_entropy(model(x), y)


def jump(model: nn.Module, seed: int) -> None:
    """Give the trained parameters new random values, as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * parameter + noise.to(parameter.dtype))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded
