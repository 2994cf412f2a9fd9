"""The original CLIP as a frozen model, whose features regularisers compare with."""

from __future__ import annotations

import copy as copying

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.models.features import encode_text, require_clip, scale_of
from openvclip.towers.checks import require_video
from openvclip.towers.temporal import encode_images

__all__ = ["OriginalCLIP"]


class OriginalCLIP:
    """A frozen copy of a CLIP, for features without gradients.

    Create the copy before the first training step. The copy is in eval mode and takes the memory of
    the model once more.

    Args:
        model: a CLIP model of open_clip or transformers, expanded or not.
        copy: whether to copy the model. ``False`` uses ``model`` itself, which is set to eval mode
            and frozen. Use this only for a model that is not trained.

    Attributes:
        model: the frozen model.

    Raises:
        UnsupportedModelError: the model is neither a CLIP of open_clip nor a CLIP of transformers.
    """

    def __init__(self, model: nn.Module, *, copy: bool = True) -> None:
        require_clip(model)
        frozen = copying.deepcopy(model) if copy else model
        self.model = frozen.requires_grad_(False).eval()

    @property
    def scale(self) -> Tensor:
        """The number that multiplies the cosines, a scalar."""
        return scale_of(self.model).detach().sum()  # FSDP2 gives this number an axis

    @torch.no_grad()
    def frames(self, video: Tensor) -> Tensor:
        """Return the features of frames, each encoded alone as plain CLIP does.

        Args:
            video: clips ``[B, T, C, H, W]``, or images ``[B, C, H, W]``.

        Returns:
            Tensor ``[B, T, D]``, or ``[B, D]`` for images; unit length, in at least float32.

        Raises:
            VideoShapeError: see :func:`openvclip.encode_video`.
        """
        if isinstance(video, Tensor) and video.ndim == 4:
            return unit(encode_images(self.model, video))
        require_video(video)
        features = unit(encode_images(self.model, video.flatten(0, 1)))
        per_frame: Tensor = features.unflatten(0, video.shape[:2])
        return per_frame

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        """Return the features of texts.

        The features of the same texts stay the same, so encode class names once before the loop.

        Args:
            tokens: token ids ``[K, L]``, as the tokenizer of the model returns them; see
                :func:`openvclip.models.as_tokenizer`.

        Returns:
            Tensor ``[K, D]``; unit length, in at least float32.
        """
        return unit(encode_text(self.model, tokens))


def unit(features: Tensor) -> Tensor:
    """Return features of unit length, in at least float32."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return functional.normalize(wide, dim=-1)
