"""Texts that are cut to fewer tokens than a text tower takes, as retrieval protocols demand."""

from __future__ import annotations

import torch
from torch import Tensor

from openvclip.errors import UsageError
from openvclip.models.tokenizers import Tokenizer, tokens_of

__all__ = ["shortened"]

# Longer than every text tower. Their last token is the end mark, if the tokenizer has one.
_LONG = ["a " * 2000, "b " * 2000]


def shortened(tokenizer: Tokenizer, words: int) -> Tokenizer:
    """Return a tokenizer that cuts texts to a number of tokens.

    A text that is cut still ends with the end mark of the tokenizer. The shape of the token ids
    does not change: padding follows the end mark. So the model is called as without the cut.

    Args:
        tokenizer: a function from n texts to token ids ``[n, L]``, or to ids and an attention mask
            ``[n, 2, L]``; see :func:`openvclip.models.as_tokenizer`.
        words: the largest number of tokens of a text, with the marks of its begin and its end.

    Returns:
        A function from n texts to token ids of the same shape.

    Raises:
        UsageError: ``words`` is below 3, which leaves no token of the text.
    """
    if isinstance(words, bool) or not isinstance(words, int) or words < 3:
        raise UsageError(
            f"words={words!r}: expected at least 3 tokens, because two of them are the marks of "
            "the begin and the end."
        )

    def cut(texts: list[str]) -> Tensor:
        tokens = tokens_of(tokenizer, texts)
        return tokens if tokens.shape[-1] <= words else _cut(tokens, words, *_marks(tokenizer))

    return cut


def _marks(tokenizer: Tokenizer) -> tuple[int, int | None]:
    """Return the id of the padding, and the id of the end mark if the tokenizer has one."""
    short, *long = tokens_of(tokenizer, ["a", *_LONG])
    ids = [row[0] if row.ndim > 1 else row for row in (short, *long)]
    padding, first, second = (int(row[-1]) for row in ids)
    return padding, first if first == second else None


def _cut(tokens: Tensor, words: int, padding: int, end: int | None) -> Tensor:
    tokens = tokens.clone()
    ids = tokens if tokens.ndim == 2 else tokens[:, 0]
    # The tokens of the padding stand at the end of a row; the first of them can be the end mark.
    trailing = (ids == padding).flip(-1).to(torch.int64).cumprod(dim=-1).sum(dim=-1)
    used = ids.shape[-1] - trailing + (1 if end == padding else 0)
    rows = (used > words).nonzero()[:, 0]
    if end is not None:
        ids[rows, words - 1] = end
    ids[rows, words:] = padding
    if tokens.ndim == 3:
        tokens[rows, 1, words:] = 0
    return tokens
