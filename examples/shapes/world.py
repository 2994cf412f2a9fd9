"""The vocabulary of the shapes world: shapes, colours, actions, splits and phrasings.

A class is a shape and an action, named like ``"star sliding"``. The shapes fall into three disjoint
sets, so that the classes of
one set never occur in another: the model is fine-tuned on clips of :data:`SEEN`, every
hyper-parameter is chosen with :data:`DEVELOPMENT`, and :data:`UNSEEN` is reported and never chosen
on. All shapes and all actions occur in the still images on which the tiny CLIP is pretrained.

Why no action depends on the arrow of time: the expanded attention reads frames ``t - 1``, ``t`` and
``t + 1`` as one unordered set of keys (there is no temporal position embedding), and the frame
features are averaged. Both stay the same when the clip is played backwards, so a clip and its
reversal get the same video feature, and "sliding to the left" against "sliding to the right" could
not be learnt by any weights. Every action here is therefore symmetric: a clip played backwards is
an equally likely clip of the same class (:meth:`examples.shapes.motion.Motion.reversed` states the
law).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = [
    "ACTIONS",
    "COLOURS",
    "DEVELOPMENT",
    "SEEN",
    "SHAPES",
    "SPLITS",
    "TEMPLATES",
    "UNSEEN",
    "Split",
    "class_names",
    "still_caption",
]

Split = Literal["seen", "development", "unseen"]

SEEN: tuple[str, ...] = ("square", "star", "heart", "arrow", "bottle", "flower", "house", "key")
DEVELOPMENT: tuple[str, ...] = (
    "triangle",
    "cross",
    "crescent",
    "bell",
    "fish",
    "hourglass",
    "leaf",
    "ladder",
)
UNSEEN: tuple[str, ...] = (
    "diamond",
    "ring",
    "drop",
    "bolt",
    "mushroom",
    "hammer",
    "umbrella",
    "tree",
)

#: The shapes of each split.
SPLITS: dict[Split, tuple[str, ...]] = {"seen": SEEN, "development": DEVELOPMENT, "unseen": UNSEEN}

#: All 24 shapes. A shape's place in this tuple is its index in the drawing functions.
SHAPES: tuple[str, ...] = SEEN + DEVELOPMENT + UNSEEN

ACTIONS: tuple[str, ...] = (
    "resting",
    "blinking",
    "sliding",
    "climbing",
    "pulsing",
    "spinning",
    "shaking",
    "bouncing",
)

#: Colour names with their RGB values in [0, 1].
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.25, 0.40, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "orange": (0.98, 0.55, 0.10),
    "purple": (0.65, 0.25, 0.85),
    "cyan": (0.20, 0.80, 0.85),
    "white": (0.95, 0.95, 0.95),
}

#: Templates of the zero-shot classifier, each with one ``{}`` for the class name.
TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a video of a {}.",
    "a picture of a {}.",
    "a clip of a {}.",
)

_CAPTION_TEMPLATES: tuple[str, ...] = (
    *TEMPLATES,
    "an image of a {}.",
    "a drawing of a {}.",
    "a {}.",
    "one {}.",
    "the {}",
)
_PHRASES: tuple[str, ...] = (
    "{shape} {action}",
    "{shape} {action}",
    "{action} {shape}",
    "{shape} that is {action}",
)


def class_names(split: Split) -> list[str]:
    """Return the class names of a split: all actions of the first shape, then of the second, ...

    Args:
        split: ``"seen"``, ``"development"`` or ``"unseen"``.

    Returns:
        ``len(SPLITS[split]) * len(ACTIONS)`` names such as ``"star sliding"``. A label is a
        position in this list.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    return [f"{shape} {action}" for shape in SPLITS[split] for action in ACTIONS]


def still_caption(
    shape: str, action: str | None, colour: str | None, rng: np.random.Generator
) -> str:
    """Phrase a caption of a still image in one of several ways.

    Args:
        shape: name of the shape.
        action: name of the action, or ``None`` to leave it out.
        colour: name of the colour, or ``None`` to leave it out.
        rng: chooses the phrasing.

    Returns:
        A caption such as ``"a picture of a red star sliding."``.
    """
    phrase = shape if action is None else _pick(_PHRASES, rng).format(shape=shape, action=action)
    subject = phrase if colour is None else f"{colour} {phrase}"
    return _pick(_CAPTION_TEMPLATES, rng).format(subject)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
