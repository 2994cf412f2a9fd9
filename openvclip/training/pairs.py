"""Pairs of a video and a caption: their features, and the contrastive loss of a batch of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import PromptingError
from openvclip.models.features import encode_text, require_clip, scale_of, video_features
from openvclip.models.tokenizers import Tokenizer, as_tokenizer, tokens_of
from openvclip.prompting.attach import has_prompts
from openvclip.training.original import unit

__all__ = ["PairEncoder", "contrastive_loss"]


class PairEncoder(nn.Module):
    """Computes the features of videos and of their captions, for training and search.

    The feature of a video is the mean of its L2-normalised frame features, L2-normalised again, as
    in the protocol of text-to-video retrieval. A caption is encoded as it is, without a template,
    and L2-normalised. The tokenizer cuts captions that are longer than the text tower allows.

    Args:
        model: an open_clip model or a model of transformers, expanded or not. The model becomes a
            submodule.
        tokenizer: a function from a list of texts to token ids, or a tokenizer of transformers; see
            :func:`openvclip.models.as_tokenizer`.

    Raises:
        UnsupportedModelError: the model is neither a CLIP of open_clip nor a CLIP of transformers.
        PromptingError: the model has prompts, which are learned for class names.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        require_clip(model)
        if has_prompts(model):
            raise PromptingError(
                "The model has prompts, which are learned for class names, not for captions. Call "
                "openvclip.prompting.detach(model), or train a classifier."
            )
        self.model = model
        self._tokenize = as_tokenizer(tokenizer, model)

    def tokens(self, captions: list[str]) -> Tensor:
        """Return the token ids of captions, for :meth:`forward`.

        Args:
            captions: B texts.
        """
        return tokens_of(self._tokenize, captions)

    def forward(self, video: Tensor | None, tokens: Tensor | None) -> tuple[Any, Any, Tensor]:
        """Return the features of videos and of captions, and the scale of their cosines.

        Args:
            video: clips ``[B, T, C, H, W]``. ``None``: no features of videos are computed.
            tokens: the result of :meth:`tokens`. ``None``: no features of captions are computed.

        Returns:
            The features of the videos ``[B, D]`` and of the captions ``[B, D]``, of unit length, in
            at least float32, or ``None``; and the scale, one number.
        """
        videos = None if video is None else unit(video_features(self.model, video))
        texts = None if tokens is None else unit(encode_text(self.model, tokens))
        scale = scale_of(self.model).sum()  # of one number: FSDP2 needs an axis
        bias = getattr(self.model, "logit_bias", None)
        if isinstance(bias, Tensor):
            # The bias of SigLIP changes no rank. DDP needs each trained parameter in the graph.
            scale = scale + 0 * bias.sum()
        return videos, texts, scale


def contrastive_loss(
    videos: Tensor, texts: Tensor, scale: Tensor | float, same: Tensor | None = None
) -> Tensor:
    """Compute the symmetric InfoNCE loss of pairs of a video and a caption.

    The loss of a pair is the mean of two cross entropies: of its video among all videos for its
    caption, and of its caption among all captions for its video.

    Args:
        videos: features of videos ``[N, D]``, unit length.
        texts: features of captions ``[N, D]``, unit length. Caption ``i`` belongs to video ``i``.
        scale: the number that multiplies the cosines.
        same: bool ``[N, N]``, symmetric: whether two pairs have the same caption or the same video.
            Such pairs are not negatives of each other: their logits are left out of the cross
            entropies. Default: all pairs differ.

    Returns:
        The loss of each pair ``[N]``. The loss of the batch is the mean.

    Source: Radford et al., 2021, Figure 3.

    Example:
        >>> videos, texts = torch.eye(3), torch.eye(3)
        >>> contrastive_loss(videos, texts, scale=100.0).mean()
        tensor(0.)
    """
    logits = scale * videos @ texts.T
    number = torch.arange(len(logits), device=logits.device)
    if same is not None:
        others = number[:, None] != number
        logits = logits.masked_fill(same & others, float("-inf"))
    both = [functional.cross_entropy(part, number, reduction="none") for part in (logits, logits.T)]
    return (both[0] + both[1]) / 2
