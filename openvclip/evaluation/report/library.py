"""The library that draws the figures of a page: Vega-Lite, inside the page."""

from __future__ import annotations

import threading

from openvclip.errors import MissingDependencyError

__all__ = ["vega_script"]

_turn = threading.Lock()
_script = ""


def vega_script() -> str:
    """Return the script of Vega-Lite, which sets ``window.vegaEmbed``; about 900 KB.

    It is made once in a process, in a few seconds.

    Raises:
        MissingDependencyError: vl-convert is not installed.
    """
    global _script
    with _turn:
        if not _script:
            try:
                import vl_convert
            except ImportError as error:
                raise MissingDependencyError(
                    "vl-convert is not installed, but the figures of a page need it. Install it "
                    'with: pip install "openvclip[report]"'
                ) from error
            bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
            # A function keeps the names of the bundle apart from those of the page. No text may
            # end the script element.
            bundle = bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")
            _script = f"(function () {{\n{bundle}\n}})();"
    return _script
