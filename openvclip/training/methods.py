"""The parts of a method: trained parameters, optimizer, weight average and classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from openvclip import prompting
from openvclip.errors import UsageError
from openvclip.models.classifier import ZeroShotClassifier
from openvclip.models.text_weights import text_names
from openvclip.prompting import VideoClassifier
from openvclip.training.recipe import PROMPT_METHODS, VIFI_TOWERS, Recipe
from openvclip.weights.averaging import SWATracker
from openvclip.weights.l2 import L2ToAnchor

Classifier = ZeroShotClassifier | VideoClassifier
TEXT_TOWER_TEMPLATE = "a video of {}."
"""The text of a class in training, if an expanded model trains its text tower."""
Tokenizer = Callable[[list[str]], Tensor]


def is_expanded(method: str) -> bool:
    """Return whether a method expands the temporal attention.

    ViFi-CLIP and Vita-CLIP keep CLIP's attention within a frame.
    """
    return method not in VIFI_TOWERS and method not in PROMPT_METHODS


def attach_prompts(
    model: nn.Module,
    method: str,
    names: Sequence[str],
    frames: int,
    numbers: Mapping[str, Any],
    *,
    class_prompts: bool,
) -> None:
    """Attach the prompts of ``bridge`` or ``vita``, in place. For other methods, do nothing.

    Args:
        model: an open_clip model.
        method: one of :data:`openvclip.training.recipe.METHODS`.
        names: names of the training classes.
        frames: number of frames of a clip.
        numbers: ``vision_prompts``, ``text_prompts``, ``vision_depth`` and ``text_depth``. Numbers
            that are left out have the method's default.
        class_prompts: learn text prompts for each class (Vita-CLIP).
    """
    if method == "bridge":
        prompting.attach_vifi(model, **numbers)
    elif method == "vita":
        renamed = {"vision_prompts": "global_prompts", "text_prompts": "text_prompts"}
        sizes = {new: numbers[old] for old, new in renamed.items() if old in numbers}
        prompting.attach_vita(
            model, frames=frames, class_names=list(names) if class_prompts else None, **sizes
        )


def make_classifier(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    method: str,
    template: str | None = None,
    *,
    text_tower: bool = False,
) -> Classifier:
    """Return a classifier with the pooling and the texts of a method.

    Args:
        model: an open_clip model, with prompts if the method learns prompts.
        tokenizer: tokenizer of the model.
        names: names of the classes.
        method: one of :data:`openvclip.training.recipe.METHODS`.
        template: a text with ``{}`` for the class name. Default: the templates of the method.
        text_tower: whether an expanded model trains its text tower too. Its texts are then encoded
            in each step, so the default is one template, ``"a video of {}."``.
    """
    if not is_expanded(method):
        return VideoClassifier(model, tokenizer, names, template)
    if text_tower:
        template = TEXT_TOWER_TEMPLATE if template is None else template
        return VideoClassifier(model, tokenizer, names, template, pooling="unit_frames")
    if template is not None:
        return ZeroShotClassifier(model, tokenizer, names, [template])
    return ZeroShotClassifier(model, tokenizer, names)


def trains_text(recipe: Recipe) -> bool:
    """Return whether a recipe trains the text tower."""
    if is_expanded(recipe.method):
        return recipe.text_tower
    return VIFI_TOWERS.get(recipe.method) in ("both", "text")


def choose_trained(model: nn.Module, method: str, *, text_tower: bool = False) -> None:
    """Set ``requires_grad`` of each parameter, in place.

    Open-VCLIP and its variants train the image tower and the logit scale. ViFi-CLIP trains both
    towers or one of them. Bridge and Vita-CLIP train the prompts alone.

    Args:
        model: the model that is trained.
        method: one of :data:`openvclip.training.recipe.METHODS`.
        text_tower: whether Open-VCLIP and its variants train the text tower too.

    Raises:
        PromptingError: the method learns prompts and the model has none, or the method learns no
            prompts and the model has some.
    """
    if method in PROMPT_METHODS:
        prompting.parameters(model)  # raises without prompts; attaching prompts froze the rest
        return
    if method in VIFI_TOWERS:
        prompting.fine_tune(model, VIFI_TOWERS[method])
        return
    # Names of open_clip, then names of Hugging Face.
    image_tower = ("visual.", "vision_model.", "visual_projection.")
    scale = ("logit_scale", "temperature")
    names = [name for name, _ in model.named_parameters()]
    texts = set(text_names(names)) if text_tower else set()
    for name, parameter in model.named_parameters():
        chosen = name.startswith(image_tower) or name in scale or name in texts
        parameter.requires_grad_(chosen)


@contextmanager
def text_made_once(classifier: nn.Module) -> Iterator[None]:
    """Return a context that computes the text features once, if training does not change them."""
    trained = isinstance(classifier, VideoClassifier) and classifier.text_features().requires_grad
    with nullcontext() if trained else fixed_text(classifier):
        yield


def fixed_text(classifier: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the text features of a classifier are computed once."""
    return classifier.fixed_text() if isinstance(classifier, VideoClassifier) else nullcontext()


def make_optimizer(
    trained: list[nn.Parameter], recipe: Recipe, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Return AdamW with two weight decays.

    Parameters of fewer than two axes (biases, norms, scales) have ``recipe.weight_decay_1d``, all
    other parameters ``recipe.weight_decay``.

    Args:
        trained: the parameters to train.
        recipe: the recipe, which gives the learning rate and the weight decays.
        betas: the betas of AdamW.
    """
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": recipe.weight_decay_1d},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas)


def make_tracker(model: nn.Module, recipe: Recipe, steps_per_epoch: int, total: int) -> SWATracker:
    """Return the tracker that averages the weights along a run.

    Args:
        model: the model that is trained.
        recipe: the averaging begins after ``recipe.average_after`` epochs.
        steps_per_epoch: number of steps in an epoch.
        total: number of steps of the run.

    Raises:
        UsageError: the run ends before the first model enters the average.
    """
    every = max(1, steps_per_epoch // recipe.averages_per_epoch)
    start = recipe.average_after * steps_per_epoch
    if start + every > total:
        raise UsageError(
            f"No model would enter the average: {total // steps_per_epoch} epochs of training "
            f"end before the first averaged model (--average-after {recipe.average_after}). Train "
            "longer or lower --average-after."
        )
    return SWATracker(model, start=start, every=every)


def make_distance_penalty(
    model: nn.Module, clip: Mapping[str, Tensor], recipe: Recipe
) -> L2ToAnchor | None:
    """Return the penalty on the distance to the original CLIP, if the method has one (``l2``).

    Args:
        model: the model that is trained, sharded or not.
        clip: state dict of the original CLIP.
        recipe: gives the method and the factor of the squared distance.
    """
    return L2ToAnchor(model, clip, weight=recipe.l2_weight) if recipe.method == "l2" else None


def add_distance_penalty(model: nn.Module, clip: Mapping[str, Tensor], weight: float) -> None:
    """Add the gradient of ``weight`` times the squared L2 distance to the original CLIP (Table 5).

    Args:
        model: the model, with gradients.
        clip: state dict of the original CLIP.
        weight: factor of the squared distance.
    """
    L2ToAnchor(model, clip, weight=weight).add_gradients()
