"""Windows: the parts of a few seconds into which an index cuts a video."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from openvclip.checkpoints.contract import Contract
from openvclip.errors import SearchError

__all__ = ["Window", "WindowOptions", "WindowSettings"]


class Window(NamedTuple):
    """A window of a video: a row of an index.

    Attributes:
        path: the video file.
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video.
    """

    path: str
    start: float
    end: float


@dataclass(frozen=True)
class WindowOptions:
    """The options for the windows of a new index.

    Attributes:
        seconds: length of a window. Default: the length of a clip in the contract of the model,
            frames x sampling rate / frame rate.
        step: seconds from the start of a window to the start of the next window. Default: half of
            ``seconds``.

    Raises:
        SearchError: a number is not above 0, or ``step`` is larger than ``seconds``.
    """

    seconds: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "step"):
            value: Any = getattr(self, name)
            if value is not None and not _is_length(value):
                raise SearchError(f"{name}={value!r}: expected a number of seconds above 0.")

    def settings(self, contract: Contract) -> WindowSettings:
        """Return the settings with the defaults of a model.

        Args:
            contract: the contract of the model.

        Raises:
            SearchError: ``step`` is larger than the length of a window.
        """
        frames = contract.frames
        seconds = self.seconds
        if seconds is None:
            seconds = frames.num_frames * frames.sampling_rate / frames.target_fps
        step = seconds / 2 if self.step is None else self.step
        if step > seconds:
            raise SearchError(
                f"step={step:g} is larger than the length of a window, {seconds:g} seconds, so "
                "parts of a video would be in no window. Give a smaller step."
            )
        return WindowSettings(float(seconds), float(step), frames.num_frames)


@dataclass(frozen=True)
class WindowSettings:
    """The windows of an index.

    Attributes:
        seconds: length of a window.
        step: seconds from the start of a window to the start of the next window.
        num_frames: number of frames of a window that the model is given.
    """

    seconds: float
    step: float
    num_frames: int

    def __str__(self) -> str:
        return f"{self.seconds:.4g} s, a step of {self.step:.4g} s, {self.num_frames} frames"


def _is_length(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
