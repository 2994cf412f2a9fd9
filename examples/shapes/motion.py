"""How the shapes move: eight actions, each as likely forwards as backwards.

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

#: The middle of an image, in pixels.
CENTRE = IMAGE_SIZE / 2


@dataclass(frozen=True)
class Pose:
    """Where a glyph is and how it looks.

    The fields mean what they mean in :class:`examples.shapes.raster.Layer`, and all have one shape.
    """

    x: Array
    y: Array
    radius: Array
    angle: Array
    squash: Array
    opacity: Array

    def changed(self, rows: NDArray[np.bool_], **values: Array) -> Pose:
        """Return a pose in which the given fields take new values at ``rows``."""
        return replace(
            self,
            **{name: np.where(rows, value, getattr(self, name)) for name, value in values.items()},
        )


@dataclass(frozen=True)
class Motion:
    """The movements of ``B`` glyphs over a clip. All fields have shape ``[B]``.

    Attributes:
        action: index into :data:`examples.shapes.world.ACTIONS`.
        x, y, radius, angle: the pose about which the glyph moves.
        phase: where in its cycle a repeated movement is in the middle of the clip, in turns;
            uniform in [0, 1).
        speed: the pace and the sense of the movement, as a factor on the action's usual pace; both
            senses are equally likely.
    """

    action: Index
    x: Array
    y: Array
    radius: Array
    angle: Array
    phase: Array
    speed: Array

    def reversed(self) -> Motion:
        """Return the motion played backwards, which is the same motion at the opposite speed.

        The law is ``motion.poses(t) == motion.reversed().poses(-t)``, and since
        :func:`sample_motion` draws both signs of the speed equally often, a reversed clip is
        exactly as likely as the clip itself.
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
    """Return the fields of a pose that an action changes, ``advance`` (speed x time) into the clip.

    Whatever is added here may use time only through ``advance``: that is what makes every clip
    reversible.
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
