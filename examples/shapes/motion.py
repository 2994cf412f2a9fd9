"""The motions of the shapes: eight actions, each with both directions equally likely.

Lengths are in pixels, y points downwards, angles are in radians.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.world import ACTIONS

__all__ = ["CENTRE", "Motion", "Pose", "sample_motion", "uniform"]

Array = NDArray[np.floating[Any]]
Index = NDArray[np.int64]

#: The centre of an image, in pixels.
CENTRE = IMAGE_SIZE / 2


@dataclass(frozen=True)
class Pose:
    """The position and the appearance of glyphs.

    The fields have the same meaning as in :class:`examples.shapes.raster.Layer`. All fields have
    the same shape.
    """

    x: Array
    y: Array
    radius: Array
    angle: Array
    squash: Array
    opacity: Array

    def changed(self, rows: NDArray[np.bool_], **values: Array) -> Pose:
        """Return a pose with new values for some fields at ``rows``."""
        return replace(
            self,
            **{name: np.where(rows, value, getattr(self, name)) for name, value in values.items()},
        )


@dataclass(frozen=True)
class Motion:
    """The motions of ``B`` glyphs in a clip. All fields have shape ``[B]``.

    Attributes:
        action: index into :data:`examples.shapes.world.ACTIONS`.
        x, y, radius, angle: the pose around which the glyph moves.
        phase: the phase of a repeated motion in the middle of the clip, in cycles; uniform in
            [0, 1).
        speed: speed of the motion, as a factor of the usual speed of the action. The sign is the
            direction; both signs are equally likely.
    """

    action: Index
    x: Array
    y: Array
    radius: Array
    angle: Array
    phase: Array
    speed: Array

    def reversed(self) -> Motion:
        """Return the reversed motion, which is the motion with the opposite speed.

        The law is ``motion.poses(t) == motion.reversed().poses(-t)``. Because :func:`sample_motion`
        draws both signs of the speed with the same probability, a reversed clip is exactly as
        likely as the clip.
        """
        return replace(self, speed=-self.speed)

    def poses(self, time: Array) -> Pose:
        """Return the poses at times ``[F]``, as fields of shape ``[B, F]``.

        Time runs from -0.5 (first frame) to 0.5 (last frame).
        """
        advance = self.speed[:, None] * time[None]
        shape = advance.shape
        pose = Pose(
            x=np.broadcast_to(self.x[:, None], shape),
            y=np.broadcast_to(self.y[:, None], shape),
            radius=np.broadcast_to(self.radius[:, None], shape),
            angle=np.broadcast_to(self.angle[:, None], shape),
            squash=np.ones(shape, np.float32),
            opacity=np.ones(shape, np.float32),
        )
        for name in ACTIONS:
            rows = np.broadcast_to((self.action == ACTIONS.index(name))[:, None], shape)
            pose = pose.changed(rows, **_moved(name, pose, self.phase[:, None], advance))
        return pose


def _moved(action: str, pose: Pose, phase: Array, advance: Array) -> dict[str, Array]:
    """Return the fields of a pose that an action changes.

    ``advance`` is speed times time. An action may use time only through ``advance``, because this
    makes every clip reversible.
    """

    def wave(cycles: float) -> Array:
        return np.cos(2 * np.pi * (phase + cycles * advance))

    if action == "blinking":
        return {"opacity": np.clip(0.55 + 0.75 * wave(2.0), 0.08, 1.0)}
    if action == "sliding":
        return {"x": pose.x + 17.0 * advance}
    if action == "climbing":
        return {"y": pose.y + 17.0 * advance}
    if action == "pulsing":
        return {"radius": pose.radius * (1.0 + 0.32 * wave(1.5))}
    if action == "spinning":
        return {"angle": pose.angle + 2 * np.pi * (phase + 0.8 * advance)}
    if action == "shaking":
        jolt = wave(3.2)
        return {"x": pose.x + 2.4 * jolt, "angle": pose.angle + 0.22 * jolt}
    if action == "bouncing":
        height = np.abs(wave(1.0))
        landing = np.clip(1.0 - 3.0 * height, 0.0, 1.0)
        return {"y": pose.y + 6.5 - 13.0 * height, "squash": 1.0 + 0.3 * landing}
    return {}


def sample_motion(actions: Index, rng: np.random.Generator) -> Motion:
    """Draw a random motion for each action of ``[B]``."""
    count = len(actions)
    sense = rng.choice([-1.0, 1.0], count)
    return Motion(
        action=np.asarray(actions, np.int64),
        x=uniform(rng, CENTRE - 3, CENTRE + 3, count),
        y=uniform(rng, CENTRE - 3, CENTRE + 3, count),
        radius=uniform(rng, 7.0, 10.5, count),
        angle=uniform(rng, -0.2, 0.2, count),
        phase=uniform(rng, 0.0, 1.0, count),
        speed=(sense * rng.uniform(0.75, 1.25, count)).astype(np.float32),
    )


def uniform(
    rng: np.random.Generator, low: float, high: float, shape: int | tuple[int, ...]
) -> Array:
    """Draw float32 numbers from [low, high)."""
    return rng.uniform(low, high, shape).astype(np.float32)
