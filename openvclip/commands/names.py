"""Names of files as texts that a person reads."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(text: str) -> str:
    """Return a text with line breaks and other control characters as in a Python string.

    A name of a file can hold any byte: line breaks, characters that move the cursor of a terminal
    or turn the direction of the text, and bytes that are no text at all.

    Args:
        text: the text, such as a path.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
