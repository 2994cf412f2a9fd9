"""Captions that are cut to W tokens equal those of tokenizers that know this length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from openvclip.errors import UsageError
from openvclip.models.short_texts import shortened

SIMPLE = SimpleTokenizer(context_length=77)
TEXTS = st.lists(st.text("abc .!<|>é", max_size=160), min_size=1, max_size=4)


@given(TEXTS, st.integers(3, 80))
def test_cut_as_the_tokenizer_of_clip_cuts(texts: list[str], words: int) -> None:
    tokens = shortened(SIMPLE, words)(texts)
    assert tokens.shape == (len(texts), 77)
    short = SIMPLE(texts, context_length=min(words, 77))
    assert torch.equal(tokens[:, : short.shape[1]], short)
    assert not tokens[:, short.shape[1] :].any()


class Words:
    """A tokenizer of words with marks, for each way of padding.

    Args:
        end: id of the end mark, or ``None`` for a tokenizer without one.
        padding: id of the padding.
        mask: whether the attention mask is returned, and rows are as long as the longest text.
    """

    def __init__(self, end: int | None, padding: int, mask: bool) -> None:
        self.end, self.padding, self.mask = end, padding, mask

    def __call__(self, texts: list[str], length: int = 20) -> Tensor:
        rows = []
        for text in texts:
            ids = [1, *(10 + len(word) + ord(word[0]) for word in text.split())]
            room = length if self.end is None else length - 1
            rows.append([*ids[:room], *([] if self.end is None else [self.end])])
        longest = max(map(len, rows)) if self.mask else 20
        ids = torch.tensor([row + [self.padding] * (longest - len(row)) for row in rows])
        if not self.mask:
            return ids
        kept = torch.tensor([[int(i < len(row)) for i in range(longest)] for row in rows])
        return torch.stack([ids, kept], dim=1)


KINDS: dict[str, tuple[int | None, int, bool]] = {
    "open_clip": (2, 0, False),
    "CLIP of transformers, padded with the end mark": (2, 2, False),
    "BERT, with a mask": (2, 0, True),
    "without an end mark": (None, 0, False),
}


@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "b", "horse", "race"]), max_size=30).map(" ".join),
        min_size=1,
        max_size=4,
    ),
    words=st.integers(3, 25),
)
def test_every_way_of_padding(kind: str, texts: list[str], words: int) -> None:
    tokenizer = Words(*KINDS[kind])
    tokens, direct = shortened(tokenizer, words)(texts), tokenizer(texts, min(words, 20))
    if tokenizer.mask:
        assert torch.equal(tokens[:, :, : direct.shape[2]], direct)
        assert not tokens[:, 1, direct.shape[2] :].any()
    else:
        assert torch.equal(tokens, direct)


@pytest.mark.parametrize("words", [2, 0, -1, True, 12.0])
def test_there_must_be_room_for_the_marks(words: Any) -> None:
    with pytest.raises(UsageError, match="expected at least 3 tokens"):
        shortened(SIMPLE, words)
