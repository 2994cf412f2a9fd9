"""HTML pages that need no other file and no connection: colours, the head, pictures inside."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from html import escape
from numbers import Real

from openvclip.errors import OpenVCLIPError

__all__ = [
    "DARK",
    "LIGHT",
    "NO_ROOM",
    "PAGE_STYLE",
    "DataBudget",
    "page_head",
    "require_above_zero",
]

NO_ROOM = "No picture: the page has reached its greatest size."
"""What a page shows in place of a picture for which :class:`DataBudget` has no room."""

LIGHT = """\
--ov-page: #f6f7f9; --ov-card: #fff; --ov-line: #dde1e8; --ov-text: #1b212c; --ov-soft: #5b6472;
  --ov-accent: #2456a6; --ov-accent-deep: #2456a6; --ov-screen: #10141b; --ov-track: #e9eef7;
  --ov-won: #e08a1e; --ov-mark: #c4302b;"""
"""The colours of a light page, variables of CSS."""

DARK = """\
--ov-page: #12161d; --ov-card: #1b212b; --ov-line: #2e3643; --ov-text: #e6e9ef; --ov-soft: #9ba5b5;
  --ov-accent: #8fb4ef; --ov-accent-deep: #3a6cc0; --ov-screen: #090c11; --ov-track: #232b38;
  --ov-won: #f0a94a; --ov-mark: #ff8a80;"""
"""The colours of a dark page, variables of CSS."""

PAGE_STYLE = (
    f":root {{ color-scheme: light dark; {LIGHT} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--ov-page); color: var(--ov-text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.75rem 1.25rem 3rem; }
h1 { margin: 0 0 1.25rem; font-size: 1.1rem; font-weight: 600; color: var(--ov-soft);
  overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 1.45rem; line-height: 1.3; font-weight: 650; overflow-wrap: anywhere; }
section { margin: 0 0 2.5rem; }
section > p { margin: .15rem 0 1rem; color: var(--ov-soft); }
a:focus-visible { outline: 2px solid var(--ov-accent); outline-offset: 2px; }
footer { border-top: 1px solid var(--ov-line); padding-top: .9rem; color: var(--ov-soft);
  font-size: .85rem; overflow-wrap: anywhere; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: 0; }
footer dt, footer dd { margin: 0; }
footer p { margin: .6rem 0 0; }
@media (max-width: 480px) { main { padding: 1.1rem .8rem 2rem; } }
"""
)
"""The style of a page, in light and in dark."""


def page_head(title: str, style: str, scripts: Sequence[str], policy: str = "") -> str:
    """Return the beginning of a page, up to and with ``<body>``.

    The content security policy forbids connections, and all scripts but the scripts of the page.

    Args:
        title: the title, as text.
        style: the style sheet.
        scripts: the content of each script element of the page.
        policy: further directives of the content security policy.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    directives = [
        "default-src 'none'",
        "img-src data:",
        *([policy] if policy else []),
        "style-src 'unsafe-inline'",
        f"script-src {hashes}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(directives)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
    )


def require_above_zero(error: type[OpenVCLIPError], **settings: object) -> None:
    """Raise an error if a setting of a page is not a finite number above 0.

    Args:
        error: class of the error.
        settings: the settings by their names.
    """
    for name, value in settings.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
            raise error(f"{name}={value!r}: expected a number above 0.")


class DataBudget:
    """Data URIs of pictures and videos, up to a total size.

    Args:
        megabytes: the greatest size of all data URIs together.
    """

    def __init__(self, megabytes: float) -> None:
        self._left = megabytes * 1_000_000

    def data_uri(self, data: bytes, kind: str) -> str:
        """Return a data URI, or ``""`` if it would exceed the total size.

        Args:
            data: the content of the file.
            kind: the media type, such as ``"image/jpeg"``.
        """
        text = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        if len(text) > self._left:
            return ""
        self._left -= len(text)
        return text
