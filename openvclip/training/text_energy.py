"""The energies of random texts, which a fine-tuned model keeps (Lipsum-FT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import RegularizationError, UsageError, reason_of
from openvclip.models.text_weights import text_names
from openvclip.models.tokenizers import Tokenizer, as_tokenizer, tokens_of
from openvclip.training.distillation import require_at_least_zero, require_tensors
from openvclip.training.original import OriginalCLIP, unit
from openvclip.weights.arguments import (
    is_whole,
    require_own_keys,
    restore_generator,
    seeded_generator,
)

__all__ = ["TextEnergy"]


class TextEnergy:
    r"""Keep the logits of random texts as they are with the original CLIP.

    The loss is ``weight`` times the mean over images of :math:`\frac{1}{2K} \sum_k (e^s f(x)^T t_k
    - e^s f_0(x)^T t_k)^2`, where :math:`f` is the feature of the trained model, :math:`f_0` that
    of the original CLIP, both of unit length, and :math:`t_k` the features of K random texts by the
    text tower of the original CLIP. The scale :math:`e^s` is that of the original CLIP. The
    images of a clip are its frames. ::

        original = openvclip.training.OriginalCLIP(model)
        energy = openvclip.training.TextEnergy(original, tokenizer, weight=0.1)
        frames = openvclip.towers.encode_frames(model, video)
        loss = cross_entropy + energy.loss(frames, original.frames(video))

    Each call of :meth:`loss` draws new texts, unless it gets the result of :meth:`draw`. Draw
    once for all micro-batches of a step, and for both passes of
    :class:`openvclip.InterpolatedWeightRegularizer`.

    Source: Nam, Heo and Lee, ICLR 2024 (Lipsum-FT).

    Args:
        original: the frozen original CLIP.
        tokenizer: tokenizer of the model; see :func:`openvclip.models.as_tokenizer`. Its start and
            end tokens and its padding are those of the random texts.
        weight: factor of the loss.
        n_texts: number K of texts in a draw. Lipsum-FT: 80.
        n_tokens: number of random tokens in a text. Lipsum-FT: 8. Texts are shorter if the
            tokenizer cuts them at a smaller length.
        seed: seed of the random tokens. All processes that train together need the same seed.
        vocabulary: ids of the tokens to draw from. Default: all tokens of the model but the special
            tokens of the tokenizer.

    Attributes:
        weight: as the argument.

    Raises:
        RegularizationError: a number is out of range; or ``vocabulary`` is empty, holds what is no
            id, or ids that the model does not have.
        UsageError: ``original`` is no :class:`OriginalCLIP`; ``seed`` is no whole number; the
            places of words in the tokenizer's output are not known; or the vocabulary of the model
            is not known, and ``vocabulary`` is not set.
    """

    def __init__(
        self,
        original: OriginalCLIP,
        tokenizer: Tokenizer,
        *,
        weight: float,
        n_texts: int = 80,
        n_tokens: int = 8,
        seed: int = 0,
        vocabulary: Sequence[int] | Tensor | None = None,
    ) -> None:
        require_at_least_zero(weight=weight)
        if not (is_whole(n_texts, 1) and is_whole(n_tokens, 1)):
            raise RegularizationError(
                f"n_texts={n_texts!r}, n_tokens={n_tokens!r}: expected whole numbers, at least 1 "
                "of each."
            )
        if not isinstance(original, OriginalCLIP):
            raise UsageError(
                f"original: expected an OriginalCLIP, got a {type(original).__name__}. Pass "
                "openvclip.training.OriginalCLIP(model)."
            )
        self._generator = seeded_generator(seed)
        self.original, self.weight, self.n_texts = original, float(weight), n_texts
        tokenize = as_tokenizer(tokenizer, original.model)
        self._layout, self._places = _layout(tokenize, n_tokens)
        self._ids = (
            _vocabulary(original.model, tokenizer, tokenize)
            if vocabulary is None
            else _ids_of(vocabulary, _table_size(original.model))
        )

    def draw_tokens(self) -> Tensor:
        """Draw the token ids of random texts.

        Returns:
            Token ids ``[K, L]``, or ``[K, 2, L]`` with an attention mask, as those of the
            tokenizer.
        """
        size = (self.n_texts, len(self._places))
        numbers = torch.randint(len(self._ids), size, generator=self._generator)
        tokens = self._layout.expand(self.n_texts, *self._layout.shape[1:]).clone()
        ids = tokens if tokens.ndim == 2 else tokens[:, 0]
        ids[:, self._places] = self._ids[numbers].to(ids.dtype)
        return tokens

    def draw(self) -> Tensor:
        """Draw random texts, and return their features by the original CLIP ``[K, D]``."""
        return self.original.texts(self.draw_tokens())

    def loss(self, images: Tensor, original_images: Tensor, texts: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            images: features of frames or images by the trained model, ``[..., D]``, of any length.
            original_images: features of the same frames by the original CLIP, ``[..., D]``, of any
                length; see :meth:`OriginalCLIP.frames <openvclip.training.OriginalCLIP.frames>`.
            texts: the result of :meth:`draw`. Default: new texts are drawn.

        Raises:
            UsageError: an argument is no tensor, or the shapes do not fit.
        """
        texts = self.draw() if texts is None else texts
        require_tensors(images=images, original_images=original_images, texts=texts)
        fits = images.ndim >= 1 and texts.ndim == 2 and images.shape[-1] == texts.shape[-1]
        if images.shape != original_images.shape or not fits:
            raise UsageError(
                f"images has shape {list(images.shape)}, original_images "
                f"{list(original_images.shape)} and texts {list(texts.shape)}; expected [..., D] "
                "twice and [K, D]."
            )
        # The difference of two features keeps its digits only in the full precision.
        with torch.autocast(images.device.type, enabled=False):
            difference = unit(images) - unit(original_images)
            gaps = self.original.scale * (difference @ texts.to(difference.dtype).T)
            return self.weight * gaps.square().mean() / 2

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator of random tokens."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`, and continue its sequence of random texts.

        Raises:
            StateMismatchError: an entry is missing, unknown, or not the state of a generator.
            WeightTypeError: ``state`` is not a mapping.
        """
        require_own_keys(state, {"generator"}, "a TextEnergy")
        restore_generator(self._generator, state["generator"], "generator", "a TextEnergy")


def _layout(tokenize: Tokenizer, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the tokens ``[1, ...]`` of a text of short words, and the places of the words."""
    empty, word, text = (
        tokens_of(tokenize, [sample]).cpu() for sample in ("", "a", " ".join("a" * n_tokens))
    )
    ids = [part if part.ndim == 2 else part[:, 0] for part in (empty, word, text)]
    new = set(ids[1].flatten().tolist()) - set(ids[0].flatten().tolist())
    places = (
        (ids[2][0] == next(iter(new))).nonzero().flatten() if len(new) == 1 else ids[2].new_empty(0)
    )
    if not len(places):
        raise UsageError(
            f"The tokenizer turned the word 'a' into the tokens {sorted(new)}; expected one token "
            "for each word, which random tokens replace. Use the tokenizer of the model."
        )
    return text, places


