"""Changing the classes of a tower's modules in place, and back, shared by all families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from openvclip.errors import UnsupportedModelError
from openvclip.towers.view import FrameView

Classes = Mapping[type[nn.Module], type[nn.Module]]
Encoder = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """The towers that one library builds.

    Attributes:
        name: the library's; what else there is for its towers is in modules of this name.
        towers: each class of tower, and the class that it has once expanded.
        attentions: the same for the attention modules of a tower.
        layers: the attention modules of a tower in order. It raises
            :class:`UnsupportedModelError` where a layer can't be expanded for another reason
            than the class of its attention.
        expected: the classes of attention in words, for the error text.
        require: raises :class:`VideoShapeError` unless a tower, expanded or not, takes a video:
            the size of its frames and, where the tower does not convert it, its dtype.
        encoder: how to get features ``[n, D]`` from images, and ``[B, T, D]`` from videos where
            the model is expanded: a function of the model and the tensor. None where the model
            is not of this family.
        pooling: models that hold a tower and pool its tokens themselves, taking the first axis
            after the batch for that of the tokens. With frames there they would be wrong without
            a word.
    """

    name: str
    towers: Classes
    attentions: Classes
    layers: Callable[[Any], list[nn.Module]]
    expected: str
    require: Callable[[Any, Tensor], None]
    encoder: Callable[[nn.Module], Encoder | None]
    pooling: tuple[type[nn.Module], ...] = ()
    _plain: dict[type[nn.Module], type[nn.Module]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = {**self.towers, **self.attentions}
        object.__setattr__(self, "_plain", {temporal: plain for plain, temporal in pairs.items()})

    def find_towers(self, model: nn.Module) -> list[nn.Module]:
        """The towers in ``model``, expanded ones included.

        Raises:
            UnsupportedModelError: the model pools its tower's tokens itself.
        """
        if isinstance(model, self.pooling):
            raise UnsupportedModelError(
                f"{type(model).__name__} pools the tokens of its tower itself, which would mix "
                "the frames of a video. Take the tower out of it and use that alone."
            )
        kinds = {*self.towers.keys(), *self.towers.values()}
        return [module for module in model.modules() if type(module) in kinds]

    def n_layers(self, tower: nn.Module) -> int:
        """Number of attention layers of a tower."""
        return len(self.layers(tower))

    def expand(self, tower: nn.Module, views: list[FrameView]) -> None:
        """Change the classes of a tower and its attentions, one view for each layer.

        Raises:
            UnsupportedModelError: a layer's attention is of a class that is not known here.
        """
        attentions = self.layers(tower)
        for index, attention in enumerate(attentions):
            if type(attention) not in self.attentions:
                raise UnsupportedModelError(
                    f"Layer {index} of the tower has an attention of type "
                    f"{type(attention).__name__}; expected {self.expected}. Expand the model "
                    "before other tools replace or wrap its attention modules."
                )
        for attention, view in zip(attentions, views, strict=True):
            attention.__class__ = self.attentions[type(attention)]
            attention.view = view  # type: ignore[assignment]
        tower.__class__ = self.towers[type(tower)]

    def restore(self, tower: nn.Module) -> None:
        """Undo :meth:`expand`: the modules have their own classes and attributes again."""
        for attention in self.layers(tower):
            attention.__class__ = self._plain[type(attention)]
            del attention.view
        tower.__class__ = self._plain[type(tower)]


def call(model: Any, pixels: Tensor) -> Tensor:
    """The encoder of a tower that is called with the pixels and answers with the features."""
    features: Tensor = model(pixels)
    return features
