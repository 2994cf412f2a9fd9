"""The sections of a contract, and the rules for the values of their fields.

A contract comes from a file that somebody may have edited. A field whose type is
``Annotated[type, rule]`` is therefore checked when its section is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_type_hints

from openvclip.errors import ContractError


@dataclass(frozen=True)
class Rule:
    """A rule for the values of a field.

    Attributes:
        expected: the values that the rule allows, in words.
        allows: whether the rule allows a value.
    """

    expected: str
    allows: Callable[[Any], bool]

    def or_none(self) -> Rule:
        """Return the rule that allows ``None`` too."""
        return Rule(f"{self.expected}, or null", lambda value: value is None or self.allows(value))

    def list(self, expected: str, length: int | None = None) -> Rule:
        """Return the rule of a list whose items this rule allows.

        Args:
            expected: the lists that the rule allows, in words.
            length: number of items. Default: any number.
        """

        def allows(value: Any) -> bool:
            if not isinstance(value, (list, tuple)) or not all(map(self.allows, value)):
                return False
            return length is None or len(value) == length

        return Rule(expected, allows)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NUMBER = Rule("a number", _is_number)
ABOVE_0 = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
WHOLE = Rule("a whole number", _is_whole)
COUNT = Rule("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
_SHARE = Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
# Logits divided by such a temperature are finite in float32.
_TEMPERATURE = Rule(
    "a number from 1e-30 to 1e30", lambda value: _is_number(value) and 1e-30 <= value <= 1e30
)
TEXT = Rule("a text", lambda value: isinstance(value, str) and value != "")
OBJECT = Rule("an object", lambda value: isinstance(value, dict) and all(map(TEXT.allows, value)))
COLOURS = NUMBER.list("three numbers", length=3)


class Checked:
    """Checks the fields of a dataclass when it is made, and turns lists into tuples."""

    def __post_init__(self) -> None:
        section: Any = type(self)
        for name, rule in _rules(section).items():
            value = getattr(self, name)
            if not rule.allows(value):
                raise ContractError(
                    f"{name} is {value!r} in the contract; expected {rule.expected}."
                )
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))


@cache
def _rules(section: Any) -> dict[str, Rule]:
    hints = get_type_hints(section, include_extras=True)
    rules = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: rule[0] for name, rule in rules.items() if rule}


@dataclass(frozen=True)
class Expansion(Checked):
    """The temporal attention of a model; see :func:`openvclip.expand_temporal_attention`.

    Attributes:
        window: number of frames on either side that a frame attends to.
        boundary: how frames outside the clip are treated.
        layers: indices of the expanded layers; ``None`` for all layers.
    """

    window: Annotated[int, COUNT] = 1
    boundary: Annotated[str, TEXT] = "zero"
    layers: Annotated[tuple[int, ...] | None, WHOLE.list("a list of numbers").or_none()] = None


@dataclass(frozen=True)
class Frames(Checked):
    """The frames of a video that a model is given; see :class:`openvclip.video.Sampling`.

    Attributes:
        num_frames: number of frames in a view.
        sampling_rate: distance between two frames of a view, in frames at ``target_fps``.
        target_fps: frame rate to which ``sampling_rate`` refers, in frames per second.
        sampler: the rule that chooses the frames of a view.
        views: number of views of a video.
    """

    num_frames: Annotated[int, COUNT] = 8
    sampling_rate: Annotated[int, COUNT] = 16
    target_fps: Annotated[float, ABOVE_0] = 30
    sampler: Annotated[str, TEXT] = "released"
    views: Annotated[int, COUNT] = 3


@dataclass(frozen=True)
class Pixels(Checked):
    """The pixels that a model is given; see :func:`openvclip.video.transforms.build`.

    Attributes:
        name: name of the transform.
        size: height and width of a frame, in pixels.
        mean: mean of the RGB channels, for pixels in [0, 1].
        std: standard deviation of the RGB channels, for pixels in [0, 1].
        short_side: short side of a frame before the crop, in pixels; ``None`` for the default.
        crops: number of crops of a view.
    """

    name: Annotated[str, TEXT]
    size: Annotated[int, COUNT]
    mean: Annotated[tuple[float, ...], COLOURS]
    std: Annotated[tuple[float, ...], COLOURS]
    short_side: Annotated[int | None, COUNT.or_none()] = None
    crops: Annotated[int, COUNT] = 1


@dataclass(frozen=True)
class Base(Checked):
    """The original CLIP that a model was fine-tuned from.

    Attributes:
        name: name of the model in its library.
        pretrained: its weights: a tag of open_clip or the name of a file; ``None`` if the name
            stands for the weights too.
        weights_hash: :func:`openvclip.weights.weights_hash` of the weights, if it is known.
    """

    name: Annotated[str, TEXT]
    pretrained: Annotated[str | None, TEXT.or_none()] = None
    weights_hash: Annotated[str | None, TEXT.or_none()] = None


@dataclass(frozen=True)
class Confidence(Checked):
    """The calibration of a model on clips of its user.

    Attributes:
        temperature: the logits are divided by this number before the softmax.
        threshold: a clip whose ``score`` is below the threshold is none of the labels. ``None``:
            no clip is rejected.
        score: name of the score that ``threshold`` belongs to.
        keep: share of the calibration clips whose score is at least ``threshold``.
        clips: number of clips of the calibration.
    """

    temperature: Annotated[float, _TEMPERATURE] = 1.0
    threshold: Annotated[float | None, NUMBER.or_none()] = None
    score: Annotated[str | None, TEXT.or_none()] = None
    keep: Annotated[float | None, _SHARE.or_none()] = None
    clips: Annotated[int | None, COUNT.or_none()] = None
