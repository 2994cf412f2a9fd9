"""Refuse pages that load something from elsewhere: the site must work without a network."""

from __future__ import annotations

import re
from typing import Any

_LOADED = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?\s(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Called by MkDocs with each finished page."""
    found = _LOADED.findall(output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {', '.join(found)}")
    return output
