"""The figure of trade-off curves: the file, and what is drawn in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvclip.evaluation import Curve, figures, tradeoff_figure


def _curve(name: str, seeds: int, shift: float) -> Curve:
    lams = (0.0, 0.5, 0.8)
    base = np.array([0.5, 0.4, 0.2]) + shift
    spread = np.linspace(-0.01, 0.01, seeds)[:, None]
    return Curve(name, lams, base + spread, base / 2 + spread, chosen=1, highlighted=name == "two")


def _curves(seeds: int) -> list[Curve]:
    clip = Curve("CLIP", (1.0,), np.full((seeds, 1), 0.2), np.full((seeds, 1), 0.2))
    return [clip, _curve("one", seeds, 0), _curve("two", seeds, 0.05)]


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_is_drawn(tmp_path: Path, seeds: int) -> None:
    path = tmp_path / "new" / "tradeoff.png"
    tradeoff_figure(_curves(seeds), path, title="t")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["tradeoff.png"]

    from matplotlib.image import imread

    colours = np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)
    assert len(colours) > 50  # three curves, stars and text, not an empty frame


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_shows_every_curve(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means in percent over the seeds, stars at the reported points, λ at the highlighted curve."""
    saved: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure))
    curves = _curves(seeds)
    tradeoff_figure(curves, "unused.png", title="t", closed_set_label="x", zero_shot_label="y")
    (axes,) = saved[0].axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("t", "x", "y")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CLIP", "one", "two"]
    points, stars = {}, {}
    for line in axes.get_lines():
        if line.get_marker() == "*":
            stars[line.get_color()] = line.get_xydata()
        elif line.get_marker() in ("o", "D"):
            points[line.get_label()] = line
    for curve in curves:
        line = points[curve.name]
        expected = 100 * np.stack([curve.closed_set.mean(axis=0), curve.zero_shot.mean(axis=0)], 1)
        np.testing.assert_allclose(line.get_xydata(), expected)
        star = stars.get(line.get_color())
        assert (star is None) == (curve.chosen is None)
        if star is not None:
            np.testing.assert_allclose(star, expected[[curve.chosen]])
    assert points["two"].get_linewidth() > points["one"].get_linewidth()
    assert [text.get_text() for text in axes.texts] == ["0", "0.5", "0.8"]
    bars = [bar.get_segments() for bar in axes.collections]
    assert len(bars) == (0 if seeds == 1 else 2 * len(curves))
    if seeds == 3:  # by hand: deviations of -1, 0, 1 percent, n - 1
        widths = [segment[1, 0] - segment[0, 0] for segment in bars[2]]
        np.testing.assert_allclose(widths, 3 * [2.0])


def test_lambdas_do_not_cover_each_other_or_the_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two highlighted curves that are nearly the same: six numbers, each beside its point."""
    saved: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure))
    curves = [_curve("two", 3, 0.0), _curve("two", 3, 0.002)]
    tradeoff_figure(curves, "unused.png")
    (axes,) = saved[0].axes
    points = axes.figure.dpi / 72
    texts = [
        (text, axes.transData.transform(text.xy) + np.array(text.xyann) * points)
        for text in axes.texts
    ]
    assert [text.get_text() for text, _ in texts] == ["0", "0.5", "0.8"] * 2
    assert [text.get_color() for text, _ in texts] == ["C0"] * 3 + ["C1"] * 3
    places = np.array([place for _, place in texts])
    others = np.concatenate([places, *(axes.transData.transform(_means(c)) for c in curves)])
    gaps = np.linalg.norm(places[:, None] - others, axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert gaps.min() > 7 * points


def _means(curve: Curve) -> Any:
    return 100 * np.stack([curve.closed_set.mean(axis=0), curve.zero_shot.mean(axis=0)], axis=1)
