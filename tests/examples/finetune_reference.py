"""Algorithm 1 and the methods it is compared with, written out in plain code on tiny models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import openvclip
from openvclip.prompting import VideoClassifier
from openvclip.training.methods import attach_prompts
from openvclip.training.recipe import Recipe, learning_rate
from openvclip.weights.draws import Draws
from tests.helpers import random_video, tiny_clip, tiny_tokenizer

NAMES = ["one", "two", "three"]
TINY = Recipe(
    epochs=3,
    warmup_epochs=1,
    average_after=1,
    lr=1e-2,
    warmup_start_lr=1e-4,
    end_lr=1e-4,
    batch_size=2,
    seed=3,
)
Batches = Sequence[tuple[Tensor, Tensor]]


def batches(number: int = 2, size: int = 2) -> list[tuple[Tensor, Tensor]]:
    labels = torch.tensor([0, 2, 1, 2])
    return [(random_video(size, 3, i), labels.roll(-i)[:size]) for i in range(number)]


def classifier() -> openvclip.ZeroShotClassifier:
    model = openvclip.expand_temporal_attention(tiny_clip())
    return openvclip.ZeroShotClassifier(model, tiny_tokenizer, NAMES, ["{}"])


def vifi_classifier() -> VideoClassifier:
    return VideoClassifier(tiny_clip(), tiny_tokenizer, NAMES)


def prompted_classifier(method: str) -> VideoClassifier:
    model = tiny_clip()
    torch.manual_seed(7)
    numbers = {"vision_prompts": 2, "text_prompts": 1}
    depths = {"vision_depth": 2, "text_depth": 1} if method == "bridge" else {}
    attach_prompts(model, method, NAMES, 3, {**numbers, **depths}, class_prompts=True)
    return VideoClassifier(model, tiny_tokenizer, NAMES)


def classifier_of(method: str) -> openvclip.ZeroShotClassifier | VideoClassifier:
    if method in ("bridge", "vita"):
        return prompted_classifier(method)
    return vifi_classifier() if method.startswith("vifi") else classifier()


def vifi_logits(model: nn.Module, video: Tensor) -> Tensor:
    """ViFi-CLIP: the mean of the frames' features, then unit length; text features trained."""
    frames = torch.stack([model.encode_image(clip) for clip in video])  # type: ignore[operator]
    pooled = frames.mean(dim=1)
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    tokens = tiny_tokenizer([f"a photo of a {name}." for name in NAMES])
    text = model.encode_text(tokens)  # type: ignore[operator]
    text = text / text.norm(dim=-1, keepdim=True)
    return model.logit_scale.exp() * pooled @ text.T  # type: ignore[operator, union-attr]


def is_trained(name: str, method: str) -> bool:
    if method in ("bridge", "vita"):
        return name.startswith("openvclip_prompts.")
    if method == "vifi":
        return "token_embedding" not in name
    if method == "vifi-image":
        return name.startswith("visual.")
    if method == "vifi-text":
        return not name.startswith(("visual.", "token_embedding", "logit_scale"))
    return name.startswith("visual") or name == "logit_scale"


def trained_by_hand(
    recipe: Recipe,
    epoch_batches: Batches,
    *,
    every: int = 1,
    share: float = 1.0,
    low: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the last weights, and the mean of the weights after each epoch but the first.

    Args:
        recipe: the recipe.
        epoch_batches: the batches of an epoch, one for each step.
        every: the regulariser is used in every ``every``-th step.
        share: share of the videos on which the loss of the regulariser is computed.
        low: lower end of the interval of alpha.
        betas: betas of AdamW.
        steps: number of steps. Default: the epochs of the recipe.
    """
    clip_classifier = classifier_of(recipe.method)
    model = clip_classifier.model
    logits = (
        (lambda v: vifi_logits(model, v)) if recipe.method.startswith("vifi") else clip_classifier
    )
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if is_trained(name, recipe.method)]
    trained = [parameters[name] for name in names]
    for parameter in parameters.values():
        parameter.requires_grad_(any(parameter is one for one in trained))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0},
        ],
        betas=betas,
    )
    alphas, parts = torch.Generator().manual_seed(recipe.seed), Draws(recipe.seed)
    per_epoch, total = len(epoch_batches), steps or len(epoch_batches) * recipe.epochs
    snapshots: list[dict[str, Tensor]] = []
    for step in range(total):
        video, label = epoch_batches[step % per_epoch]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, per_epoch, total, recipe)
        loss = functional.cross_entropy(logits(video), label)
        if recipe.method == "l2":
            drift = sum(((parameters[n] - clip[n]) ** 2).sum() for n in names)
            loss = loss + recipe.l2_weight * drift
        gradient = list(torch.autograd.grad(loss, trained))
        if recipe.method in ("iwr", "openvclip") and step % every == 0:
            alpha = float(torch.rand((), generator=alphas, dtype=torch.float64))
            alpha = low + (recipe.alpha_max - low) * alpha
            weights = [p.detach().clone() for p in trained]
            with torch.no_grad():
                for n, p in zip(names, trained, strict=True):
                    p.copy_(alpha * clip[n] + (1 - alpha) * p)
            some = parts.part(len(label), round(share * len(label))) if share < 1 else slice(None)
            second_loss = functional.cross_entropy(logits(video[some]), label[some])
            second = torch.autograd.grad(second_loss, trained)
            with torch.no_grad():
                for p, old in zip(trained, weights, strict=True):
                    p.copy_(old)
            gradient = [a + recipe.iwr_weight * b for a, b in zip(gradient, second, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        for p, g in zip(trained, gradient, strict=True):
            p.grad = g * min(1.0, recipe.clip_grad_norm / (norm + 1e-6))
        optimizer.step()
        if (step + 1) % per_epoch == 0 and step + 1 > per_epoch:
            snapshots.append({n: v.clone() for n, v in model.state_dict().items()})
    mean = {n: torch.stack([k[n].double() for k in snapshots]).mean(0) for n in snapshots[0]}
    return {n: v.detach().clone() for n, v in model.state_dict().items()}, mean


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], method: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        left, right = value.double(), expected[name].reshape(value.shape).double()
        if method.startswith(("vifi", "vita")) and name.endswith("in_proj_bias"):
            # Softmax takes no notice of the bias of keys: its gradient is rounding noise, which
            # AdamW makes as large as any other. (Zero keys outside a clip have no bias.)
            left, right = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (left, right))
        text = f"{method} {name}: " + "{}"
        # Where a gradient is near zero its rounding decides on the length of AdamW's first steps,
        # which are of 1e-2.
        close = 1e-4 if method == "vita" else 1e-5
        torch.testing.assert_close(left, right, rtol=1e-4, atol=close, msg=text.format)
