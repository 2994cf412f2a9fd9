"""Parts of a generated page."""

from __future__ import annotations


def joined(text: str) -> str:
    return " ".join(text.split())


def section_of(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]
