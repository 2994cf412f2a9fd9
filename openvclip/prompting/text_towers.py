"""Find the text tower of an open_clip model, and run its parts for text prompts.

open_clip has two kinds of text towers: the ``CLIP`` itself, which holds the parts of a text tower
as its own attributes, and ``TextTransformer``, the attribute ``text`` of the other models. The
functions of this module take either kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from openvclip.errors import PromptOptionError, UnsupportedModelError

Tokenizer = Callable[[list[str]], Tensor]
"""Function of n texts that returns token ids ``[n, L]``, such as a tokenizer of open_clip."""


def find_text_tower(model: nn.Module) -> Any:
    """Return the text tower of a model, or None if it is not a text tower of open_clip."""
    from open_clip.transformer import TextTransformer

    tower = model if _is_clip(model) else getattr(model, "text", None)
    return tower if _is_clip(tower) or isinstance(tower, TextTransformer) else None


def _is_clip(tower: object) -> bool:
    from open_clip import CLIP

    return isinstance(tower, CLIP)


def require_text_tower(model: nn.Module, count: int, depth: int) -> Any:
    """Return the text tower of ``model`` if it supports ``count`` prompts in ``depth`` layers.

    Raises:
        UnsupportedModelError: if the model has no text tower of open_clip, or if the tower pools
            its tokens at a place where prompts can stand.
        PromptOptionError: if the text context or the number of layers is too small.
    """
    tower = find_text_tower(model)
    if tower is None or _pool_type(tower) not in ("argmax", "eos", "last"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text tower that takes prompts; expected a text tower "
            "of open_clip's that is pooled at the end-of-text token or the last token. Set "
            "text_prompts=0 to prompt the image tower alone."
        )
    # The shortest text has a start token, one token of a class name and an end token.
    if count + 3 > tower.context_length:
        raise PromptOptionError(
            f"text_prompts={count}: the text context holds {tower.context_length} tokens, and a "
            "class name with its start and end tokens needs at least 3. Use at most "
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
    """Raise :class:`PromptOptionError` unless ``count`` is an int of at least 0."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise PromptOptionError(f"{name}={count!r}: expected a number of prompts, 0 or more.")


# --- tokens ------------------------------------------------------------------------------------


def read_texts(tower: Any, tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, int, list[int]]:
    """Tokenize texts and find their words.

    Returns:
        ``(tokens, start, lengths)``: the token ids ``[n, L]``, the place of the first word in each
        text, and the number of tokens of the words of each text.
    """
    tokens = tokenizer(texts)
    if _pool_type(tower) != "last":
        return tokens, 1, (end_of_text(tower, tokens) - 1).tolist()
    # The tokenizer adds the same special tokens to an empty text.
    empty = tokenizer([""])
    n_added = int(end_of_text(tower, empty))
    start = int(n_added > 0 and bool((tokens[:, 0] == empty[0, 0]).all()))
    return tokens, start, (end_of_text(tower, tokens) - n_added).tolist()


def end_of_text(tower: Any, tokens: Tensor) -> Tensor:
    """Return the place of the end token of each text ``[n]``.

    The end token is the token with the largest id, or the token whose id the tower stores. If a
    tower is pooled at the last place, its texts may have no end token. For such a tower, the result
    is the place of the first padding token. The padding is the run of equal tokens at the end of a
    text.
    """
    pool_type = _pool_type(tower)
    if pool_type == "last":
        is_padding = (tokens == tokens[:, -1:]).flip(1).int().cumprod(dim=1)
        return tokens.shape[1] - is_padding.sum(dim=1)
    if pool_type == "eos":
        tokens = (tokens == _eos_id(tower)).int()
    return tokens.argmax(dim=-1)


# --- the parts of a forward pass ---------------------------------------------------------------


def embed_tokens(tower: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return token embeddings with their positions ``[n, L, W]``, and the attention mask."""
    if not _is_clip(tower):
        x, mask = tower._embeds(tokens)  # adds the class token of CoCa, and masks padding
        return x, mask
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype)
    return x + tower.positional_embedding.to(dtype), tower.attn_mask


def run_layer(tower: Any, layer: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output ``[n, L, W]`` of a layer."""
    from openvclip.towers.open_clip import run_block

    return run_block(tower.transformer, layer, x, mask)


def pool_and_project(tower: Any, tokens: Tensor, x: Tensor) -> Tensor:
    """Return the features ``[n, D]`` of texts, not normalised.

    Args:
        tower: a text tower.
        tokens: token ids ``[n, L]``.
        x: output of the last layer.
    """
    features = _pooled(tower, tokens, x)
    projection = tower.text_projection
    if projection is None:
        return features
    projected: Tensor = (
        projection(features) if isinstance(projection, nn.Linear) else features @ projection
    )
    return projected


def _pooled(tower: Any, tokens: Tensor, x: Tensor) -> Tensor:
    from open_clip.transformer import text_global_pool

    pooled: Tensor
    if getattr(tower, "cls_emb", None) is not None:
        pooled = tower.ln_final(text_global_pool(x, pool_type="last"))
    else:
        eos = _eos_id(tower)
        pooled = text_global_pool(tower.ln_final(x), tokens, _pool_type(tower), eos_token_id=eos)
    return pooled


def _pool_type(tower: Any) -> str:
    pool_type: str = tower.text_pool_type if _is_clip(tower) else tower.pool_type
    return pool_type


def _eos_id(tower: Any) -> Any:
    return getattr(tower, "text_eos_id" if _is_clip(tower) else "eos_id", None)
