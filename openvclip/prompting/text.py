"""Learned vectors among the tokens of a text, and the text tower that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvclip.errors import ClassNamesError, PromptOptionError, UnsupportedModelError
from openvclip.prompting.towers import run_block

NamePosition = Literal["end", "middle", "front"]
Tokenizer = Callable[[list[str]], Tensor]

INIT_STD = 0.02
"""Spread of prompts that start at random, in both releases (but for Vita-CLIP's visual ones)."""


class TextPrompts(nn.Module):
    """Learned vectors that stand with the class name between the start and the end of a text.

    Args:
        count: vectors of a text, n.
        width: width of the text tower, W.
        depth: layers with vectors of their own; in each after the first they replace what the
            layer before made of its own.
        name_at: where the class name stands: ``"end"`` (after the vectors), ``"front"`` (before
            them) or ``"middle"`` (after the first half).
        class_names: one set of vectors for each of these; None for vectors that all share.

    Attributes:
        context: ``[n, W]``, or ``[K, n, W]`` with ``class_names``.
        deep: ``[depth - 1, n, W]``: the vectors of the layers after the first, None where there
            are none.

    Raises:
        PromptOptionError: ``name_at`` is unknown.
    """

    def __init__(
        self,
        count: int,
        width: int,
        *,
        depth: int = 1,
        name_at: NamePosition = "end",
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if name_at not in get_args(NamePosition):
            raise PromptOptionError(
                f"name_at={name_at!r}: expected one of "
                + ", ".join(repr(name) for name in get_args(NamePosition))
                + "."
            )
        self.name_at = name_at
        self.class_names = None if class_names is None else list(class_names)
        sets = [] if self.class_names is None else [len(self.class_names)]
        self.context = nn.Parameter(torch.randn(*sets, count, width) * INIT_STD)
        self.deep = (
            nn.Parameter(torch.randn(depth - 1, count, width) * INIT_STD) if depth > 1 else None
        )

    @property
    def count(self) -> int:
        """Vectors of a text."""
        return self.context.shape[-2]

    def rows_of(self, class_names: Sequence[str]) -> list[int] | None:
        """Which set of vectors each class has; None where all share one.

        Raises:
            ClassNamesError: the vectors are class-specific and were made for other classes.
        """
        if self.class_names is None:
            return None
        strange = [name for name in class_names if name not in self.class_names]
        if strange:
            raise ClassNamesError(
                f"The text prompts are class-specific, of {len(self.class_names)} classes, and "
                f"{len(strange)} of the {len(class_names)} given are not among them: "
                f"{', '.join(map(repr, strange[:3]))}{', ...' if len(strange) > 3 else ''}. "
                "Use prompts that all classes share, or class names alone: template='{}'."
            )
        return [self.class_names.index(name) for name in class_names]


def require_text_tower(model: nn.Module, count: int, depth: int) -> CLIP:
    """The model as one whose text tower takes ``count`` prompts in ``depth`` layers.

    Raises:
        UnsupportedModelError: the model has no text tower of open_clip's ``CLIP``.
        PromptOptionError: the context or the layers do not suffice.
    """
    if not isinstance(model, CLIP) or model.text_pool_type not in ("argmax", "eos"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text tower that takes prompts; expected open_clip's "
            "CLIP, pooled at the end-of-text token. With text_prompts=0 its images alone are "
            "prompted."
        )
    # A start token, one token of a class name and an end token are the least there can be.
    if count + 3 > model.context_length:
        raise PromptOptionError(
            f"text_prompts={count}: the text context holds {model.context_length} tokens, of which "
            f"a class name with start and end takes at least 3, so at most "
            f"{model.context_length - 3} prompts."
        )
    require_depth("text_depth", depth, len(model.transformer.resblocks))
    return model


def require_depth(name: str, depth: int, layers: int) -> None:
    """Raise :class:`PromptOptionError` unless ``depth`` is between 1 and ``layers``."""
    if not isinstance(depth, int) or not 1 <= depth <= layers:
        raise PromptOptionError(
            f"{name}={depth!r}: the tower has {layers} layers; expected 1 to {layers}."
        )


def require_count(name: str, count: int) -> None:
    """Raise :class:`PromptOptionError` unless ``count`` is a number of prompts, 0 or more."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise PromptOptionError(f"{name}={count!r}: expected a number of prompts, 0 or more.")


def initial_words(model: Any, tokenizer: Tokenizer, words: str, count: int) -> Tensor:
    """Embeddings ``[m, W]`` of the words that the first m of ``count`` prompts start from.

    Raises:
        PromptOptionError: the words take more tokens than there are prompts.
    """
    tokens = tokenizer([words]).to(model.token_embedding.weight.device)
    length = int(_end_of_text(model, tokens)) - 1
    if length > count:
        raise PromptOptionError(
            f"words={words!r} take {length} tokens; there are {count} text prompts. Shorten the "
            f"words, or ask for text_prompts={length}."
        )
    embedded: Tensor = model.token_embedding(tokens)[0, 1 : 1 + length]
    return embedded.detach()


def prompted_layout(
    model: Any, tokenizer: Tokenizer, class_names: Sequence[str], count: int, name_at: NamePosition
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each vector that the text tower reads comes from.

    Returns:
        ``(tokens, source, end)``: token ids ``[K, L]`` of ``"name."``; for each place of a text
        of L tokens the place in it that the vector is taken from, or L + j for prompt j,
        ``[K, L]``; the place of the end token, ``[K]``.

    Raises:
        PromptOptionError: a name is too long beside that many prompts.
    """
    tokens = tokenizer([f"{name}." for name in class_names])
    length = tokens.shape[1]
    end = _end_of_text(model, tokens) + count
    if int(end.max()) >= length:
        longest = class_names[int(end.argmax())]
        raise PromptOptionError(
            f"The class name {longest!r} takes {int(end.max()) + 1} tokens with start, end and "
            f"{count} prompts; the text context holds {length}. Use fewer prompts or a shorter "
            "name."
        )
    names = (_end_of_text(model, tokenizer(list(class_names))) - 1).tolist()
    first = {"end": count, "middle": count // 2, "front": 0}[name_at]
    prompts = range(length, length + count)
    rows = [
        [0, *prompts[:first], *range(1, 1 + name), *prompts[first:], *range(1 + name, length)]
        for name in names
    ]
    return tokens, torch.tensor([row[:length] for row in rows]), end


def encode_prompted(
    model: Any,
    prompts: TextPrompts,
    rows: Tensor | None,
    layout: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Features ``[K, D]``, not normalised, of texts with prompts in them.

    Args:
        model: open_clip's ``CLIP``.
        prompts: the learned vectors.
        rows: for each text its set of class-specific vectors, ``[K]``.
        layout: what :func:`prompted_layout` gives.
    """
    tokens, source, end = layout
    cast = model.transformer.get_cast_dtype()
    context = prompts.context if rows is None else prompts.context[rows]
    words = model.token_embedding(tokens).to(cast)
    both = torch.cat([words, context.to(cast).expand(len(tokens), -1, -1)], dim=1)
    x = torch.take_along_dim(both, source[..., None], dim=1)
    x = x + model.positional_embedding.to(cast)
    for layer in range(len(model.transformer.resblocks)):
        if model.transformer.grad_checkpointing:
            x = checkpoint(_layer, model, prompts, layer, x, use_reentrant=False)
        else:
            x = _layer(model, prompts, layer, x)
    out: Tensor = model.ln_final(x)[torch.arange(len(x), device=x.device), end]
    if model.text_projection is not None:
        linear = isinstance(model.text_projection, nn.Linear)
        out = model.text_projection(out) if linear else out @ model.text_projection
    return out


def _layer(model: Any, prompts: TextPrompts, layer: int, x: Tensor) -> Tensor:
    if prompts.deep is not None and 0 < layer <= len(prompts.deep):
        fresh = prompts.deep[layer - 1].to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], fresh, x[:, 1 + prompts.count :]], dim=1)
    return run_block(model.transformer, layer, x, model.attn_mask)


def _end_of_text(model: Any, tokens: Tensor) -> Tensor:
    """The place of the end token of each text: that of the largest id, or of the model's own."""
    if model.text_pool_type == "eos":
        tokens = (tokens == model.text_eos_id).int()
    return tokens.argmax(dim=-1)
