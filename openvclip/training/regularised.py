"""A classifier whose forward pass also computes the losses of regularisers, for the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.models.classifier import ZeroShotClassifier
from openvclip.models.features import similarity_logits
from openvclip.models.tokenizers import Tokenizer
from openvclip.prompting import VideoClassifier
from openvclip.towers.temporal import encode_frames, pool_frames
from openvclip.training.distillation import FeatureDistillation
from openvclip.training.methods import Classifier, trains_text
from openvclip.training.original import OriginalCLIP
from openvclip.training.pairs import PairEncoder
from openvclip.training.recipe import PROMPT_METHODS, Recipe, Run
from openvclip.training.text_energy import TextEnergy

__all__ = ["RegularisedClassifier", "regularised"]


class RegularisedClassifier(nn.Module):
    """A classifier, and the losses that keep its features near those of the original CLIP.

    All modules that are trained are submodules, so that one wrapper (DDP) reduces all gradients.
    The original CLIP is no submodule.

    Args:
        classifier: the classifier that is trained. Its model has the original weights.
        recipe: the weights of the losses and the seed of the random texts.
        tokenizer: tokenizer of the model, for ``recipe.text_energy``.

    Attributes:
        classifier: as the argument.
        original: the original CLIP.
        distillation: the distillation with its projectors; ``None`` if its weight is 0.
        energy: the loss of random texts; ``None`` if its weight is 0.

    Raises:
        UsageError: ``recipe.text_energy`` is set without a tokenizer.
    """

    def __init__(
        self, classifier: Classifier, recipe: Recipe, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.original = OriginalCLIP(classifier.model)
        self._trains_text = trains_text(recipe) and isinstance(classifier, VideoClassifier)
        text = classifier.present_text()
        self.original_text: Tensor
        self.register_buffer("original_text", text.clone(), persistent=False)
        self.distillation: FeatureDistillation | None = None
        if recipe.distill:
            width = text.shape[-1]
            distillation = FeatureDistillation(width, weight=recipe.distill, seed=recipe.seed)
            # DDP waits for the gradient of each parameter that requires one.
            distillation.texts.requires_grad_(self._trains_text)
            self.distillation = distillation.to(text.device)
        self.energy = _energy(self.original, recipe, tokenizer) if recipe.text_energy else None

    def forward(
        self, video: Tensor, originals: Tensor, random_texts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of clips, and the sum of the losses of the regularisers.

        Args:
            video: clips ``[B, T, C, H, W]``.
            originals: the result of ``original.frames(video)``, ``[B, T, D]``.
            random_texts: the result of ``energy.draw()``; ``None`` without ``energy``.

        Returns:
            The logits ``[B, K]`` of the classifier, and a scalar.
        """
        classifier: Any = self.classifier
        frames = encode_frames(classifier.model, video)
        texts = classifier.text_features() if self._trains_text else self.original_text
        logits = similarity_logits(classifier.model, pool_frames(frames, classifier.pooling), texts)
        losses = []
        if self.distillation is not None:
            pair = (texts, self.original_text) if self._trains_text else ()
            losses.append(self.distillation.loss(frames, originals, *pair))
        if self.energy is not None:
            losses.append(self.energy.loss(frames, originals, random_texts))
        return logits, torch.stack(losses).sum()

    def regulariser_state(self) -> dict[str, Any]:
        """Return the projectors and the state of the random texts, for a checkpoint."""
        state: dict[str, Any] = {}
        if self.distillation is not None:
            state["projectors"] = self.distillation.state_dict()
        if self.energy is not None:
            state["energy"] = self.energy.state_dict()
        return state

    def load_regulariser_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`regulariser_state`."""
        if self.distillation is not None:
            self.distillation.load_state_dict(state["projectors"])
        if self.energy is not None:
            self.energy.load_state_dict(state["energy"])


def regularised(
    learner: Classifier | PairEncoder,
    recipe: Recipe,
    run: Run,
    tokenizer: Tokenizer | None = None,
) -> RegularisedClassifier | None:
    """Return a classifier with the regularisers of a recipe; ``None`` if the recipe has none.

    Args:
        learner: what is trained, with the original weights.
        recipe: ``distill`` and ``text_energy`` are the weights of the regularisers.
        run: options of the run.
        tokenizer: tokenizer of the model, for ``recipe.text_energy``.

    Raises:
        UsageError: the regularisers can't be used with this learner, method or run; or the recipe
            trains the text tower and the classifier does not.
    """
    if trains_text(recipe) and isinstance(learner, ZeroShotClassifier):
        raise UsageError(
            "The recipe trains the text tower, but a ZeroShotClassifier encodes the texts once. "
            "Use openvclip.training.make_classifier(..., text_tower=True)."
        )
    if not (recipe.distill or recipe.text_energy):
        return None
    reason = ""
    if isinstance(learner, PairEncoder):
        reason = "with the contrastive objective, which trains on captions"
    elif recipe.method in PROMPT_METHODS:
        reason = f"with the method {recipe.method}, which keeps the features' weights frozen"
    elif run.fsdp:
        reason = "with a sharded model (fsdp)"
    if reason or isinstance(learner, PairEncoder):
        raise UsageError(
            f"distill={recipe.distill:g} and text_energy={recipe.text_energy:g} can't be used "
            f"{reason}. Set both to 0."
        )
    return RegularisedClassifier(learner, recipe, tokenizer)


def _energy(original: OriginalCLIP, recipe: Recipe, tokenizer: Tokenizer | None) -> TextEnergy:
    if tokenizer is None:
        raise UsageError(
            f"text_energy={recipe.text_energy:g} draws random texts and needs the tokenizer of the "
            "model: pass tokenizer=."
        )
    return TextEnergy(original, tokenizer, weight=recipe.text_energy, seed=recipe.seed)
