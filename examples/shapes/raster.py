"""A batched, anti-aliased rasteriser of glyphs in NumPy: thousands of images a second per core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.glyphs import EXTENT, TABLE_SIZE, distance_tables

__all__ = ["IMAGE_SIZE", "Layer", "composite", "to_uint8"]

Array = NDArray[np.floating[Any]]

#: Height and width of the drawn images, in pixels.
IMAGE_SIZE = 32

# Number of images drawn at a time, so that the arrays of a chunk (images x 1024 pixels x 4 bytes)
# fit in the cache of the processor.
_CHUNK = 128
# Half the thickness of an outline, in pixels.
_OUTLINE = 0.6


@dataclass(frozen=True)
class Layer:
    """One glyph on each of ``B`` images. Fields have shape ``[B]``, except ``colour``: ``[B, 3]``.

    Attributes:
        glyph: index into :data:`examples.shapes.world.SHAPES`.
        colour: RGB in [0, 1].
        x, y: centre in pixels; y points downwards.
        radius: radius of the unit disc of the glyph, in pixels.
        angle: rotation in radians.
        squash: the glyph is ``squash`` times as wide and ``1 / squash`` times as high.
        opacity: in [0, 1]; images with opacity 0 are skipped.
        outline: whether only the outline of the glyph is drawn.
    """

    glyph: NDArray[np.int64]
    colour: Array
    x: Array
    y: Array
    radius: Array
    angle: Array
    squash: Array
    opacity: Array
    outline: NDArray[np.bool_]

    def rows(self, index: NDArray[np.int64]) -> Layer:
        """Return the layer of the images at ``index``."""
        return Layer(**{name: value[index] for name, value in vars(self).items()})


def composite(canvas: Array, layers: list[Layer]) -> Array:
    """Draw layers on a canvas, in place. The first layer is at the back.

    Args:
        canvas: ``[B, 32, 32, 3]``, RGB in [0, 1].
        layers: layers of ``B`` glyphs.

    Returns:
        The canvas.
    """
    for layer in layers:
        visible = np.flatnonzero(layer.opacity > 0)
        for start in range(0, len(visible), _CHUNK):
            index = visible[start : start + _CHUNK]
            coverage, shade = _coverage(layer.rows(index))
            under = canvas[index]
            ink = layer.colour[index, None, None, :] * shade[..., None]
            canvas[index] = under + coverage[..., None] * (ink - under)
    return canvas


def to_uint8(canvas: Array) -> NDArray[np.uint8]:
    """Convert RGB in [0, 1] to 8 bits; values outside are clipped."""
    return (np.clip(canvas, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _coverage(layer: Layer) -> tuple[Array, Array]:
    """Return opacity and brightness of the glyph at every pixel, each ``[B, 32, 32]``."""
    u, v = _glyph_coordinates(layer)
    distance = _look_up(layer.glyph, u, v)
    distance *= layer.radius[:, None, None]
    edge = np.where(layer.outline[:, None, None], np.abs(distance) - _OUTLINE, distance)
    coverage = np.clip(0.5 - edge, 0.0, 1.0) * layer.opacity[:, None, None]
    # One side of the glyph is brighter, so that a rotation is visible even for a ring.
    shade = np.clip(0.78 + 0.34 * u - 0.22 * v, 0.3, 1.15)
    return coverage, shade


def _glyph_coordinates(layer: Layer) -> tuple[Array, Array]:
    """Return the pixel centres as glyph coordinates ``u`` and ``v``, each ``[B, 32, 32]``."""
    pixel = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    dx = ((pixel[None] - layer.x[:, None]) / (layer.radius * layer.squash)[:, None])[:, None, :]
    dy = ((pixel[None] - layer.y[:, None]) * (layer.squash / layer.radius)[:, None])[:, :, None]
    cos, sin = np.cos(layer.angle)[:, None, None], np.sin(layer.angle)[:, None, None]
    return dx * cos + dy * sin, dy * cos - dx * sin


def _look_up(glyph: NDArray[np.int64], u: Array, v: Array) -> Array:
    tables = distance_tables()
    scale = np.float32(TABLE_SIZE / (2 * EXTENT))
    half = np.float32(TABLE_SIZE / 2)
    column = np.clip(u * scale + half, 0, TABLE_SIZE - 1).astype(np.int32)
    row = np.clip(v * scale + half, 0, TABLE_SIZE - 1).astype(np.int32)
    flat = (glyph.astype(np.int32)[:, None, None] * TABLE_SIZE + row) * TABLE_SIZE + column
    distances: Array = np.take(tables, flat)
    return distances
