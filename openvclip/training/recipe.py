"""The paper's recipe as numbers, and how it can be run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

VIFI: dict[str, Literal["both", "image", "text"]] = {
    "vifi": "both",
    "vifi-image": "image",
    "vifi-text": "text",
}
"""ViFi-CLIP's fine-tuning, and what of CLIP it trains."""

PROMPTED = ("bridge", "vita")
"""The methods that learn prompts for a frozen model."""

METHODS = ("openvclip", "finetune", "l2", "iwr", "swa", *VIFI, *PROMPTED)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train. Steps are optimizer steps; an epoch is one pass over the loader."""

    method: str = _setting(
        "openvclip",
        "openvclip = iwr + swa; finetune = neither; l2 = penalty on the distance to CLIP; vifi = "
        "ViFi-CLIP's fine-tuning, text tower too, or of one tower; bridge = ViFi-CLIP's prompts "
        "for a fine-tuned model; vita = Vita-CLIP's prompts",
    )
    epochs: int = _setting(22, "passes over the videos, the warm-up included")
    warmup_epochs: int = _setting(2, "epochs of linear warm-up")
    lr: float = _setting(3.33e-6, "learning rate after the warm-up")
    warmup_start_lr: float = _setting(3.33e-8, "learning rate at the first step")
    end_lr: float = _setting(3.33e-8, "learning rate at the last step")
    weight_decay: float = _setting(0.01, "AdamW's weight decay, for matrices")
    weight_decay_1d: float = _setting(0.0, "the same for biases, norms and scales")
    clip_grad_norm: float = _setting(1.0, "largest norm of the gradient")
    batch_size: int = _setting(64, "videos per step")
    alpha_max: float = _setting(
        0.6, "alpha of the regulariser is uniform in [0, alpha_max]; it weighs CLIP"
    )
    iwr_weight: float = _setting(0.5, "C of Equation 9")
    l2_weight: float = _setting(0.5, "factor of the squared distance to CLIP (method l2)")
    average_after: int = _setting(
        1,
        "epochs before the averaging begins; the first model is that of an epoch later, so 1 is "
        "the release's mean of the epochs 2 to 22, the first of which ends the warm-up",
    )
    averages_per_epoch: int = _setting(1, "models of an epoch that enter the average")
    lam: float = _setting(0.5, "weight of CLIP in the final interpolation")
    seed: int = _setting(0, "seed of the order of the videos, their augmentation and alpha")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(METHODS)}.")

    @property
    def uses_iwr(self) -> bool:
        """Whether the loss of interpolated weights is added."""
        return self.method in ("openvclip", "iwr")

    @property
    def uses_swa(self) -> bool:
        """Whether weights are averaged."""
        return self.method in ("openvclip", "swa")


@dataclass(frozen=True)
class Run:
    """How a recipe is run: variations of regulariser and optimizer, and what devices need.

    Attributes:
        every: steps from one with the regulariser to the next.
        alpha_min: lower end of the interval of alpha.
        betas: AdamW's.
        steps: all steps of the run, in place of the recipe's epochs.
        accumulate: batches of the loader that make a step.
        amp: autocast to this dtype (bfloat16 or float16).
        checkpointing: compute activations again instead of keeping them.
        compiler: backend of ``torch.compile`` for the towers' layers.
        fsdp: shard the model among the processes instead of copying it.
    """

    every: int = 1
    alpha_min: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int | None = None
    accumulate: int = 1
    amp: torch.dtype | None = None
    checkpointing: bool = False
    compiler: str | None = None
    fsdp: bool = False


def total_steps(recipe: Recipe, run: Run, steps_per_epoch: int) -> int:
    """Optimizer steps of a whole run."""
    return recipe.epochs * steps_per_epoch if run.steps is None else run.steps


def learning_rate(step: int, warmup: int, total: int, recipe: Recipe) -> float:
    """Linear from ``warmup_start_lr`` to ``lr``, then half a cosine to ``end_lr``."""
    if step < warmup:
        return recipe.warmup_start_lr + (recipe.lr - recipe.warmup_start_lr) * step / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * 0.5 * (1 + math.cos(math.pi * done))
