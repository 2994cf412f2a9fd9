"""Weights that are given as a change of a base model, and take the place of a state dict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor


class RelativeWeights(ABC):
    """A fine-tuned model that is given as its change of a base model, such as a LoRA adapter.

    Functions that take the original CLIP and a fine-tuned model accept it as the fine-tuned model.
    """

    @abstractmethod
    def on(self, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the fine-tuned model as a mapping with the names of ``base``.

        Values that changed are computed at each access. All others are the tensors of ``base``.
        """


FineTuned: TypeAlias = Mapping[str, Tensor] | RelativeWeights
"""A fine-tuned model: its state dict, or the adapter of a LoRA fine-tune."""


def resolved(theta: FineTuned, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a fine-tuned model as a mapping. A state dict is returned unchanged.

    Args:
        theta: a state dict, or a change of ``base``.
        base: the state dict of the original model.
    """
    return theta.on(base) if isinstance(theta, RelativeWeights) else theta
