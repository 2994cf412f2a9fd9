"""Signed distance functions of the shapes.

A glyph fits in a unit disc: x points to the right, y points downwards, both approximately in
[-1, 1]. The signed distance has the same units. It is negative inside and positive outside. The
distances are tabulated once, so that drawing a pixel is one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.world import SHAPES

__all__ = ["EXTENT", "TABLE_SIZE", "distance_tables", "signed_distance"]

Array = NDArray[np.floating[Any]]
Distance = Callable[[Array, Array], Array]

#: The tables cover x and y in [-EXTENT, EXTENT].
EXTENT = 1.25
#: Entries along each side of a table.
TABLE_SIZE = 192


def _circle(cx: float, cy: float, radius: float) -> Distance:
    return lambda x, y: np.hypot(x - cx, y - cy) - radius


def _box(left: float, top: float, right: float, bottom: float) -> Distance:
    return _polygon([(left, top), (right, top), (right, bottom), (left, bottom)])


def _polygon(points: Sequence[tuple[float, float]]) -> Distance:
    """Return the function for the exact signed distance to a simple polygon.

    The absolute value is the distance to the nearest edge. Ray casting gives the sign.
    """

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            nearest = np.minimum(nearest, np.hypot(px - along * ex, py - along * ey))
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
        return np.where(inside, -nearest, nearest)

    return distance


def _union(*parts: Distance) -> Distance:
    return lambda x, y: reduce(np.minimum, (part(x, y) for part in parts))


def _cut(body: Distance, *holes: Distance) -> Distance:
    return lambda x, y: reduce(np.maximum, (-hole(x, y) for hole in holes), body(x, y))


def _overlap(*parts: Distance) -> Distance:
    return lambda x, y: reduce(np.maximum, (part(x, y) for part in parts))


def _star(points: int, inner: float) -> Distance:
    turns = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return _polygon(
        [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, turns, strict=True)]
    )


def _petals(count: int, offset: float, radius: float) -> list[Distance]:
    turns = np.arange(count) * 2 * np.pi / count - np.pi / 2
    return [_circle(float(offset * np.cos(a)), float(offset * np.sin(a)), radius) for a in turns]


_GLYPHS: dict[str, Distance] = {
    "square": _box(-0.72, -0.72, 0.72, 0.72),
    "star": _star(5, 0.42),
    "heart": _union(
        _circle(-0.43, -0.3, 0.48),
        _circle(0.43, -0.3, 0.48),
        _polygon([(-0.86, -0.1), (0.86, -0.1), (0.0, 0.95)]),
    ),
    "arrow": _union(
        _polygon([(0.0, -0.85), (1.0, 0.0), (0.0, 0.85)]), _box(-0.95, -0.28, 0.05, 0.28)
    ),
    "bottle": _union(_box(-0.48, -0.2, 0.48, 1.0), _box(-0.2, -1.0, 0.2, 0.0)),
    "flower": _cut(_union(_circle(0, 0, 0.4), *_petals(5, 0.6, 0.38)), _circle(0, 0, 0.24)),
    "house": _cut(
        _union(
            _polygon([(-0.95, -0.1), (0.0, -0.95), (0.95, -0.1)]), _box(-0.68, -0.1, 0.68, 0.85)
        ),
        _box(-0.2, 0.3, 0.2, 0.9),
    ),
    "key": _union(
        _cut(_circle(-0.5, 0.0, 0.48), _circle(-0.5, 0.0, 0.2)),
        _box(-0.1, -0.14, 1.0, 0.14),
        _box(0.4, 0.0, 0.58, 0.5),
        _box(0.8, 0.0, 1.0, 0.5),
    ),
    "triangle": _polygon([(0.0, -0.95), (0.92, 0.7), (-0.92, 0.7)]),
    "cross": _union(_box(-0.3, -0.95, 0.3, 0.95), _box(-0.95, -0.3, 0.95, 0.3)),
    "crescent": _cut(_circle(0.0, 0.0, 0.95), _circle(0.42, 0.0, 0.76)),
    "bell": _union(
        _circle(0.0, -0.3, 0.5),
        _polygon([(-0.5, -0.3), (0.5, -0.3), (0.9, 0.6), (-0.9, 0.6)]),
        _circle(0.0, 0.75, 0.22),
    ),
    "fish": _union(
        _overlap(_circle(-0.25, -0.55, 0.95), _circle(-0.25, 0.55, 0.95)),
        _polygon([(0.3, 0.0), (1.0, -0.6), (1.0, 0.6)]),
    ),
    "hourglass": _polygon(
        [(-0.75, -0.9), (0.75, -0.9), (0.1, 0.0), (0.75, 0.9), (-0.75, 0.9), (-0.1, 0.0)]
    ),
    "leaf": _union(
        _overlap(_circle(-0.4, -0.2, 0.85), _circle(0.4, -0.2, 0.85)), _box(-0.08, 0.4, 0.08, 1.0)
    ),
    "ladder": _union(
        _box(-0.6, -1.0, -0.36, 1.0),
        _box(0.36, -1.0, 0.6, 1.0),
        _box(-0.5, -0.68, 0.5, -0.46),
        _box(-0.5, -0.11, 0.5, 0.11),
        _box(-0.5, 0.46, 0.5, 0.68),
    ),
    "diamond": _polygon([(0.0, -1.0), (0.62, 0.0), (0.0, 1.0), (-0.62, 0.0)]),
    "ring": _cut(_circle(0.0, 0.0, 0.92), _circle(0.0, 0.0, 0.5)),
    "drop": _union(_circle(0.0, 0.35, 0.58), _polygon([(0.0, -1.0), (0.52, 0.1), (-0.52, 0.1)])),
    "bolt": _polygon(
        [
            (0.25, -1.0),
            (-0.6, 0.15),
            (-0.05, 0.15),
            (-0.3, 1.0),
            (0.6, -0.25),
            (0.05, -0.25),
            (0.45, -1.0),
        ]
    ),
    "mushroom": _union(
        _overlap(_circle(0.0, 0.05, 0.95), _box(-1.0, -1.0, 1.0, 0.1)), _box(-0.3, 0.0, 0.3, 0.9)
    ),
    "hammer": _union(_box(-0.8, -0.9, 0.8, -0.3), _box(-0.17, -0.4, 0.17, 1.0)),
    "umbrella": _union(
        _overlap(_circle(0.0, 0.0, 0.98), _box(-1.0, -1.0, 1.0, -0.15)),
        _box(-0.1, -0.2, 0.1, 0.8),
        _box(-0.5, 0.65, 0.1, 0.9),
    ),
    "tree": _union(
        _polygon([(0.0, -1.0), (0.55, -0.25), (-0.55, -0.25)]),
        _polygon([(0.0, -0.6), (0.85, 0.55), (-0.85, 0.55)]),
        _box(-0.16, 0.5, 0.16, 1.0),
    ),
}


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Return the signed distance to a shape at points of its unit disc.

    Args:
        shape: one of :data:`examples.shapes.world.SHAPES`.
        x, y: arrays of coordinates with the same shape; y points downwards.

    Returns:
        Distances in units of the radius of the glyph, negative inside.
    """
    return _GLYPHS[shape](x, y).astype(np.float32)


@cache
def distance_tables() -> Array:
    """Return the distances at cell centres, ``[len(SHAPES), TABLE_SIZE, TABLE_SIZE]``.

    The second axis is y and the third axis is x, both from -EXTENT to EXTENT.
    """
    axis = ((np.arange(TABLE_SIZE, dtype=np.float32) + 0.5) / TABLE_SIZE * 2 - 1) * EXTENT
    y, x = np.meshgrid(axis, axis, indexing="ij")
    tables = np.stack([signed_distance(shape, x, y) for shape in SHAPES])
    tables.setflags(write=False)
    return tables
