"""A page to search an index of videos, which this machine serves. It needs ``openvclip[app]``."""

from openvclip.search.app.answers import Limits
from openvclip.search.app.guard import is_loopback
from openvclip.search.app.interface import require_gradio
from openvclip.search.app.server import serve

__all__ = ["Limits", "is_loopback", "require_gradio", "serve"]
