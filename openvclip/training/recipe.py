"""The settings of a training run: :class:`Recipe` (what is trained) and :class:`Run` (how).

``examples/finetune.py`` has a flag for each field that has a help text.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from openvclip.errors import RecipeError
from openvclip.weights.arguments import as_float, is_whole

VIFI_TOWERS: dict[str, Literal["both", "image", "text"]] = {
    "vifi": "both",
    "vifi-image": "image",
    "vifi-text": "text",
}
"""The methods of ViFi-CLIP's fine-tuning, and the towers that each of them trains."""

PROMPT_METHODS = ("bridge", "vita")
"""The methods that learn prompts for a frozen model."""

METHODS = ("openvclip", "finetune", "l2", "iwr", "swa", *VIFI_TOWERS, *PROMPT_METHODS)
"""The methods of training."""


def _setting(default: Any, text: str, **flag: Any) -> Any:
    """Return a field with a help text. ``flag`` holds options of the command-line flag."""
    return field(default=default, metadata={"help": text, **flag})


@dataclass(frozen=True)
class Recipe:
    """What is trained, and with which numbers. The defaults are the recipe of the paper.

    A step is an optimizer step. An epoch is one pass over the training videos.

    Raises:
        ValueError: ``method`` is not one of :data:`METHODS`, or a weight is negative.
    """

    method: str = _setting(
        "openvclip",
        "openvclip: iwr and swa; finetune: neither; l2: a penalty on the distance to CLIP; vifi: "
        "ViFi-CLIP's fine-tuning of both towers, or of one tower; bridge: ViFi-CLIP's prompts "
        "for a fine-tuned model; vita: Vita-CLIP's prompts",
        choices=METHODS,
    )
    epochs: int = _setting(22, "epochs, the warm-up included")
    warmup_epochs: int = _setting(2, "epochs of linear warm-up")
    lr: float = _setting(3.33e-6, "learning rate after the warm-up")
    warmup_start_lr: float = _setting(3.33e-8, "learning rate at the first step")
    end_lr: float = _setting(3.33e-8, "learning rate at the last step")
    weight_decay: float = _setting(0.01, "weight decay of AdamW for matrices")
    weight_decay_1d: float = _setting(0.0, "weight decay of AdamW for biases, norms and scales")
    clip_grad_norm: float = _setting(1.0, "largest norm of the gradient")
    batch_size: int = _setting(64, "videos in a step, on all devices together")
    alpha_max: float = _setting(
        0.6,
        "upper end of the interval from which the regulariser draws alpha, the weight of CLIP, "
        "uniformly",
    )
    iwr_weight: float = _setting(0.5, "C of Equation 9, the weight of the regulariser's loss")
    l2_weight: float = _setting(0.5, "factor of the squared distance to CLIP (method l2)")
    text_tower: bool = _setting(
        False, "train the text tower too; the texts of the classes are encoded in each step"
    )
    distill: float = _setting(
        0.0,
        "weight of FROSTER's feature distillation, for any method but bridge and vita (FROSTER: 2)",
    )
    text_energy: float = _setting(
        0.0,
        "weight of Lipsum-FT's loss of random texts, for any method that trains the image tower "
        "(all but bridge, vita and vifi-text)",
    )
    average_after: int = _setting(
        1,
        "epochs before the averaging begins. With 1, the first averaged model is the model after "
        "epoch 2, and the average is the mean of the models after epochs 2 to 22, as in the "
        "release",
    )
    averages_per_epoch: int = _setting(1, "models that enter the average in an epoch", at_least=1)
    lam: float = _setting(0.5, "weight of CLIP in the final interpolation")
    seed: int = _setting(0, "seed of the order of the videos, their augmentation and alpha")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"method={self.method!r}: expected one of {', '.join(METHODS)}.")
        for name in ("distill", "text_energy"):
            number = getattr(self, name)
            if not 0 <= as_float(number) < math.inf:
                raise RecipeError(f"{name}={number!r}: expected a finite number of at least 0.")
        if not is_whole(self.averages_per_epoch, 1):
            raise RecipeError(
                f"averages_per_epoch={self.averages_per_epoch!r}: expected a whole number, at "
                "least 1."
            )

    @property
    def uses_iwr(self) -> bool:
        """Whether the method adds the loss at the interpolated weights."""
        return self.method in ("openvclip", "iwr")

    @property
    def uses_swa(self) -> bool:
        """Whether the method averages the weights."""
        return self.method in ("openvclip", "swa")


@dataclass(frozen=True)
class Run:
    """How a recipe is run: options of the regulariser and the optimizer, precision and memory.

    Attributes:
        every: the regulariser is used in every ``every``-th step.
        share: share of the videos of a step on which the regulariser's loss is computed. The
            videos are drawn anew in each step.
        alpha_min: lower end of the interval of alpha.
        betas: betas of AdamW.
        steps: number of steps of the run. Default: the epochs of the recipe.
        accumulate: number of micro-batches of a process in a step.
        amp: dtype of autocast, ``torch.bfloat16`` or ``torch.float16``. Default: no autocast.
        checkpointing: recompute activations in the backward pass, which saves memory.
        compiler: backend of ``torch.compile`` for the layers of the towers. Default: not compiled.
        fsdp: shard the model among the processes (FSDP2). Default: each process has a copy (DDP).
    """

    every: int = _setting(1, "use the regulariser in every N-th step", at_least=1, metavar="N")
    share: float = _setting(
        1.0,
        "share of the videos of a step on which the regulariser's loss is computed, such as 0.25",
        is_share=True,
    )
    alpha_min: float = _setting(0.0, "lower end of the interval of alpha")
    betas: tuple[float, float] = _setting((0.9, 0.999), "betas of AdamW", nargs=2)
    steps: int | None = _setting(
        None, "steps of the run (default: as many as --epochs needs)", at_least=1
    )
    accumulate: int = 1
    amp: torch.dtype | None = None
    checkpointing: bool = _setting(
        False, "recompute activations in the backward pass, which saves memory"
    )
    compiler: str | None = None
    fsdp: bool = _setting(False, "shard the model among the processes (FSDP2)")


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe by name, without the newer losses if they are off.

    Runs and results that were saved before these losses existed have the same settings.
    """
    newer = ("text_tower", "distill", "text_energy")
    return {name: v for name, v in asdict(recipe).items() if v or name not in newer}


def total_steps(recipe: Recipe, run: Run, steps_per_epoch: int) -> int:
    """Return the number of steps of a whole run.

    Args:
        recipe: the recipe, which gives the number of epochs.
        run: the options of the run. ``run.steps`` replaces the number of epochs.
        steps_per_epoch: number of steps in an epoch.
    """
    return recipe.epochs * steps_per_epoch if run.steps is None else run.steps


def learning_rate(step: int, warmup: int, total: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine.

    The rate rises from ``recipe.warmup_start_lr`` to ``recipe.lr``, then falls to
    ``recipe.end_lr``.

    Args:
        step: number of the step, from 0.
        warmup: number of steps of the warm-up.
        total: number of steps of the run.
        recipe: the rates.
    """
    if step < warmup:
        return recipe.warmup_start_lr + (recipe.lr - recipe.warmup_start_lr) * step / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * 0.5 * (1 + math.cos(math.pi * progress))
