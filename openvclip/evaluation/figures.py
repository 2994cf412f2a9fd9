"""Draw trade-off curves between closed-set and zero-shot accuracy, as in Figures 2 and 3."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvclip.models.drawing import new_figure, save_figure


@dataclass(frozen=True)
class Curve:
    """The accuracies of a method along λ.

    Attributes:
        name: the name of the method in the legend.
        lams: L interpolation weights of the original CLIP.
        closed_set: accuracies in [0, 1], ``[seeds, L]``.
        zero_shot: accuracies in [0, 1], ``[seeds, L]``.
        chosen: index into ``lams`` of the reported point, or ``None``.
        highlighted: whether the curve is thick and each point is labelled with its λ.
    """

    name: str
    lams: Sequence[float]
    closed_set: NDArray[np.float64]
    zero_shot: NDArray[np.float64]
    chosen: int | None = None
    highlighted: bool = False


def tradeoff_figure(
    curves: Sequence[Curve],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    closed_set_label: str = "closed-set accuracy (%)",
    zero_shot_label: str = "zero-shot accuracy (%)",
) -> None:
    """Draw zero-shot over closed-set accuracy for each curve and save the figure as a PNG file.

    Points are means over the seeds. Thin bars are standard deviations. Stars are the reported
    points. The numbers beside the points of highlighted curves are λ, the interpolation weight of
    the original CLIP. A curve with a single λ is a single marker.

    Args:
        curves: the curves.
        path: the file to write.
        title: title of the figure.
        closed_set_label: label of the horizontal axis.
        zero_shot_label: label of the vertical axis.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 4.8)
    axes: Any = figure.add_subplot()
    for index, curve in enumerate(curves):
        _draw(axes, curve, f"C{index}")
    axes.set(xlabel=closed_set_label, ylabel=zero_shot_label, title=fill(title, 60))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    _write_lambdas(axes, curves)
    save_figure(figure, path)


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    closed, zero = 100 * curve.closed_set, 100 * curve.zero_shot
    x, y = closed.mean(axis=0), zero.mean(axis=0)
    width = 2.4 if curve.highlighted else 1.0
    order = 4 if curve.highlighted else 3
    if len(closed) > 1:
        spread = {"xerr": closed.std(axis=0, ddof=1), "yerr": zero.std(axis=0, ddof=1)}
        axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=0.6, alpha=0.35, **spread)
    marker = "o-" if len(curve.lams) > 1 else "D"
    line = {"color": colour, "linewidth": width, "markersize": 3 + width, "zorder": order}
    axes.plot(x, y, marker, label=curve.name, **line)
    if curve.chosen is not None:
        at = x[curve.chosen], y[curve.chosen]
        axes.plot(*at, "*", color=colour, markersize=15, zorder=5, markeredgecolor="white")


def _write_lambdas(axes: Any, curves: Sequence[Curve]) -> None:
    """Write λ beside the points of highlighted curves, where most space is left."""
    means = [100 * np.stack([c.closed_set.mean(axis=0), c.zero_shot.mean(axis=0)]) for c in curves]
    axes.autoscale_view()
    to_pixels = axes.transData.transform
    taken = [place for points in means for place in to_pixels(_along(points))]
    radius = 11 * axes.figure.dpi / 72
    angles = np.arange(8) * np.pi / 4
    around = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for index, (curve, points) in enumerate(zip(curves, means, strict=True)):
        for lam, point in zip(curve.lams, points.T, strict=True) if curve.highlighted else ():
            places = to_pixels(point) + around
            gaps = np.linalg.norm(places[:, None] - np.array(taken), axis=2).min(axis=1)
            best = int(gaps.argmax())
            taken.append(places[best])
            axes.annotate(
                f"{lam:g}",
                point,
                xytext=around[best] * 72 / axes.figure.dpi,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8,
                color=f"C{index}",
                zorder=6,
            )


def _along(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return places ``[P, 2]`` along the lines between points ``[2, L]``."""
    steps = np.arange(points.shape[1])
    fine = np.linspace(0, steps[-1], 20 * len(steps))
    return np.stack([np.interp(fine, steps, values) for values in points], axis=1)
