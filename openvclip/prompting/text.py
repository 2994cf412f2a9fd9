"""Text prompts, and encoding texts with prompts between their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from openvclip.errors import ClassNamesError, PromptOptionError
from openvclip.models.tokenizers import Tokenizer
from openvclip.prompting.text_towers import (
    end_of_text,
    read_texts,
    text_tower,
)

if TYPE_CHECKING:  # the module imports open_clip
    from openvclip.prompting.text_towers import TextTower

NamePosition = Literal["end", "middle", "front"]
"""Where the class name stands: after the prompts, after the first half of them, or before them."""

INIT_STD = 0.02
"""Standard deviation of randomly initialised prompts, as in both releases.

The visual prompts of Vita-CLIP are an exception.
"""


class TextPrompts(nn.Module):
    """Prompts between the start token and the end token of a text, beside the class name.

    Args:
        count: number of prompts in a text, n.
        width: width of the text tower, W.
        depth: number of layers with prompts of their own. In each of these layers after the first,
            the prompts replace the outputs of the previous layer at the same places. Default: 1.
        name_at: where the class name stands: ``"end"`` (after the prompts), ``"front"`` (before the
            prompts) or ``"middle"`` (after the first half of the prompts). Default: ``"end"``.
        class_names: the K classes that each get their own prompts. Default: all classes share the
            same prompts.

    Attributes:
        context: ``[n, W]``, or ``[K, n, W]`` with ``class_names``.
        deep: prompts of the layers after the first, ``[depth - 1, n, W]``. None if depth is 1.

    Raises:
        PromptOptionError: if ``name_at`` is unknown.
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
            names = ", ".join(repr(name) for name in get_args(NamePosition))
            raise PromptOptionError(f"name_at={name_at!r}: expected one of {names}.")
        self.name_at = name_at
        self.class_names = None if class_names is None else list(class_names)
        shape = [count, width] if class_names is None else [len(class_names), count, width]
        self.context = nn.Parameter(torch.randn(shape) * INIT_STD)
        self.deep = (
            nn.Parameter(torch.randn(depth - 1, count, width) * INIT_STD) if depth > 1 else None
        )

    @property
    def count(self) -> int:
        """Number of prompts in a text."""
        return self.context.shape[-2]

    def rows_of(self, class_names: Sequence[str]) -> list[int] | None:
        """Return the row of ``context`` for each class, or None if all classes share the prompts.

        Raises:
            ClassNamesError: if the prompts are class-specific and were made for other classes.
        """
        if self.class_names is None:
            return None
        unknown = [name for name in class_names if name not in self.class_names]
        if unknown:
            raise ClassNamesError(
                "The text prompts are class-specific. They were learned for the names of "
                f"{len(self.class_names)} classes, and {len(unknown)} of the {len(class_names)} "
                "given names are not among them: "
                f"{', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''}. "
                "Use prompts that all classes share, or the class names alone: template='{}'."
            )
        return [self.class_names.index(name) for name in class_names]


def initial_words(tower: TextTower, tokenizer: Tokenizer, words: str, count: int) -> Tensor:
    """Return the token embeddings ``[m, W]`` of ``words``, to initialise the first m prompts.

    Raises:
        PromptOptionError: if the words have more tokens than there are prompts.
    """
    tokens, start, (n_tokens,) = read_texts(tower, tokenizer, [words])
    if n_tokens > count:
        raise PromptOptionError(
            f"words={words!r} take {n_tokens} tokens; there are {count} text prompts. Use fewer "
            f"words, or text_prompts={n_tokens}."
        )
    embedding = tower.token_embedding
    embedded: Tensor = embedding(tokens.to(embedding.weight.device))[0, start : start + n_tokens]
    return embedded.detach()


def prompted_layout(
    model: nn.Module, tokenizer: Tokenizer, class_names: Sequence[str], prompts: TextPrompts
) -> tuple[Tensor, Tensor]:
    """Tokenize the texts ``"name."`` and insert places for prompts.

    Returns:
        ``(tokens, places)``, both ``[K, L]``. ``tokens`` holds the token ids. At the place of a
        prompt it holds the first token of the text, as a placeholder. ``places`` holds the index of
        the prompt at each place, or -1 at a place without a prompt.

    Raises:
        PromptOptionError: if a class name and the prompts exceed the text context.
    """
    tower, count = text_tower(model), prompts.count
    tokens = tokenizer([f"{name}." for name in class_names])
    length = tokens.shape[1]
    end = end_of_text(tower, tokens) + count
    if int(end.max()) >= length:
        longest = class_names[int(end.argmax())]
        raise PromptOptionError(
            f"The class name {longest!r} takes {int(end.max()) + 1} tokens with start, end and "
            f"{count} prompts; the text context holds {length}. Use fewer prompts or a shorter "
            "name."
        )
    _, start, name_lengths = read_texts(tower, tokenizer, list(class_names))
    n_before = {"end": count, "middle": count // 2, "front": 0}[prompts.name_at]
    # Indices into the columns of `padded`: first the tokens (0 to length - 1), then the prompts.
    prompt_columns = range(length, length + count)
    columns = [
        [
            *range(start),
            *prompt_columns[:n_before],
            *range(start, start + name_length),
            *prompt_columns[n_before:],
            *range(start + name_length, length - count),
        ]
        for name_length in name_lengths
    ]
    source = torch.tensor(columns)
    padded = torch.cat([tokens, tokens[:, :1].expand(-1, count)], dim=1)
    return padded.gather(1, source), (source - length).clamp(min=-1)


def encode_prompted(
    model: nn.Module, prompts: TextPrompts, rows: Tensor | None, layout: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the features ``[K, D]`` of texts with prompts, not normalised.

    Args:
        model: a model with a text tower that takes prompts.
        prompts: the prompts.
        rows: for class-specific prompts the row of ``prompts.context`` of each text, ``[K]``.
        layout: the result of :func:`prompted_layout`.
    """
    tower = text_tower(model)
    tokens, places = layout
    context = prompts.context if rows is None else prompts.context[rows]
    x, mask = tower.embed(tokens)
    # A tower can append tokens to the text, such as the class token of CoCa.
    places = functional.pad(places, (0, x.shape[1] - places.shape[1]), value=-1)
    positions = tower.positional_embedding[: x.shape[1]].to(x.dtype)
    x = torch.where(_is_prompt(places), _spread(context.to(x.dtype), places) + positions, x)
    for layer in range(tower.layers):
        if tower.checkpointing:
            x = checkpoint(_layer, tower, prompts, layer, places, x, mask, use_reentrant=False)
        else:
            x = _layer(tower, prompts, layer, places, x, mask)
    return tower.pool_and_project(tokens, x)


def _layer(
    tower: TextTower,
    prompts: TextPrompts,
    layer: int,
    places: Tensor,
    x: Tensor,
    mask: Tensor | None,
) -> Tensor:
    if prompts.deep is not None and 0 < layer <= len(prompts.deep):
        deep = _spread(prompts.deep[layer - 1].to(x.dtype), places)
        x = torch.where(_is_prompt(places), deep, x)
    return tower.run_layer(layer, x, mask)


def _is_prompt(places: Tensor) -> Tensor:
    return (places >= 0)[..., None]


def _spread(prompts: Tensor, places: Tensor) -> Tensor:
    """Return ``[K, L, W]`` with the prompts ``[n, W]`` or ``[K, n, W]`` at their places.

    The values at places without a prompt are arbitrary.
    """
    return torch.take_along_dim(
        prompts.expand(len(places), -1, -1), places.clamp(min=0)[..., None], dim=1
    )
