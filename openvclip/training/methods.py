"""What each method trains, with what optimizer, and the classifier that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import openvclip
from openvclip import prompting
from openvclip.errors import UsageError
from openvclip.prompting import VideoClassifier
from openvclip.training.recipe import PROMPTED, VIFI, Recipe
from openvclip.weights.shards import local, local_like

Classifier = openvclip.ZeroShotClassifier | VideoClassifier
Tokenizer = Callable[[list[str]], Tensor]


def is_expanded(method: str) -> bool:
    """Whether frames attend to their neighbours; ViFi-CLIP and Vita-CLIP leave CLIP's attention."""
    return method not in VIFI and method not in PROMPTED


def attach_prompts(
    model: nn.Module,
    method: str,
    names: Sequence[str],
    frames: int,
    numbers: Mapping[str, Any],
    *,
    class_prompts: bool,
) -> None:
    """Give the model the prompts that a method learns; other methods leave it as it is.

    Args:
        model: where they go, in place.
        method: one of :data:`openvclip.training.recipe.METHODS`.
        names: the training classes.
        frames: of a clip.
        numbers: ``vision_prompts``, ``text_prompts``, ``vision_depth`` and ``text_depth``, the
            ones that differ from the method's own.
        class_prompts: whether each class has text prompts of its own (Vita-CLIP).
    """
    if method == "bridge":
        prompting.attach_vifi(model, **numbers)
    elif method == "vita":
        renamed = {"vision_prompts": "global_prompts", "text_prompts": "text_prompts"}
        own = {new: numbers[old] for old, new in renamed.items() if old in numbers}
        prompting.attach_vita(
            model, frames=frames, class_names=list(names) if class_prompts else None, **own
        )


def make_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    method: str,
    template: str | None = None,
) -> Classifier:
    """A classifier with the pooling and the texts of a method.

    Args:
        model: with the method's prompts, where it learns some.
        tokenizer: the model's.
        names: the classes.
        method: one of :data:`openvclip.training.recipe.METHODS`.
        template: one text with ``{}`` in place of the method's own.
    """
    if not is_expanded(method):
        return VideoClassifier(model, tokenizer, names, template)
    if template is not None:
        return openvclip.ZeroShotClassifier(model, tokenizer, names, [template])
    return openvclip.ZeroShotClassifier(model, tokenizer, names)


def choose_trained(model: nn.Module, method: str) -> None:
    """Train the image tower and the logit scale, the text tower stays CLIP's.

    ViFi-CLIP trains both towers or one of them; bridge and Vita-CLIP train the prompts alone.

    Raises:
        PromptingError: the model lacks the prompts that are to be trained, or has some already.
    """
    if method in PROMPTED:
        prompting.parameters(model)  # attaching them froze the rest
        return
    if method in VIFI:
        prompting.fine_tune(model, VIFI[method])
        return
    image = ("visual.", "vision_model.", "visual_projection.")  # open_clip's, and Hugging Face's
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(image) or name == "logit_scale")


@contextmanager
def text_made_once(classifier: Classifier) -> Iterator[None]:
    """A block in which features of texts that nothing changes are not made anew in each step."""
    learns = isinstance(classifier, VideoClassifier) and classifier.text_features().requires_grad
    with nullcontext() if learns else fixed_text(classifier):
        yield


def fixed_text(classifier: Classifier) -> AbstractContextManager[None]:
    """A block in which text features stay as they are, where the classifier makes them anew."""
    return classifier.fixed_text() if isinstance(classifier, VideoClassifier) else nullcontext()


def make_optimizer(
    trained: list[nn.Parameter], recipe: Recipe, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW, with a weight decay of their own for parameters of less than two axes."""
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": recipe.weight_decay_1d},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas)


def make_tracker(
    model: nn.Module, recipe: Recipe, steps_per_epoch: int, total: int
) -> openvclip.SWATracker:
    """The average of a run of ``total`` steps.

    Raises:
        UsageError: no model would enter it.
    """
    every = max(1, steps_per_epoch // recipe.averages_per_epoch)
    start = recipe.average_after * steps_per_epoch
    if start + every > total:
        raise UsageError(
            f"No model would enter the average: {total // steps_per_epoch} epochs end before it "
            f"begins (--average-after {recipe.average_after}). Train longer or average earlier."
        )
    return openvclip.SWATracker(model, start=start, every=every)


@torch.no_grad()
def add_distance_penalty(model: nn.Module, clip: dict[str, Tensor], weight: float) -> None:
    """Add the gradient of ``weight`` times the squared L2 distance to CLIP (Table 5)."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            drift = local(parameter) - local_like(clip[name], parameter)
            local(parameter.grad).add_(drift.mul_(2 * weight))
