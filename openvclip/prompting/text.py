"""Learned vectors among the tokens of a text, and the text tower that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from open_clip import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from openvclip.errors import ClassNamesError, PromptOptionError, UnsupportedModelError
from openvclip.towers.open_clip_prompts import run_block

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


def find_text_tower(model: nn.Module) -> Any:
    """The text tower of an open_clip model, None where it has none or one of another library.

    It is a ``TextTransformer``, or the ``CLIP`` itself that has the parts of one.
    """
    tower = model if isinstance(model, CLIP) else getattr(model, "text", None)
    return tower if isinstance(tower, (CLIP, TextTransformer)) else None


def require_text_tower(model: nn.Module, count: int, depth: int) -> Any:
    """The text tower of the model, as one that takes ``count`` prompts in ``depth`` layers.

    Raises:
        UnsupportedModelError: the model has no text tower of open_clip's, or one that is pooled
            where prompts could stand.
        PromptOptionError: the context or the layers do not suffice.
    """
    tower = find_text_tower(model)
    if tower is None or _pool_type(tower) not in ("argmax", "eos", "last"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text tower that takes prompts; expected one of "
            "open_clip's own, pooled at the end-of-text token or the last. With text_prompts=0 its "
            "images alone are prompted."
        )
    # A start token, one token of a class name and an end token are the least there can be.
    if count + 3 > tower.context_length:
        raise PromptOptionError(
            f"text_prompts={count}: the text context holds {tower.context_length} tokens, of which "
            f"a class name with start and end takes at least 3, so at most "
            f"{tower.context_length - 3} prompts."
        )
    require_depth("text_depth", depth, len(tower.transformer.resblocks))
    return tower


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


def initial_words(tower: Any, tokenizer: Tokenizer, words: str, count: int) -> Tensor:
    """Embeddings ``[m, W]`` of the words that the first m of ``count`` prompts start from.

    Raises:
        PromptOptionError: the words take more tokens than there are prompts.
    """
    tokens, start, (length,) = _read(tower, tokenizer, [words])
    if length > count:
        raise PromptOptionError(
            f"words={words!r} take {length} tokens; there are {count} text prompts. Shorten the "
            f"words, or ask for text_prompts={length}."
        )
    table = tower.token_embedding
    embedded: Tensor = table(tokens.to(table.weight.device))[0, start : start + length]
    return embedded.detach()


def prompted_layout(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    count: int,
    name_at: NamePosition,
) -> tuple[Tensor, Tensor]:
    """The texts ``"name."`` with places for prompts in them.

    Returns:
        ``(tokens, places)``: token ids ``[K, L]``, where the places of prompts hold the id of the
        text's first token; and for each place the index of the prompt that stands there, -1 where
        none does, ``[K, L]``.

    Raises:
        PromptOptionError: a name is too long beside that many prompts.
    """
    tower = find_text_tower(model)
    tokens = tokenizer([f"{name}." for name in class_names])
    length = tokens.shape[1]
    end = _end_of_text(tower, tokens) + count
    if int(end.max()) >= length:
        longest = class_names[int(end.argmax())]
        raise PromptOptionError(
            f"The class name {longest!r} takes {int(end.max()) + 1} tokens with start, end and "
            f"{count} prompts; the text context holds {length}. Use fewer prompts or a shorter "
            "name."
        )
    _, start, names = _read(tower, tokenizer, list(class_names))
    first = {"end": count, "middle": count // 2, "front": 0}[name_at]
    prompts = range(length, length + count)
    rows = [
        [
            *range(start),
            *prompts[:first],
            *range(start, start + name),
            *prompts[first:],
            *range(start + name, length - count),
        ]
        for name in names
    ]
    source = torch.tensor(rows)
    padded = torch.cat([tokens, tokens[:, :1].expand(-1, count)], dim=1)
    return padded.gather(1, source), (source - length).clamp(min=-1)


def encode_prompted(
    model: nn.Module, prompts: TextPrompts, rows: Tensor | None, layout: tuple[Tensor, Tensor]
) -> Tensor:
    """Features ``[K, D]``, not normalised, of texts with prompts in them.

    Args:
        model: an open_clip model.
        prompts: the learned vectors.
        rows: for each text its set of class-specific vectors, ``[K]``.
        layout: what :func:`prompted_layout` gives.
    """
    tower = find_text_tower(model)
    tokens, places = layout
    context = prompts.context if rows is None else prompts.context[rows]
    x, mask = _embedded(tower, tokens)
    # A tower may have put tokens of its own after the text.
    places = functional.pad(places, (0, x.shape[1] - places.shape[1]), value=-1)
    at = tower.positional_embedding[: x.shape[1]].to(x.dtype)
    x = torch.where(_is_prompt(places), _spread(context.to(x.dtype), places) + at, x)
    for layer in range(len(tower.transformer.resblocks)):
        if tower.transformer.grad_checkpointing:
            x = checkpoint(_layer, tower, prompts, layer, places, x, mask, use_reentrant=False)
        else:
            x = _layer(tower, prompts, layer, places, x, mask)
    out = _pooled(tower, tokens, x)
    if tower.text_projection is not None:
        linear = isinstance(tower.text_projection, nn.Linear)
        out = tower.text_projection(out) if linear else out @ tower.text_projection
    return out


def _layer(
    tower: Any, prompts: TextPrompts, layer: int, places: Tensor, x: Tensor, mask: Tensor | None
) -> Tensor:
    if prompts.deep is not None and 0 < layer <= len(prompts.deep):
        fresh = _spread(prompts.deep[layer - 1].to(x.dtype), places)
        x = torch.where(_is_prompt(places), fresh, x)
    return run_block(tower.transformer, layer, x, mask)


def _is_prompt(places: Tensor) -> Tensor:
    return (places >= 0)[..., None]


def _spread(vectors: Tensor, places: Tensor) -> Tensor:
    """The prompts ``[n, W]`` or ``[K, n, W]`` at their places; anything at the others."""
    return torch.take_along_dim(
        vectors.expand(len(places), -1, -1), places.clamp(min=0)[..., None], dim=1
    )


# --- the two kinds of text towers --------------------------------------------------------------


def _pool_type(tower: Any) -> str:
    kind: str = tower.text_pool_type if isinstance(tower, CLIP) else tower.pool_type
    return kind


def _eos_id(tower: Any) -> Any:
    return getattr(tower, "text_eos_id" if isinstance(tower, CLIP) else "eos_id", None)


def _embedded(tower: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Words with their positions ``[K, L, W]``, and the attention mask."""
    if not isinstance(tower, CLIP):
        x, mask = tower._embeds(tokens)  # adds CoCa's class token, and masks padding
        return x, mask
    cast = tower.transformer.get_cast_dtype()
    words = tower.token_embedding(tokens).to(cast)
    return words + tower.positional_embedding.to(cast), tower.attn_mask


