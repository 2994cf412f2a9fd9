"""Tiny models, and reference implementations of the papers' prompts: loops in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor
from torch.nn import functional

from tests.helpers import VISION, hash_of, randomise

CONTEXT = 12
START, DOT, END = 61, 62, 63
TEXT = {"context_length": CONTEXT, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3}
NAMES = ["surfing", "juggling balls", "riding a bike"]


def prompt_clip(seed: int = 0, **vision: Any) -> open_clip.CLIP:
    """A CLIP whose towers have 3 layers, 2 heads and width 16; texts of 12 tokens."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(embed_dim=8, vision_cfg={**VISION, **vision}, text_cfg=dict(TEXT))
    return randomise(model, seed).eval()


def words_of(text: str) -> list[int]:
    return [DOT if w == "." else 1 + hash_of(w) % 60 for w in re.findall(r"\w+|\.", text)]


def word_tokenizer(texts: list[str]) -> Tensor:
    """One token per word between a start token and an end token with the largest id, as in CLIP."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long, device="cpu")
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *words_of(text)[: CONTEXT - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# --- the parts of a tower ----------------------------------------------------------------------


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def norm(layer: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()


def attend(attn: Any, queries: Tensor, seen: list[Tensor]) -> Tensor:
    """Attention of query n of ``[N, W]`` over the tokens ``seen[n]``, ``[M, W]``."""
    weight, bias = attn.in_proj_weight.double(), attn.in_proj_bias.double()
    width = queries.shape[-1]
    d = width // attn.num_heads
    rows = []
    for query, tokens in zip(queries, seen, strict=True):
        q = query @ weight[:width].T + bias[:width]
        k = tokens @ weight[width : 2 * width].T + bias[width : 2 * width]
        v = tokens @ weight[2 * width :].T + bias[2 * width :]
        heads = []
        for h in range(attn.num_heads):
            part = slice(h * d, (h + 1) * d)
            shares = torch.softmax(k[:, part] @ q[part] / math.sqrt(d), dim=0)
            heads.append(shares @ v[:, part])
        rows.append(torch.cat(heads))
    return linear(attn.out_proj, torch.stack(rows))


def mlp(block: Any, x: Tensor) -> Tensor:
    hidden = linear(block.mlp.c_fc, norm(block.ln_2, x))
    if isinstance(block.mlp.gelu, QuickGELU):
        hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    else:
        hidden = functional.gelu(hidden)
    return x + linear(block.mlp.c_proj, hidden)


def patches_of(tower: Any, clip: Tensor) -> Tensor:
    """Class and patch tokens with their positions, ``[T, N, W]``, before the first norm."""
    patches = functional.conv2d(clip.double(), tower.conv1.weight.double(), stride=tower.patch_size)
    first = tower.class_embedding.double().expand(len(clip), 1, -1)
    tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    return tokens + tower.positional_embedding.double()


def feature(tower: Any, tokens: Tensor) -> Tensor:
    return norm(tower.ln_post, tokens[0]) @ tower.proj.double()


# --- ViFi-CLIP ---------------------------------------------------------------------------------


@torch.no_grad()
def vifi_frames(tower: Any, prompts: Tensor, video: Tensor) -> Tensor:
    """Features ``[B, T, D]``: prompts ``[depth, n, W]`` after the patches of each frame."""
    prompts = prompts.double()
    features = []
    for frame in video.flatten(0, 1):
        x = torch.cat([patches_of(tower, frame[None])[0], prompts[0]])
        x = norm(tower.ln_pre, x)
        n = len(x) - prompts.shape[1]
        for layer, block in enumerate(tower.transformer.resblocks):
            if 0 < layer < len(prompts):
                x[n:] = prompts[layer]
            z = norm(block.ln_1, x)
            x = mlp(block, x + attend(block.attn, z, [z] * len(z)))
        features.append(feature(tower, x))
    return torch.stack(features).unflatten(0, video.shape[:2])


# --- Vita-CLIP ---------------------------------------------------------------------------------


@torch.no_grad()
def vita_frames(tower: Any, prompts: Any, video: Tensor) -> Tensor:
    """Features ``[B, T, D]``: tokens attend to tokens and prompts. No prompt leaves its layer."""
    features = []
    for clip in video:
        x = patches_of(tower, clip)
        if prompts.time_embedding is not None:
            x = x + nearest(prompts.time_embedding.double(), len(clip))[:, None]
        x = norm(tower.ln_pre, x)
        for layer, block in enumerate(tower.transformer.resblocks):
            shared, single = vita_prompts(prompts, layer, x[:, 0])
            frames = []
            for t in range(len(clip)):
                tokens = torch.cat([x[t], shared, single[t]])
                z = norm(block.ln_1, tokens)
                n = x.shape[1]
                frames.append(mlp(block, x[t] + attend(block.attn, z[:n], [z] * n)))
            x = torch.stack(frames)
        features.append(torch.stack([feature(tower, frame) for frame in x]))
    return torch.stack(features)


def vita_prompts(prompts: Any, layer: int, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prompts of all frames ``[M, W]`` and of single frames ``[T, 0 or 1, W]``."""
    frames, width = classes.shape
    shared, single = [], classes.new_zeros(frames, 0, width)
    if prompts.global_prompts is not None:
        shared.append(prompts.global_prompts[layer].double())
    if prompts.cls_proj is not None:
        projected = linear(prompts.cls_proj[layer], classes)
        if prompts.local_prompts is not None:
            shared.append(nearest(prompts.local_prompts[layer].double(), frames) + projected)
        if prompts.summary is not None:
            part = prompts.summary[layer]
            z = norm(part.norm, projected)
            single = (projected + attend(part.attn, z, [z] * frames))[:, None]
    return torch.cat([classes.new_zeros(0, width), *shared]), single


def nearest(learned: Tensor, frames: int) -> Tensor:
    """Row ``floor(t * T0 / T)`` for each frame t."""
    return torch.stack([learned[t * len(learned) // frames] for t in range(frames)])


# --- texts -------------------------------------------------------------------------------------


@torch.no_grad()
def text_features(
    model: Any, context: list[Tensor], deep: list[Tensor], name_at: str, names: list[str]
) -> Tensor:
    """Features ``[K, D]`` of the names with prompts, computed text by text."""
    rows = []
    for name, vectors in zip(names, context, strict=True):
        embedded = [model.token_embedding.weight[i].double() for i in words_of(name)]
        start, dot, end = (model.token_embedding.weight[i].double() for i in (START, DOT, END))
        learned = list(vectors.double())
        half = len(learned) // 2
        among = {
            "end": [*learned, *embedded],
            "front": [*embedded, *learned],
            "middle": [*learned[:half], *embedded, *learned[half:]],
        }[name_at]
        sequence = torch.stack([start, *among, dot, end])
        x = sequence + model.positional_embedding[: len(sequence)].double()
        for layer, block in enumerate(model.transformer.resblocks):
            if 0 < layer <= len(deep):
                x[1 : 1 + len(learned)] = deep[layer - 1].double()
            z = norm(block.ln_1, x)
            x = mlp(block, x + attend(block.attn, z, [z[: i + 1] for i in range(len(z))]))
        rows.append(norm(model.ln_final, x)[-1] @ model.text_projection.double())
    return torch.stack(rows)