def _vocabulary(model: nn.Module, tokenizer: Any, tokenize: Tokenizer) -> Tensor:
    """Return the ids of all tokens of a model but the special tokens."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor, or of openvclip's function
    table_size = _table_size(model)
    if table_size is None:
        raise UsageError(
            f"{type(model).__name__} has no nn.Embedding of tokens, so its vocabulary is not "
            "known. Set vocabulary, the ids of the tokens to draw from."
        )
    special = set(tokens_of(tokenize, [""]).cpu().flatten().tolist())
    special |= {int(number) for number in getattr(inner, "all_special_ids", ())}
    size = min([table_size, *_own_size(inner)])
    return torch.tensor([number for number in range(size) if number not in special])


def _table_size(model: nn.Module) -> int | None:
    """Return the number of tokens in the embedding of a model's text tower, if it has one."""
    modules = dict(model.named_modules())
    tables = [modules[name[:-1]] for name in text_names(f"{name}." for name in modules if name)]
    sizes = [table.num_embeddings for table in tables if isinstance(table, nn.Embedding)]
    return max(sizes, default=None)


def _ids_of(vocabulary: Sequence[int] | Tensor, size: int | None) -> Tensor:
    """Return ids of tokens, given by the user, as a tensor of one dimension.

    Args:
        vocabulary: the ids.
        size: number of tokens of the model, if it is known.

    Raises:
        RegularizationError: there is no id, or a value is no id of a token of the model.
    """
    expected = "expected ids of tokens, whole numbers from 0 on, such as range(1000)"
    try:
        ids = torch.as_tensor(vocabulary, device="cpu").flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RegularizationError(
            f"vocabulary is a {type(vocabulary).__name__} that holds no whole numbers "
            f"({reason_of(error)}); {expected}."
        ) from error
    if not len(ids):
        raise RegularizationError(f"vocabulary is empty; {expected}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RegularizationError(f"vocabulary holds values of {ids.dtype}; {expected}.")
    ids = ids.long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        tokens = "" if size is None else f" to {size - 1}, the last token of the model"
        raise RegularizationError(
            f"vocabulary has the id {low if low < 0 else high}; expected ids from 0{tokens}. Use "
            "the tokenizer of this model to find the ids."
        )
    return ids


def _own_size(tokenizer: Any) -> list[int]:
    """Return the number of tokens that a tokenizer knows, or an empty list."""
    size = getattr(tokenizer, "vocab_size", None)
    return [size] if isinstance(size, int) and size > 0 else []
