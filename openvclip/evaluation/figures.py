"""Tables and figures of results over seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import MissingDependencyError


@dataclass(frozen=True)
class Curve:
    """A method's trade-off between closed-set and zero-shot accuracy.

    Attributes:
        name: what the legend says.
        lams: L weights of the original CLIP.
        closed_set: accuracies in [0, 1], ``[seeds, L]``.
        zero_shot: accuracies in [0, 1], ``[seeds, L]``.
        chosen: index into ``lams`` of the reported point, or None.
        highlighted: draw the curve thick, with its lambdas; the others are thin.
    """

    name: str
    lams: Sequence[float]
    closed_set: NDArray[np.float64]
    zero_shot: NDArray[np.float64]
    chosen: int | None = None
    highlighted: bool = False


def mean_and_std(values: Sequence[float] | NDArray[np.float64], digits: int = 1) -> str:
    """Accuracies in [0, 1] over seeds as text in percent: ``"50.3 ± 1.2"``; one seed: ``"50.3"``.

    The standard deviation is the sample's (divided by n - 1).
    """
    percent = 100 * np.asarray(values, dtype=np.float64)
    mean = f"{percent.mean():.{digits}f}"
    return mean if percent.size == 1 else f"{mean} ± {percent.std(ddof=1):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as plain text; first column to the left."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_row(cells, widths) for cells in (header, rule, *rows))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def require_matplotlib() -> None:
    """Raise :class:`MissingDependencyError` where no figure can be drawn, before hours of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'Figures need matplotlib: pip install "openvclip[examples]".'
        ) from error


def tradeoff_figure(
    curves: Sequence[Curve],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    closed_set_label: str = "closed-set accuracy (%)",
    zero_shot_label: str = "zero-shot accuracy (%)",
) -> None:
    """Draw zero-shot over closed-set accuracy for each curve (as Figures 2 and 3) into a PNG.

    Points are means over seeds with the standard deviation as thin bars; the numbers beside the
    points of highlighted curves are lambda, the weight of the original CLIP; stars are the
    reported points. A curve with a single lambda is a single mark.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for index, curve in enumerate(curves):
        _draw(axes, curve, f"C{index}")
    axes.set(xlabel=closed_set_label, ylabel=zero_shot_label, title=fill(title, 60))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


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
    if curve.highlighted:
        for lam, xi, yi in zip(curve.lams, x, y, strict=True):
            axes.annotate(
                f"{lam:g}", (xi, yi), xytext=(7, -3), textcoords="offset points", fontsize=8
            )
