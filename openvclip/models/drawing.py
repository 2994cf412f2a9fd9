"""Create matplotlib figures and save them as PNG files. matplotlib is imported on first use."""

from __future__ import annotations

import os
from typing import Any

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import MissingDependencyError


def require_matplotlib() -> None:
    """Check that matplotlib is installed. Call this before hours of work that end in a figure.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'Figures need matplotlib: pip install "openvclip[examples]".'
        ) from error


def new_figure(width: float, height: float) -> Any:
    """Create an empty ``matplotlib.figure.Figure`` that needs no display.

    Args:
        width: width of the figure, inches.
        height: height of the figure, inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Save a figure as a PNG file with 150 pixels per inch. The file is written atomically.

    Args:
        figure: a ``matplotlib.figure.Figure``.
        path: the file to write. Missing folders are created.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
