"""Small models and a tokenizer of words, for the tests of regularisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import openvclip
from tests.helpers import TEXT, hash_of, tiny_clip

NAMES = ["one", "two", "three"]
START, END = 62, 63  # the end is the largest id, as in CLIP


def words(texts: list[str]) -> Tensor:
    """One token for each word, between a start and an end; ``[n, 8]``."""
    tokens = torch.zeros(len(texts), TEXT["context_length"], dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *(1 + hash_of(word) % 60 for word in text.split()), END]
        ids = ids if len(ids) <= len(row) else [*ids[: len(row) - 1], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def expanded() -> nn.Module:
    return openvclip.expand_temporal_attention(tiny_clip())


def slow_projected(features: Tensor, first: Tensor, last: Tensor, residual: float) -> Tensor:
    """``z + r P(z)`` of one feature, with the sums written out."""
    z = features / features.square().sum().sqrt()
    hidden = torch.stack([(row * z).sum() for row in first])
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return z + residual * torch.stack([(row * hidden).sum() for row in last])


def slow_gap(z: Tensor, original: Tensor) -> Tensor:
    """``1 - cos`` of two vectors."""
    return 1 - (z * original).sum() / (z.square().sum().sqrt() * original.square().sum().sqrt())


def slow_energy(
    images: Tensor, originals: Tensor, texts: Tensor, scale: Tensor | float, weight: float
) -> Tensor:
    """The loss of Lipsum-FT, one image and one text at a time."""
    total = images.new_zeros(())
    for f, f0 in zip(images.flatten(0, -2), originals.flatten(0, -2), strict=True):
        for t in texts:
            now = scale * (functional.normalize(f, dim=0) * t).sum()
            before = scale * (functional.normalize(f0, dim=0) * t).sum()
            total = total + 0.5 * (now - before) ** 2 / len(texts)
    return weight * total / images.flatten(0, -2).shape[0]
