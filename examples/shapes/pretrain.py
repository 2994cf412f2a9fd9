"""Contrastive pretraining of the CLIPs on captioned stills that are drawn on the fly.

``python -m examples.shapes.pretrain --out weights.safetensors`` reproduces the committed weights of
the model of size "small". For the other sizes, ``--backbone tiny`` and ``--backbone wider``, only
the image tower is trained, with the frozen text tower of "small", and the file contains only the
image tower. This is the reverse of "LiT" (Zhai et al., 2022), where the image tower is frozen.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from examples.shapes.drawing import draw_images
from examples.shapes.model import (
    BACKBONES,
    Backbone,
    Tokenizer,
    create_model,
    image_tower,
    normalise,
    text_tower,
)
from examples.shapes.world import ACTIONS, COLOURS, SHAPES, TEMPLATES, still_caption
from openvclip.checkpoints import save_checkpoint
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command

if TYPE_CHECKING:
    from open_clip import CLIP

__all__ = [
    "Batch",
    "caption_targets",
    "contrastive_loss",
    "draw_batch",
    "pretrain",
    "still_accuracy",
]

Attributes = NDArray[np.int64]

Texts = Callable[[list[str]], Tensor]
"""Function from captions to normalised features ``[B, D]``."""

_COLOUR_NAMES = tuple(COLOURS)
# Marks an attribute that a caption does not mention.
_UNMENTIONED = -1


def pretrain(
    *,
    steps: int = 2400,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    warmup: int = 100,
    seed: int = 0,
    shapes: int = len(SHAPES),
    actions: int = len(ACTIONS),
    start: str | os.PathLike[str] | None = None,
    backbone: Backbone = "small",
    progress: bool = True,
    model: tuple[CLIP, Tokenizer] | None = None,
    batches: Iterable[Batch] | None = None,
) -> tuple[CLIP, Tokenizer]:
    """Train a CLIP with AdamW, linear warm-up and cosine decay to zero.

    The model of size ``"small"`` is trained from scratch. For the other sizes, only the image tower
    and the logit scale are trained, with the text tower of the committed small model.

    Args:
        steps: number of optimizer steps.
        batch_size: number of captioned stills per step.
        lr: largest learning rate.
        weight_decay: weight decay of matrices. Vectors and embeddings have no weight decay.
        warmup: number of steps of linear warm-up, at most a tenth of all steps.
        seed: seed of the initial weights and of the stills.
        shapes: number of shapes to draw; fewer shapes are learnt faster.
        actions: number of actions to draw.
        start: file of initial weights. Default: random weights.
        backbone: size of the image tower.
        progress: whether to show a progress bar.
        model: a model with its tokenizer, on its device, in place of one of size ``backbone``. Only
            its image tower is trained.
        batches: at least ``steps`` batches. Default: they are drawn with ``seed``.

    Returns:
        The model in eval mode, and its tokenizer.
    """
    torch.manual_seed(seed)
    if batches is None:
        rng = np.random.default_rng(seed)
        batches = (draw_batch(batch_size, rng, shapes, actions) for _ in range(steps))
    clip, tokenizer = model or create_model(start, backbone=backbone)
    texts = _trained_texts(clip, tokenizer)
    if model is not None or backbone != "small":
        texts = _locked_texts(clip, tokenizer)
    return _train(clip, texts, batches, steps, lr, weight_decay, warmup, progress), tokenizer


def _train(
    model: CLIP,
    texts: Texts,
    batches: Iterable[Batch],
    steps: int,
    lr: float,
    weight_decay: float,
    warmup: int,
    progress: bool,
) -> CLIP:
    device = model.logit_scale.device
    model.train()
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _pace(step, steps, min(warmup, steps // 10))
    )
    bar = tqdm(range(steps), desc="pretraining", unit="step", disable=None if progress else True)
    for step, batch in zip(bar, batches, strict=False):
        loss = contrastive_loss(
            model.encode_image(normalise(batch.pixels).to(device), normalize=True),
            texts(batch.captions),
            model.logit_scale.exp(),
            torch.as_tensor(batch.matches).to(device),
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


class Batch(NamedTuple):
    """Captioned stills.

    Attributes:
        pixels: the stills, ``[B, 32, 32, 3]``.
        captions: a caption of each still.
        matches: see :func:`caption_targets`.
    """

    pixels: NDArray[np.uint8]
    captions: list[str]
    matches: Tensor


def draw_batch(
    count: int,
    rng: np.random.Generator,
    shapes: int = len(SHAPES),
    actions: int = len(ACTIONS),
) -> Batch:
    """Draw captioned stills of the first ``shapes`` shapes and the first ``actions`` actions."""
    drawn, mentioned = _draw_attributes(count, rng, shapes, actions)
    pixels = draw_images(drawn[:, 0], drawn[:, 2], drawn[:, 1], rng)
    return Batch(pixels, _captions(mentioned, rng), caption_targets(drawn, mentioned))


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor, matches: Tensor
) -> Tensor:
    """Symmetric cross entropy over images and captions, with several right captions for an image.

    Args:
        image_features: normalised image features, ``[B, D]``.
        text_features: normalised text features, ``[B, D]``.
        scale: factor of the cosine similarities, a scalar.
        matches: ``[B, B]``, 1 if the caption (column) fits the image (row). The diagonal is 1.

    Returns:
        The mean of both directions, a scalar.
    """
    logits = scale * image_features @ text_features.T
    rows = matches / matches.sum(1, keepdim=True)
    columns = matches.T / matches.sum(0, keepdim=True).T
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def caption_targets(drawn: Attributes, mentioned: Attributes) -> Tensor:
    """Return 1 for each image (row) that fits a caption (column) and 0 otherwise, ``[B, B]``.

    There are few different captions, so a batch contains the same caption several times. A caption
    without a colour fits images of every colour. If only the diagonal were 1, the model would learn
    to separate matching pairs.

    Args:
        drawn: shape, action and colour of each image, ``[B, 3]``.
        mentioned: shape, action and colour of each caption, ``[B, 3]``; -1 for an attribute that
            the caption does not mention.
    """
    fits = (drawn[:, None] == mentioned[None]) | (mentioned[None] == _UNMENTIONED)
    return torch.from_numpy(fits.all(-1)).float()


@torch.no_grad()
def still_accuracy(
    model: CLIP,
    tokenizer: Tokenizer,
    *,
    count: int = 2048,
    seed: int = 10_000,
    shapes: int = len(SHAPES),
    actions: int = len(ACTIONS),
) -> dict[str, float]:
    """Measure the zero-shot accuracy on held-out stills.

    Args:
        model, tokenizer: the results of :func:`pretrain`.
        count: number of stills.
        seed: seed of the stills; must differ from the seed of the pretraining.
        shapes, actions: see :func:`pretrain`.

    Returns:
        Accuracies in [0, 1] of a prediction among ``shapes x actions`` classes. ``"class"``: the
        predicted class is right. ``"shape"``: its shape is right. ``"action"``: its action is
        right.
    """
    rng = np.random.default_rng(seed)
    drawn, _ = _draw_attributes(count, rng, shapes, actions)
    images = normalise(draw_images(drawn[:, 0], drawn[:, 2], drawn[:, 1], rng))
    names = [f"{shape} {action}" for shape in SHAPES[:shapes] for action in ACTIONS[:actions]]
    texts = torch.stack(
        [
            model.encode_text(tokenizer([t.format(n) for n in names]), normalize=True)
            for t in TEMPLATES
        ]
    )
    logits = model.encode_image(images, normalize=True) @ F.normalize(texts.mean(0), dim=-1).T
    chosen = logits.argmax(1).numpy()
    shape, action = chosen // actions == drawn[:, 0], chosen % actions == drawn[:, 1]
    return {
        "shape": float(shape.mean()),
        "action": float(action.mean()),
        "class": float((shape & action).mean()),
    }


def _trained_texts(model: CLIP, tokenizer: Tokenizer) -> Texts:
    return lambda captions: model.encode_text(tokenizer(captions), normalize=True)


def _locked_texts(model: CLIP, tokenizer: Tokenizer) -> Texts:
    """Load the committed text tower into the model and freeze it; compute each caption once."""
    locked = text_tower()
    model.load_state_dict(locked, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in locked)
    known: dict[str, Tensor] = {}

    @torch.no_grad()
    def texts(captions: list[str]) -> Tensor:
        new = list(dict.fromkeys(caption for caption in captions if caption not in known))
        if new:
            tokens = tokenizer(new).to(model.logit_scale.device)
            known.update(zip(new, model.encode_text(tokens, normalize=True), strict=True))
        return torch.stack([known[caption] for caption in captions])

    return texts


def _draw_attributes(
    count: int, rng: np.random.Generator, shapes: int, actions: int
) -> tuple[Attributes, Attributes]:
    """Draw shape, action and colour of stills, ``[B, 3]``, and the attributes in their captions."""
    kinds = (shapes, actions, len(_COLOUR_NAMES))
    drawn = np.stack([rng.integers(0, kind, count) for kind in kinds], axis=1)
    mentioned = drawn.copy()
    mentioned[rng.random(count) < 0.1, 1] = _UNMENTIONED
    mentioned[rng.random(count) < 0.6, 2] = _UNMENTIONED
    return drawn, mentioned


def _captions(mentioned: Attributes, rng: np.random.Generator) -> list[str]:
    captions = []
    for shape, action, colour in mentioned.tolist():
        action_name = None if action == _UNMENTIONED else ACTIONS[action]
        colour_name = None if colour == _UNMENTIONED else _COLOUR_NAMES[colour]
        captions.append(still_caption(SHAPES[shape], action_name, colour_name, rng))
    return captions


def _parameter_groups(model: CLIP, weight_decay: float) -> list[dict[str, object]]:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (plain if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _pace(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@command
def main(argv: list[str] | None = None) -> None:
    """Pretrain, print the accuracy on held-out stills, and write the weights."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file to write the weights to (safetensors, half precision)",
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="small", help=f"size of the image tower {default}"
    )
    parser.add_argument("--steps", type=int, default=2400, help=f"optimizer steps {default}")
    parser.add_argument("--batch-size", type=int, default=256, help=f"stills per step {default}")
    parser.add_argument("--lr", type=float, default=2e-3, help=f"largest learning rate {default}")
    parser.add_argument("--seed", type=int, default=0, help=f"seed of the training {default}")
    args = parser.parse_args(argv)
    model, tokenizer = pretrain(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        backbone=args.backbone,
    )
    state = model.state_dict()
    saved = state if args.backbone == "small" else image_tower(state)
    save_checkpoint(saved, args.out, dtype=torch.float16)
    model, tokenizer = create_model(args.out, backbone=args.backbone)
    for kind, accuracy in still_accuracy(model, tokenizer).items():
        print(f"{kind:>6} accuracy on held-out stills: {accuracy:.1%}")
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
