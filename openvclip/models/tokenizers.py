"""Tokenizers of any library as one function from texts to a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import ModelNameError, UsageError, reason_of
from openvclip.models.features import is_transformers, text_rules
from openvclip.models.hub import is_offline

Tokenizer = Callable[[list[str]], Tensor]
"""Function from n texts to token ids ``[n, L]``, such as the result of open_clip.get_tokenizer."""

# Texts with capitals, punctuation, other scripts, an end at the context length, and none at all.
_SAMPLES = [
    "a video of a person using archery.",
    "Ein Rennen -- schnell!  (São Paulo), 第2回",
    "it's the  'clean_jerk' & a &amp; b",
    "a photo of " + "horses and riders " * 60,
    "",
]
_UNKNOWN_LENGTH = 10**9  # tokenizers of transformers have 1e30 as the length if it is not known


def as_tokenizer(tokenizer: Any, model: nn.Module) -> Tokenizer:
    """Return a tokenizer as a function from a list of texts to a tensor.

    A tokenizer or a processor of transformers (``AutoTokenizer``, ``AutoProcessor``) is called as
    the model was trained: texts are cut at the length of the text tower. For CLIP and SigLIP they
    are padded to this length, 64 tokens for SigLIP, and for SigLIP they are written in lower case.
    For text towers that must not see the padding (ALIGN, AltCLIP, Chinese-CLIP), the attention mask
    is added.

    Args:
        tokenizer: a tokenizer or a processor of transformers; or a function from a list of texts to
            token ids, which is returned as it is.
        model: the CLIP model that the texts are for.

    Returns:
        A function of n texts. It returns token ids ``[n, L]``; or ``[n, 2, L]``, the token ids and
        the attention mask of each text, if the text tower needs the mask.

    Raises:
        UsageError: ``tokenizer`` is an image processor, or is not callable.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and hasattr(tokenizer, "image_processor"):  # a processor
        tokenizer = inner
    if _is_of_transformers(tokenizer):
        return _Padded(tokenizer, model)
    if not callable(tokenizer) or hasattr(tokenizer, "image_mean"):
        raise UsageError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a function from a list of texts "
            "to token ids, or a tokenizer or processor of transformers (AutoTokenizer, "
            "AutoProcessor)."
        )
    function: Tokenizer = tokenizer
    return function


def _is_of_transformers(tokenizer: Any) -> bool:
    # The names that every tokenizer of transformers has; transformers itself is not imported.
    return all(hasattr(tokenizer, n) for n in ("model_input_names", "model_max_length", "pad"))


class _Padded:
    """A tokenizer of transformers, called as a model needs it.

    Attributes:
        tokenizer: the tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self.tokenizer = tokenizer
        rules = text_rules(model)
        self._mask = rules.mask and is_transformers(model)
        self._lower = rules.lower and getattr(tokenizer, "do_lower_case", True)
        self._length = _length(tokenizer, model)

    def __call__(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            [text.lower() for text in texts] if self._lower else list(texts),
            padding=True if self._mask else "max_length",
            truncation=True,
            max_length=self._length,
            return_attention_mask=self._mask,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return torch.stack([ids, encoded.attention_mask], dim=1) if self._mask else ids


def _length(tokenizer: Any, model: nn.Module) -> int:
    """Return the largest number of tokens of a text."""
    config = getattr(model, "config", None)
    text: Any = getattr(config, "text_config", None)
    places = getattr(text, "max_position_embeddings", None)
    if places is None:  # a model of open_clip
        places = getattr(getattr(model, "text", model), "context_length", None)
    elif _counts_from_padding(text):
        places -= text.pad_token_id + 1
    lengths = [n for n in (places, tokenizer.model_max_length) if n and n < _UNKNOWN_LENGTH]
    if not lengths:
        raise UsageError(
            f"The length of a text of {type(model).__name__} is not known. Set "
            "tokenizer.model_max_length, such as 77."
        )
    return int(min(lengths))


def _counts_from_padding(text: Any) -> bool:
    """Return whether the positions of a text begin after the padding token, as in RoBERTa."""
    return any(kind in str(getattr(text, "model_type", "")) for kind in ("roberta", "altclip"))


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the token ids of texts; see :func:`as_tokenizer`.

    Raises:
        UsageError: the tokenizer does not return a tensor.
    """
    tokens: Any = tokenizer(texts)
    if not isinstance(tokens, Tensor):
        raise UsageError(
            f"The tokenizer returned a {type(tokens).__name__}; expected a tensor of token ids "
            "[n, L]. Pass a tokenizer of transformers itself, not a function that calls it."
        )
    return tokens


def tokenizer_of_folder(model: nn.Module, name: str, *, offline: bool | None = None) -> Tokenizer:
    """Return the tokenizer that is stored with a model of transformers.

    Args:
        model: the model.
        name: a folder, or a name on the Hugging Face Hub.
        offline: whether the Hub can't be reached. Default: the Hub is asked.

    Raises:
        ModelNameError: there is no tokenizer, or it can't be loaded.
    """
    from transformers import AutoTokenizer

    offline = is_offline(name) if offline is None else offline
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise ModelNameError(
            f"The tokenizer of {name} can't be loaded: {reason}. Save the tokenizer in the folder "
            "of the model, with processor.save_pretrained(folder)."
        ) from error
    # Without files, transformers makes a tokenizer without words, and says nothing.
    if set(tokenizer("a photo").input_ids) <= set(tokenizer.all_special_ids):
        raise ModelNameError(
            f"The tokenizer of {name} knows no words: the folder lacks the files of the tokenizer. "
            "Save the tokenizer in this folder, with processor.save_pretrained(folder)."
        )
    return as_tokenizer(tokenizer, model)


def same_tokens(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers make the same tokens of some texts that tell tokenizers apart.

    Args:
        first: a function from a list of texts to a tensor.
        second: another function.
    """
    tokens, others = first(list(_SAMPLES)).cpu(), second(list(_SAMPLES)).cpu()
    return tokens.shape == others.shape and torch.equal(tokens, others)


def tokens_left_out(tokenizer: Tokenizer, text: str) -> int:
    """Return the number of tokens of a text that a tokenizer cuts off, 0 if it cuts nothing.

    Tokenizers do not say that they cut a text. So the tokens of its parts are counted too.

    Args:
        tokenizer: a function from a list of texts to a tensor; see :func:`as_tokenizer`.
        text: the text.
    """

    def counts(*texts: str) -> list[int]:
        """The tokens of texts, without the marks at the beginning and at the end."""
        tokens = tokens_of(tokenizer, ["", *texts]).cpu()
        if tokens.ndim == 3:  # the attention mask is below the ids
            used = tokens[:, 1].sum(dim=1)
        else:  # the places before the padding, which the empty text has at its end
            other = tokens != tokens[0, -1]
            places = torch.arange(1, tokens.shape[1] + 1)
            used = (other * places).max(dim=1).values
        return [int(count) for count in (used - used[0]).tolist()[1:]]

    def all_of(part: str) -> int:
        count, longer = counts(part, f"{part} a a a")
        if longer > count or len(part) < 2:
            return count
        middle = len(part) // 2
        spaces = [i for i, letter in enumerate(part) if letter.isspace()]
        cut = min(spaces, key=lambda i: abs(i - middle), default=middle)
        cut = cut if 0 < cut < len(part) - 1 else middle
        return all_of(part[:cut]) + all_of(part[cut:])

    count, longer = counts(text, f"{text} a a a")
    return 0 if longer > count or count == 0 else max(0, all_of(text) - count)
