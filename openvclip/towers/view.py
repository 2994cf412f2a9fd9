"""The frames that the tokens of a frame attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from openvclip.errors import ExpansionOptionError, UsageError

_WIDEST = 1024  # frames on either side

Boundary = Literal["zero", "mask", "replicate"]
"""How temporal attention treats the frames in view that lie outside the clip.

- ``"zero"``: their keys and values are zero vectors, which take part in the softmax.
- ``"mask"``: they get no attention weight.
- ``"replicate"``: the first or the last frame of the clip is repeated.
"""


Pooling = Literal["unit_frames", "frames"]
"""How the features of the frames of a clip become one feature.

- ``"unit_frames"``: the mean of the L2-normalised frame features (Open-VCLIP).
- ``"frames"``: the mean of the frame features, then L2-normalised (ViFi-CLIP).
"""


@dataclass(frozen=True)
class FrameView:
    """The frames that the tokens of a frame attend to.

    Attributes:
        window: number of frames on either side. With 0 each frame attends to itself alone, as in
            the original CLIP. Default: 1.
        boundary: how frames outside the clip are treated, see :data:`Boundary`.
            Default: ``"zero"``.

    Raises:
        ExpansionOptionError: if ``window`` or ``boundary`` is out of range.
    """

    window: int = 1
    boundary: Boundary = "zero"

    def __post_init__(self) -> None:
        require_window(self.window, minimum=0)
        if self.boundary not in get_args(Boundary):
            names = ", ".join(repr(name) for name in get_args(Boundary))
            raise ExpansionOptionError(f"boundary={self.boundary!r}: expected one of {names}.")


@dataclass(frozen=True)
class ExpansionSettings:
    """The settings with which :func:`openvclip.expand_temporal_attention` expanded a model.

    Attributes:
        window: number of frames on either side that a frame attends to.
        boundary: how frames outside the clip are treated.
        layers: indices of the expanded layers; ``None`` if all layers are expanded.
    """

    window: int
    boundary: Boundary
    layers: tuple[int, ...] | None = None


def require_pooling(pooling: object) -> Pooling:
    """Return ``pooling``, or raise :class:`UsageError` unless it is a :data:`Pooling`."""
    known: tuple[Pooling, ...] = get_args(Pooling)
    for name in known:
        if pooling == name:
            return name
    raise UsageError(f"pooling={pooling!r}: expected {' or '.join(map(repr, known))}.")


def require_window(window: object, minimum: int = 1) -> None:
    """Raise :class:`ExpansionOptionError` unless ``window`` is an int in ``[minimum, 1024]``.

    Each frame gets copies of the keys and values of the frames in view, so memory grows with the
    window.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < minimum:
        raise ExpansionOptionError(
            f"window={window!r}: expected a number of frames on either side, {minimum} or more."
        )
    if window > _WIDEST:
        raise ExpansionOptionError(
            f"window={window}: expected at most {_WIDEST} frames on either side."
        )
