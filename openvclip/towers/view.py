"""Which frames the tokens of a frame attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from openvclip.errors import ExpansionOptionError

Boundary = Literal["zero", "mask", "replicate"]


@dataclass(frozen=True)
class FrameView:
    """Which frames the tokens of a frame attend to.

    Attributes:
        window: frames on either side; 0 is plain CLIP, each frame on its own.
        boundary: what stands for frames outside the clip: ``"zero"`` (zero key and value
            vectors), ``"mask"`` (nothing) or ``"replicate"`` (the end frame again).
    """

    window: int = 1
    boundary: Boundary = "zero"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ExpansionOptionError(
                f"window={self.window!r}: expected a number of frames on either side, 1 or more."
            )
        if self.boundary not in get_args(Boundary):
            raise ExpansionOptionError(
                f"boundary={self.boundary!r}: expected one of "
                + ", ".join(repr(name) for name in get_args(Boundary))
                + "."
            )
