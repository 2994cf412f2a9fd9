"""The vocabulary of the shapes world: shapes, colours, actions, splits and phrasings.

A class is a shape and an action, such as ``"star sliding"``. The shapes form three disjoint sets,
and so do the classes. The model is fine-tuned on clips of :data:`SEEN`. All hyper-parameters are
chosen on :data:`DEVELOPMENT`. Accuracies are reported on :data:`UNSEEN`, which is never used for a
choice. All shapes and all actions occur in the still images on which the tiny CLIP is pretrained.

No action depends on the direction of time, for this reason: the expanded attention reads the frames
``t - 1``, ``t`` and ``t + 1`` as one unordered set of keys (there is no temporal position
embedding), and the frame features are averaged. Both operations give the same result for the
reversed clip, so a clip and its reversal have the same video feature. No weights could distinguish
"sliding to the left" from "sliding to the right". Every action is therefore symmetric: a clip and
its reversal belong to the same class and are equally likely. The law is in
:meth:`examples.shapes.motion.Motion.reversed`.
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

#: All 24 shapes. The drawing functions use the index of a shape in this tuple.
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
    """Return the class names of a split, ordered by shape and then by action.

    Args:
        split: ``"seen"``, ``"development"`` or ``"unseen"``.

    Returns:
        ``len(SPLITS[split]) * len(ACTIONS)`` names such as ``"star sliding"``. A class index is an
        index into this list.

    Raises:
        ValueError: ``split`` is not known.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    return [f"{shape} {action}" for shape in SPLITS[split] for action in ACTIONS]


def still_caption(
    shape: str, action: str | None, colour: str | None, rng: np.random.Generator
) -> str:
    """Return a random caption of a still image.

    Args:
        shape: name of the shape.
        action: name of the action, or ``None`` to leave it out.
        colour: name of the colour, or ``None`` to leave it out.
        rng: random number generator that chooses the phrasing.

    Returns:
        A caption such as ``"a picture of a red star sliding."``.
    """
    phrase = shape if action is None else _pick(_PHRASES, rng).format(shape=shape, action=action)
    subject = phrase if colour is None else f"{colour} {phrase}"
    return _pick(_CAPTION_TEMPLATES, rng).format(subject)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
