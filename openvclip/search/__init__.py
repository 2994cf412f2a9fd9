"""An index of videos, and search by a sentence, an image or a clip."""

from openvclip.search.moments import Moment

__all__ = ["Moment"]