def _pooled(tower: Any, tokens: Tensor, x: Tensor) -> Tensor:
    if getattr(tower, "cls_emb", None) is not None:
        last: Tensor = tower.ln_final(text_global_pool(x, pool_type="last"))
        return last
    kind, eos = _pool_type(tower), _eos_id(tower)
    pooled: Tensor = text_global_pool(tower.ln_final(x), tokens, kind, eos_token_id=eos)
    return pooled


def _end_of_text(tower: Any, tokens: Tensor) -> Tensor:
    """The place of the end token of each text; the first of the padding where there is none.

    The end token has the largest id, or one that the tower knows. A tower that is pooled at the
    last place needs none, and texts end where the last token begins to repeat.
    """
    kind = _pool_type(tower)
    if kind == "last":
        lasting = (tokens == tokens[:, -1:]).flip(1).int().cumprod(dim=1)
        return tokens.shape[1] - lasting.sum(dim=1)
    if kind == "eos":
        tokens = (tokens == _eos_id(tower)).int()
    return tokens.argmax(dim=-1)


def _read(tower: Any, tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, int, list[int]]:
    """Token ids of texts, the place of their first word, and the tokens of their words."""
    tokens = tokenizer(texts)
    if _pool_type(tower) != "last":
        return tokens, 1, (_end_of_text(tower, tokens) - 1).tolist()
    # What the tokenizer adds to words, it adds to none too.
    empty = tokenizer([""])
    added = int(_end_of_text(tower, empty))
    start = int(added > 0 and bool((tokens[:, 0] == empty[0, 0]).all()))
    return tokens, start, (_end_of_text(tower, tokens) - added).tolist()
