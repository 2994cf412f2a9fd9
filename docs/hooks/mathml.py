"""Equations as MathML at build time, so that pages need no script and no network to show them."""

from __future__ import annotations

import html as html_entities
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$, in pages and in docstrings.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by MkDocs with the HTML of each page before the template is filled."""
    html = _INLINE.sub(lambda match: _mathml(match[1], "inline"), html)
    html = _BLOCK.sub(
        lambda match: f'<div class="equation">{_mathml(match[1], "block")}</div>', html
    )
    if "arithmatex" in html:
        raise ValueError("an equation was not converted to MathML")
    return html


def _mathml(tex: str, display: str) -> str:
    mathml = convert(html_entities.unescape(tex).strip(), display=display)
    if "\\" in mathml or "&#x0005C;" in mathml:
        raise ValueError(f"a command is not known to latex2mathml: {tex}")
    return mathml
