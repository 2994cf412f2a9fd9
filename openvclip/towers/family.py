"""A family: the image towers of one library, and how they are expanded and prompted.

A tower is expanded by giving its modules other classes (``module.__class__ = ...``). Parameters,
buffers and hooks stay the same objects under the same names. Nothing is copied or added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from openvclip.errors import UnsupportedModelError, UsageError
from openvclip.towers.view import FrameView

Classes = Mapping[type[nn.Module], type[nn.Module]]
Encoder = Callable[[Any, Tensor], Tensor]


class TemporalTower:
    """Base of the classes that encode videos ``[B, T, C, H, W]`` beside images ``[B, C, H, W]``.

    Every expanded tower and every tower with prompts is an instance.
    """

    def __prepare_scriptable__(self) -> None:
        """Raise an error: ``torch.jit.script`` calls this method of each module.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "torch.jit.script does not support expanded towers and towers with prompts. Use "
            "torch.export.export(model, (video,)) or torch.jit.trace(model, video)."
        )


@dataclass(frozen=True)
class TowerFacts:
    """The sizes of an image tower, which prompts need.

    Attributes:
        width: width of the tokens, W.
        layers: number of layers.
        heads: number of attention heads in a layer.
        patch_size: size of a patch in pixels, ``(H, W)``.
        image_size: size of a frame in pixels, ``(H, W)``. None if the tower does not store it.
        feature_size: width of the features that the tower returns. None if the projection is in
            the model around the tower.
        prefix: number of tokens before the patch tokens.
        class_token: whether the first token is a class token.
        first_weight: weight of the class token. In a tower without a class token: the weight of
            the patch embedding.
    """

    width: int
    layers: int
    heads: int
    patch_size: Sequence[int]
    image_size: Sequence[int] | None
    feature_size: int | None
    prefix: int
    class_token: bool
    first_weight: Tensor


@dataclass(frozen=True)
class Family:
    """The image towers of one library, and how they are expanded and prompted.

    Attributes:
        towers: maps each class of plain towers to its expanded class.
        attentions: maps each class of plain attention modules to its expanded class. Instances of
            an expanded class have an attribute ``view``, see :class:`FrameView`.
        prompted: maps each class of towers, plain or expanded, to its class with prompts. Instances
            of a class with prompts have an attribute ``vision_prompts``.
        layers: function that returns the attention modules of a tower in order. It raises
            :class:`UnsupportedModelError` if the layers are of an unknown class.
        expected: the supported classes of attention modules in words, for an error text.
        require: function of a tower and a video. It raises :class:`VideoShapeError` if the tower
            can't encode frames of this size or dtype. The dtype is not checked if the tower
            converts the frames.
        encoder: function that returns the :data:`Encoder` of a model, or None if the model is not
            of this family. The encoder is a function of the model and a tensor. It returns features
            ``[n, D]`` for images, and ``[B, T, D]`` for videos if the model is expanded.
        facts: function that returns the sizes of a tower.
        pooling: classes of models that pool the tokens of their tower themselves. They would mix
            the frames of a video, so they are refused.
        refused: maps each class of models that can't encode frames to the reason, in words that
            continue the name of the class.
    """

    towers: Classes
    attentions: Classes
    prompted: Classes
    layers: Callable[[Any], list[nn.Module]]
    expected: str
    require: Callable[[Any, Tensor], None]
    encoder: Callable[[nn.Module], Encoder | None]
    facts: Callable[[Any], TowerFacts]
    pooling: tuple[type[nn.Module], ...] = ()
    refused: Mapping[type[nn.Module], str] = field(default_factory=dict)

    def find_towers(self, model: nn.Module) -> list[nn.Module]:
        """Return the towers without prompts in ``model``, plain or expanded.

        Raises:
            UnsupportedModelError: if the model pools the tokens of its tower itself, or if it holds
                a model that can't encode frames.
        """
        if isinstance(model, self.pooling):
            raise UnsupportedModelError(
                f"{type(model).__name__} pools the tokens of its tower itself, which would mix "
                "the frames of a video. Pass the tower instead of the model."
            )
        modules = list(model.modules())
        for module in modules:
            if type(module) in self.refused:
                raise UnsupportedModelError(
                    f"{type(module).__name__} {self.refused[type(module)]}, so it can't encode "
                    "videos. Use a CLIP with an image tower and a text tower."
                )
        classes = {*self.towers.keys(), *self.towers.values()}
        return [module for module in modules if type(module) in classes]

    def find_prompted_towers(self, model: nn.Module) -> list[nn.Module]:
        """Return the towers with prompts in ``model``."""
        classes = set(self.prompted.values())
        return [module for module in model.modules() if type(module) in classes]

    def expand(self, tower: nn.Module, views: list[FrameView]) -> None:
        """Change the classes of a tower and of its attention modules to those for videos.

        Args:
            tower: a tower that is not expanded.
            views: the frames in view for each layer.

        Raises:
            UnsupportedModelError: if the attention of a layer is of an unknown class.
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
            attention.view = view  # type: ignore[assignment]
            attention.__class__ = self.attentions[type(attention)]
        tower.__class__ = self.towers[type(tower)]

    def restore(self, tower: nn.Module) -> None:
        """Undo :meth:`expand` of ``tower``.

        Raises:
            UnsupportedModelError: if another tool has replaced or wrapped the attention of a layer.
                The tower is not changed then.
        """
        attentions = self.layers(tower)
        for index, attention in enumerate(attentions):
            if type(attention) not in self.attentions.values():
                raise UnsupportedModelError(
                    f"Layer {index} of the expanded tower has an attention of type "
                    f"{type(attention).__name__}, which another tool put there. Remove it first, "
                    "for example with merge_and_unload() or unload() of peft."
                )
        for attention in attentions:
            attention.__class__ = _original_class(self.attentions, attention)
            del attention.view
        tower.__class__ = _original_class(self.towers, tower)

    def attach_prompts(self, tower: nn.Module, prompts: nn.Module) -> None:
        """Change the class of a tower to the class with prompts, and set its prompts.

        The prompts do not become a submodule of the tower. They are registered once, at the model,
        under ``openvclip_prompts``.
        """
        tower.__class__ = self.prompted[type(tower)]
        tower.__dict__["vision_prompts"] = prompts

    def detach_prompts(self, tower: nn.Module) -> None:
        """Undo :meth:`attach_prompts` of ``tower``."""
        tower.__class__ = _original_class(self.prompted, tower)
        del tower.__dict__["vision_prompts"]


def _original_class(classes: Classes, module: nn.Module) -> type[nn.Module]:
    """Return the key of ``classes`` whose value is the class of ``module``."""
    return next(plain for plain, changed in classes.items() if changed is type(module))


def call(model: Any, pixels: Tensor) -> Tensor:
    """Return ``model(pixels)``. An :data:`Encoder` for models whose output is the features."""
    features: Tensor = model(pixels)
    return features


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Return the features of a model of transformers. An :data:`Encoder`."""
    return pooled(model.get_image_features(pixel_values=pixels, return_dict=True))


def pooled(outputs: Any) -> Tensor:
    """Return the features in the outputs of a model of transformers.

    Models that project the features put them in ``image_embeds``, ``text_embeds`` or
    ``pooler_output``, depending on the class and the method.
    """
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if hasattr(outputs, name):
            outputs = getattr(outputs, name)
            break
    features: Tensor = outputs
    return features
