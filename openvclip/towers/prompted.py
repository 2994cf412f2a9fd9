"""What prompts offer an image tower, what they ask of it, and the tower of a model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvclip.errors import UsageError
from openvclip.towers import temporal
from openvclip.towers.attention import TemporalTower

Block = Callable[[Tensor], Tensor]
"""One layer of a backbone: tokens ``[n, N, W]``, or ``[B, T, N, W]`` in an expanded tower."""


class VisionPrompts(nn.Module):
    """Prompts of an image tower. Tokens are ``[B, T, N, W]``; this class changes none of them.

    The tower calls :meth:`embed` once, :meth:`before` and :meth:`after` around each layer, and
    :meth:`leave` once. What a layer needs to know of the clip it reads from the tokens' shape.
    """

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """The first layer's tokens from embedded patches; ``norm`` is the tower's before it."""
        return norm(tokens)

    def before(self, layer: int, tokens: Tensor) -> Tensor:
        """The tokens that a layer is given."""
        return tokens

    def after(self, layer: int, tokens: Tensor) -> Tensor:
        """The tokens that are kept of what a layer gives."""
        return tokens

    def leave(self, tokens: Tensor) -> Tensor:
        """The class and patch tokens, which the tower pools."""
        return tokens


@dataclass(frozen=True)
class TowerFacts:
    """What there is to know of an image tower, with prompts or without.

    Attributes:
        width: width of the tokens, W.
        layers: number of layers.
        heads: attention heads of a layer.
        patch_size: pixels of a patch, ``(H, W)``.
        image_size: pixels of a frame, ``(H, W)``; None where the tower does not tell.
        feature_size: width of the features that the tower projects to; None where it leaves the
            projection to the model around it.
        prefix: tokens that stand before those of the patches.
        class_token: whether the first of these is a class token.
        first_weight: the class token's weight; without one the weight that pixels meet first.
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


class PromptedTower(TemporalTower):
    """Mixed into the class of a tower, which then answers videos and images with prompts.

    Here a layer sees each frame on its own. An image is a clip of one frame. A subclass says how
    patches are embedded and tokens pooled, and gives what lies between to :meth:`_through`.
    """

    plain: ClassVar[type[nn.Module]]
    """The class that the tower has without prompts."""

    vision_prompts: VisionPrompts

    @staticmethod
    def facts(tower: Any) -> TowerFacts:
        """What there is to know of a tower of this class, or of the plain one."""
        raise NotImplementedError

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not for towers with prompts.

        Raises:
            UsageError: always; the tower's own method would leave the prompts out.
        """
        raise UsageError(
            "forward_intermediates() knows nothing of prompts. Call the tower, or detach the "
            "prompts first: openvclip.prompting.detach(model)."
        )

    def _through(
        self,
        tokens: Tensor,
        norm: Callable[[Tensor], Tensor],
        blocks: Sequence[Block],
        checkpointing: bool = False,
    ) -> Tensor:
        """Embedded patches ``[B, T, N, W]`` through all layers, with prompts on the way."""
        tokens = self.vision_prompts.embed(tokens, norm)
        for layer, block in enumerate(blocks):
            if checkpointing:
                tokens = checkpoint(self._layer, layer, block, tokens, use_reentrant=False)
            else:
                tokens = self._layer(layer, block, tokens)
        return self.vision_prompts.leave(tokens)

    def _layer(self, layer: int, block: Block, tokens: Tensor) -> Tensor:
        given = self.vision_prompts.before(layer, tokens)
        return self.vision_prompts.after(layer, self._run(block, given))

    def _run(self, block: Block, tokens: Tensor) -> Tensor:
        clips: Tensor = block(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return clips


class NeighboursSeen(PromptedTower):
    """The same for a tower whose attention is expanded: neighbours see a frame's prompts too."""

    def _run(self, block: Block, tokens: Tensor) -> Tensor:
        return block(tokens)


@dataclass(frozen=True)
class Tower:
    """The image tower of a model.

    Attributes:
        module: the tower.
        prompted: the class that it has with prompts.
    """

    module: nn.Module
    prompted: type[PromptedTower]

    @property
    def facts(self) -> TowerFacts:
        """What there is to know of it."""
        return self.prompted.facts(self.module)


def find_tower(model: nn.Module) -> Tower:
    """The tower of ``model`` that has prompts, or the one that they can be attached to.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    for module in model.modules():
        if isinstance(module, PromptedTower):
            return Tower(module, type(module))
    family, tower = temporal.find_tower(model, "take prompts")
    family.layers(tower)  # raises for towers of other blocks than are known
    path = f"openvclip.towers.{family.name}_prompts"
    return Tower(tower, importlib.import_module(path).PROMPTED[type(tower)])
