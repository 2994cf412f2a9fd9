"""Find the text tower of a model, and the words in its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from openvclip.errors import PromptOptionError, UnsupportedModelError
from openvclip.models.features import is_transformers
from openvclip.models.tokenizers import Tokenizer
from openvclip.towers import hf_text

if TYPE_CHECKING:  # the module imports open_clip
    from openvclip.towers import open_clip_text

    TextTower = open_clip_text.TextTower | hf_text.TextTower

_TOWERS = "a text tower of open_clip, or of CLIP, MetaCLIP 2 or SigLIP in transformers"


def find_text_tower(model: nn.Module) -> TextTower | None:
    """Return the text tower of a model, or None if it takes no prompts."""
    if is_transformers(model):
        return hf_text.find_text_tower(model)
    from openvclip.towers import open_clip_text

    return open_clip_text.find_text_tower(model)


def text_tower(model: nn.Module) -> TextTower:
    """Return the text tower of a model with text prompts.

    Raises:
        UnsupportedModelError: if the model has no text tower that takes prompts.
    """
    tower = find_text_tower(model)
    if tower is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text tower that text prompts stand in. Pass the model "
            "that the prompts were attached to."
        )
    return tower


def require_text_tower(model: nn.Module, count: int, depth: int) -> TextTower:
    """Return the text tower of ``model`` if it supports ``count`` prompts in ``depth`` layers.

    Raises:
        UnsupportedModelError: if the model has no text tower that takes prompts, or if the tower
            pools its tokens at a place where prompts can stand.
        PromptOptionError: if the text context or the number of layers is too small.
    """
    tower = find_text_tower(model)
    if tower is None or tower.pool_type not in ("argmax", "eos", "last"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text tower that takes prompts; expected {_TOWERS}, "
            "that is pooled at the end-of-text token or the last token."
            f"{_kind(model, tower)} Set text_prompts=0 to prompt the image tower alone."
        )
    # The shortest text has a start token, one token of a class name and an end token.
    if count + 3 > tower.context_length:
        raise PromptOptionError(
            f"text_prompts={count}: the text context holds {tower.context_length} tokens, and a "
            "class name with its start and end tokens needs at least 3. Use at most "
            f"{tower.context_length - 3} prompts."
        )
    require_depth("text_depth", depth, tower.layers)
    return tower


def _kind(model: nn.Module, tower: TextTower | None) -> str:
    """Return a sentence about the text tower of ``model``, or nothing if it has none."""
    text: Any = getattr(model, "text", getattr(model, "text_model", None))
    if tower is None and not isinstance(text, nn.Module):
        return ""
    kind = type(text).__name__ if tower is None else f"tower pooled by {tower.pool_type!r}"
    return f" Its text tower is a {kind}."


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


def read_texts(
    tower: TextTower, tokenizer: Tokenizer, texts: list[str]
) -> tuple[Tensor, int, list[int]]:
    """Tokenize texts and find their words.

    Returns:
        ``(tokens, start, lengths)``: the token ids ``[n, L]``, the place of the first word in each
        text, and the number of tokens of the words of each text.
    """
    tokens = tokenizer(texts)
    if tower.pool_type != "last":
        return tokens, 1, (end_of_text(tower, tokens) - 1).tolist()
    # The tokenizer adds the same special tokens to an empty text.
    empty = tokenizer([""])
    n_added = int(end_of_text(tower, empty))
    start = int(n_added > 0 and bool((tokens[:, 0] == empty[0, 0]).all()))
    return tokens, start, (end_of_text(tower, tokens) - n_added).tolist()


def end_of_text(tower: TextTower, tokens: Tensor) -> Tensor:
    """Return the place of the end token of each text ``[n]``.

    The end token is the token with the largest id, or the token whose id the tower stores. If a
    tower is pooled at the last place, its texts may have no end token. For such a tower, the result
    is the place of the first padding token. The padding is the run of equal tokens at the end of a
    text.
    """
    if tower.pool_type == "last":
        is_padding = (tokens == tokens[:, -1:]).flip(1).int().cumprod(dim=1)
        return tokens.shape[1] - is_padding.sum(dim=1)
    if tower.pool_type == "eos":
        tokens = (tokens == tower.end_id).int()  # type: ignore[attr-defined]
    return tokens.argmax(dim=-1)
