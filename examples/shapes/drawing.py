"""Stills and videos of moving shapes.

A still shows an action by a cue: a trail of ghosts, transparency, or a nested outline. In a video
the shape moves and there are no such cues. Videos also have textured backgrounds, a colour cast and
noise, which stills do not have. Fine-tuning on videos has to close this gap.

All functions draw a batch. Shapes, colours and actions are indices into
:data:`examples.shapes.world.SHAPES`, ``list(COLOURS)`` and :data:`examples.shapes.world.ACTIONS`.
Lengths are in pixels, y points downwards, and angles are in radians.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.motion import CENTRE, Motion, Pose, sample_motion, uniform
from examples.shapes.raster import IMAGE_SIZE, Layer, composite, to_uint8
from examples.shapes.world import ACTIONS, COLOURS, SHAPES

__all__ = [
    "VideoLook",
    "draw_image",
    "draw_images",
    "draw_motion",
    "draw_video",
    "draw_videos",
]

Array = NDArray[np.floating[Any]]
Index = NDArray[np.int64]

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_ACTION = {name: index for index, name in enumerate(ACTIONS)}


@dataclass(frozen=True)
class VideoLook:
    """The differences between videos and stills.

    Attributes:
        texture: contrast of the pattern behind the shape; 1 is the full brightness.
        noise: standard deviation of the noise, which is drawn for every frame; 1 is the full
            brightness.
        cast: largest relative change of a colour channel of the whole clip.
        fade: largest loss of contrast; 1 gives a uniform frame.
    """

    texture: float = 0.16
    noise: float = 0.06
    cast: float = 0.2
    fade: float = 0.35


def draw_videos(
    shapes: Index,
    colours: Index,
    actions: Index,
    rng: np.random.Generator,
    *,
    frames: int = 16,
    look: VideoLook | None = None,
) -> NDArray[np.uint8]:
    """Draw a video of each shape in its action.

    Args:
        shapes, colours, actions: indices, each ``[B]``.
        rng: random number generator for motions, backgrounds and noise.
        frames: number of frames of each video, at least 2.
        look: differences between videos and stills. Default: ``VideoLook()``.

    Returns:
        ``[B, frames, 32, 32, 3]``, RGB.

    Raises:
        ValueError: ``frames`` is less than 2.
    """
    if frames < 2:
        raise ValueError(f"a video needs at least 2 frames to show a motion, got {frames}")
    look = look or VideoLook()
    canvas = np.repeat(_video_backgrounds(len(shapes), rng, look)[:, None], frames, axis=1)
    canvas = draw_motion(canvas, shapes, colours, sample_motion(actions, rng))
    grey = uniform(rng, 0.3, 0.6, (len(shapes), 1, 1, 1, 1))
    fade = uniform(rng, 0.0, look.fade, grey.shape)
    cast = uniform(rng, 1 - look.cast, 1 + look.cast, (len(shapes), 1, 1, 1, 3))
    canvas += fade * (grey - canvas)
    canvas *= cast
    canvas += look.noise * rng.standard_normal(canvas.shape, np.float32)
    return to_uint8(canvas)


def draw_motion(canvas: Array, shapes: Index, colours: Index, motion: Motion) -> Array:
    """Draw moving shapes on a canvas ``[B, F, 32, 32, 3]`` and return the canvas."""
    frames = canvas.shape[1]
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32)
    pose = motion.poses(time)
    layer = _layer(
        np.repeat(shapes, frames), np.repeat(_PALETTE[colours], frames, axis=0), _flat(pose)
    )
    return composite(canvas.reshape(-1, *canvas.shape[2:]), [layer]).reshape(canvas.shape)


def draw_video(
    shape: str, colour: str, action: str, rng: np.random.Generator, *, frames: int = 16
) -> NDArray[np.uint8]:
    """Draw one video, ``[frames, 32, 32, 3]``, by names. See :func:`draw_videos`."""
    video: NDArray[np.uint8] = draw_videos(*_indices(shape, colour, action), rng, frames=frames)[0]
    return video


def _video_backgrounds(count: int, rng: np.random.Generator, look: VideoLook) -> Array:
    base = uniform(rng, 0.1, 0.5, (count, 1, 1, 1)) + uniform(rng, -0.08, 0.08, (count, 1, 1, 3))
    return base + _pattern(count, rng, look.texture)


def _pattern(count: int, rng: np.random.Generator, texture: float) -> Array:
    """Return a pattern with mean zero and contrast ``texture``, ``[B, 32, 32, 3]``."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) / IMAGE_SIZE
    pattern = np.zeros((count, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for _ in range(3):
        across, down = uniform(rng, -3, 3, (2, count, 1, 1))
        phase = uniform(rng, 0, 1, (count, 1, 1))
        pattern += np.sin(
            2 * np.pi * (across * axis[None, None, :] + down * axis[None, :, None] + phase)
        )
    contrast = (
        texture
        * uniform(rng, 0.3, 1.0, (count, 1, 1, 1))
        * uniform(rng, 0.5, 1.0, (count, 1, 1, 3))
    )
    return pattern[..., None] * contrast / 1.5


def draw_images(
    shapes: Index, colours: Index, actions: Index, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw a still of each shape; a cue shows the action.

    Args:
        shapes, colours, actions: indices, each ``[B]``.
        rng: random number generator for positions, sizes and backgrounds.

    Returns:
        ``[B, 32, 32, 3]``, RGB.
    """
    count = len(shapes)
    tint = uniform(rng, 0.0, 0.4, (count, 1, 1, 1)) + uniform(rng, -0.08, 0.08, (count, 1, 1, 3))
    slope = (
        uniform(rng, -0.12, 0.12, (count, 1, 1, 1))
        * np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)[None, :, None, None]
    )
    canvas = tint + slope + _pattern(count, rng, 0.08)
    body = Pose(
        x=uniform(rng, CENTRE - 4, CENTRE + 4, count),
        y=uniform(rng, CENTRE - 4, CENTRE + 4, count),
        radius=uniform(rng, 6.5, 11.0, count),
        angle=uniform(rng, -0.25, 0.25, count),
        squash=np.ones(count, np.float32),
        opacity=np.ones(count, np.float32),
    )
    colour = _PALETTE[colours]
    layers = [
        _layer(shapes, colour, *posed) for posed in _still_poses(np.asarray(actions), body, rng)
    ]
    composite(canvas, layers)
    canvas += 0.015 * rng.standard_normal(canvas.shape, np.float32)
    return to_uint8(canvas)


def draw_image(shape: str, colour: str, action: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one still, ``[32, 32, 3]``, by names. See :func:`draw_images`."""
    still: NDArray[np.uint8] = draw_images(*_indices(shape, colour, action), rng)[0]
    return still


def _still_poses(
    actions: Index, body: Pose, rng: np.random.Generator
) -> list[tuple[Pose, NDArray[np.bool_]]]:
    """Return the poses of ghosts and body, back to front.

    Each pose comes with a mask ``[B]`` of the images that show only its outline.
    """
    count = len(actions)
    sense = rng.choice([-1.0, 1.0], count).astype(np.float32)
    pace = uniform(rng, 0.8, 1.2, count)
    on = {name: actions == index for name, index in _ACTION.items()}
    plain = np.zeros(count, bool)
    hidden = replace(body, opacity=np.zeros(count, np.float32))

    spin = uniform(rng, 0, 2 * np.pi, count)
    body = body.changed(on["blinking"], opacity=uniform(rng, 0.3, 0.55, count))
    body = body.changed(on["spinning"], angle=spin)
    body = body.changed(on["bouncing"], squash=1.0 + 0.3 * pace, y=body.y + 3.0)
    posed: list[tuple[Pose, NDArray[np.bool_]]] = []
    for place in (3, 2, 1):
        faint = np.full(count, (0.0, 0.42, 0.27, 0.15)[place], np.float32)
        ghost = hidden.changed(on["sliding"], x=body.x - sense * pace * 3.6 * place, opacity=faint)
        ghost = ghost.changed(on["climbing"], y=body.y - sense * pace * 3.6 * place, opacity=faint)
        ghost = ghost.changed(
            on["spinning"], angle=body.angle - sense * pace * 0.4 * place, opacity=faint
        )
        # The ghosts of a bounce are above the body, with growing distances.
        rise = 1.2 * place * (place + 1)
        ghost = ghost.changed(
            on["bouncing"], y=body.y - pace * rise, x=body.x - sense * 1.5 * place, opacity=faint
        )
        posed.append((ghost, plain))
    for side in (-1.0, 1.0):
        blur = np.full(count, 0.45, np.float32)
        twin = hidden.changed(
            on["shaking"],
            x=body.x + side * pace * 3.0,
            angle=body.angle + side * 0.25,
            opacity=blur,
        )
        posed.append((twin, plain))
    for size in (1.4, 0.55):
        nested = hidden.changed(
            on["pulsing"], radius=body.radius * size, opacity=np.full(count, 0.8, np.float32)
        )
        posed.append((nested, on["pulsing"]))
    # The inner outline is in front of the body; all other poses are behind it.
    posed.insert(-1, (body, plain))
    return posed


def _layer(
    shapes: Index, colour: Array, pose: Pose, outline: NDArray[np.bool_] | None = None
) -> Layer:
    glyph = np.asarray(shapes, np.int64)
    fields = {name: np.asarray(value, np.float32) for name, value in vars(pose).items()}
    return Layer(
        glyph=glyph,
        colour=colour,
        outline=np.zeros(glyph.shape, bool) if outline is None else outline,
        **fields,
    )


def _flat(pose: Pose) -> Pose:
    return Pose(**{name: value.reshape(-1) for name, value in vars(pose).items()})


def _indices(shape: str, colour: str, action: str) -> tuple[Index, Index, Index]:
    places = (SHAPES.index(shape), list(COLOURS).index(colour), ACTIONS.index(action))
    first, second, third = (np.array([place], np.int64) for place in places)
    return first, second, third
