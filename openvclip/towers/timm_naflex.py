"""timm's ``NaFlexVit`` (SigLIP 2 NaFlex) for frames of one size.

The tower also encodes batches of patches, whose images differ in size. Expanded towers encode such
batches like images: each image attends to itself alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import apply_keep_indices_nlc
from timm.models import checkpoint
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, TowerFacts, call
from openvclip.towers.prompted import PromptedExpandedTower
from openvclip.towers.timm import FAMILY as TIMM
from openvclip.towers.timm import _FrameTower, _PromptedFrameTower, _run_eva_block


class TemporalNaFlexVit(_FrameTower, NaFlexVit):  # type: ignore[misc]
    """``NaFlexVit`` for videos ``[B, T, C, H, W]``, images and batches of patches."""

    _plain = NaFlexVit

    def _require_video(self, video: Tensor) -> None:
        _require_video(self, video)

    def _require_no_mask(self, args: Any, kwargs: dict[str, Any]) -> None:
        _require_no_mask(args, kwargs)

    def forward_features(  # type: ignore[override]  # NaFlexVit's names
        self, patches: Tensor, patch_coord: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the tokens ``[B, T, N, D]`` of a video, or ``[B, N, D]`` of images.

        Args:
            patches: a video, images ``[B, C, H, W]``, or patches if ``patch_coord`` is given.
            patch_coord: the places of patches, see timm.

        Raises:
            VideoShapeError: if ``patches`` is not an image batch or a video that the tower
                supports.
            UsageError: if an attention mask is given with a video.
        """
        if patch_coord is not None:
            return NaFlexVit.forward_features(self, patches, patch_coord, *args, **kwargs)
        return super().forward_features(patches, None, *args, **kwargs)

    def forward_head(  # type: ignore[override]  # NaFlexVit passes the tokens by name
        self, patches: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the features ``[B, T, D]`` of a video from its tokens ``[B, T, N, D]``.

        For tokens ``[B, N, D]`` of images, the features are ``[B, D]``.
        """
        return super().forward_head(patches, *args, **kwargs)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of chosen layers, as timm's tower does.

        The tensors of a video have the axes ``[B, T]`` instead of the batch axis of images.

        Args:
            x: a video, images ``[B, C, H, W]``, or a batch of patches.

        Raises:
            VideoShapeError: if ``x`` is none of these, or a video that the tower does not support.
            UsageError: if an attention mask is given with a video.
        """
        if isinstance(x, dict) or kwargs.get("patch_coord") is not None:
            return NaFlexVit.forward_intermediates(self, x, *args, **kwargs)
        return super().forward_intermediates(x, *args, **kwargs)

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens, rope = _embedded(self, video)
        tokens = self.norm_pre(tokens)
        for block, angles in zip(self.blocks, rope, strict=True):
            run = partial(_run_block, block, angles)
            tokens = checkpoint(run, tokens) if self.grad_checkpointing else run(tokens)
        return tokens


class PromptedNaFlexVit(_PromptedFrameTower, TemporalNaFlexVit):
    """``NaFlexVit`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    def forward_features(  # type: ignore[override]  # NaFlexVit's names
        self, patches: Tensor, patch_coord: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return class and patch tokens: ``[B, T, N, D]`` of a video, ``[B, N, D]`` of images.

        Raises:
            VideoShapeError: if ``patches`` is not an image batch or a video that the tower
                supports, or if the prompts do not support the number of frames.
            UsageError: if ``patch_coord`` or an attention mask is given.
        """
        if patch_coord is not None:
            raise UsageError(
                "Prompts support no batches of patches. Pass images or videos, or detach the "
                "prompts first: openvclip.prompting.detach(model)."
            )
        return super().forward_features(patches, None, *args, **kwargs)

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens, rope = _embedded(self, video)
        prefix = self.num_prefix_tokens
        blocks = [
            block if angles is None else partial(_run_eva_block, block, angles, prefix)
            for block, angles in zip(self.blocks, rope, strict=True)
        ]
        return self._through(tokens, self.norm_pre, blocks, self.grad_checkpointing)


class PromptedTemporalNaFlexVit(PromptedExpandedTower, PromptedNaFlexVit):
    """An expanded ``NaFlexVit`` with prompts."""


def _embedded(tower: Any, video: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Return the tokens ``[B, T, N, D]`` before ``norm_pre``, and the rotary angles of each layer.

    The angles are ``[N, 2 d]`` or ``[heads, N, 2 d]``. If frames have different angles, because
    patches are dropped, the angles are ``[B, T, heads or 1, N, 2 d]``.
    """
    clips = video.shape[:2]
    tokens, grid = tower.embeds(video.flatten(0, 1))
    rope: list[Tensor | None] = [None]
    if tower.rope is not None:
        angles = tower.rope.get_embed(shape=grid)
        rope = list(angles.unbind(0)) if tower.rope_is_mixed else [angles]
    if tower.training and tower.patch_drop is not None:
        tokens, kept = tower.patch_drop(tokens)
        rope = [None if a is None else _kept(a, tokens, kept, clips) for a in rope]
    of_frames: Tensor = tokens.unflatten(0, clips)
    return of_frames, rope if tower.rope_is_mixed else rope * len(tower.blocks)


def _kept(angles: Tensor, tokens: Tensor, kept: Tensor, clips: Any) -> Tensor:
    """Return the angles of the patches that each frame keeps."""
    own = apply_keep_indices_nlc(tokens, angles, kept)
    by_head = own.unsqueeze(1) if angles.ndim == 2 else own
    of_frames: Tensor = by_head.unflatten(0, clips)
    return of_frames


def _run_block(block: nn.Module, angles: Tensor | None, tokens: Tensor) -> Tensor:
    out: Tensor = block(tokens) if angles is None else block(tokens, rope=angles)
    return out


def _require_video(tower: Any, video: Tensor) -> None:
    embeds = tower.embeds
    require_video(video, None, embeds.proj.weight)
    height, width = embeds.patch_size
    if not embeds.dynamic_img_pad and (video.shape[-2] % height or video.shape[-1] % width):
        raise VideoShapeError(
            f"Got frames of {video.shape[-2]} x {video.shape[-1]} pixels (H x W); the model "
            f"takes multiples of {height} x {width}. Resize and crop the frames first."
        )


def _require_no_mask(args: Any, kwargs: dict[str, Any]) -> None:
    if any(option is not None for option in (*args, *kwargs.values())):
        raise UsageError(
            "patch_valid and attn_mask are for batches of patches only. Leave them out for videos."
        )


def _attentions(tower: Any) -> list[nn.Module]:
    channels = tower.embeds.in_chans
    if channels != 3:
        raise UnsupportedModelError(
            f"The NaFlexVit takes {channels} channels, so it is no image tower (towers for audio "
            "take spectrograms); expected 3 channels. Pass a tower for RGB images."
        )
    return TIMM.layers(tower)


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, NaFlexVit) else None


def _facts(tower: Any) -> TowerFacts:
    embeds, class_token = tower.embeds, tower.embeds.cls_token
    return TowerFacts(
        width=tower.embed_dim,
        layers=len(tower.blocks),
        heads=tower.blocks[0].attn.num_heads,
        patch_size=embeds.patch_size,
        image_size=None,
        feature_size=tower.num_classes or None,
        prefix=tower.num_prefix_tokens,
        class_token=class_token is not None,
        first_weight=embeds.proj.weight if class_token is None else class_token,
    )


FAMILY = Family(
    towers={NaFlexVit: TemporalNaFlexVit},
    attentions=TIMM.attentions,
    prompted={NaFlexVit: PromptedNaFlexVit, TemporalNaFlexVit: PromptedTemporalNaFlexVit},
    layers=_attentions,
    expected=TIMM.expected,
    require=_require_video,
    encoder=_encoder,
    facts=_facts,
)
