"""Tables and figures of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openvclip.evaluation.figures import Curve, markdown_table, mean_and_std, tradeoff_figure


def test_mean_and_standard_deviation_of_a_sample() -> None:
    assert mean_and_std([0.5, 0.6, 0.7]) == "60.0 ± 10.0"  # by hand: deviations -10, 0, 10; n - 1
    assert mean_and_std([0.1234]) == "12.3"
    assert mean_and_std([0.5, 0.5], digits=2) == "50.00 ± 0.00"


def test_table_is_markdown_and_aligned() -> None:
    text = markdown_table(["method", "seen"], [["CLIP", "9.5"], ["Open-VCLIP", "50.0 ± 1.0"]])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace(" ", "") == "|----------|---------:|"
    assert [cell.strip() for cell in lines[3].split("|")] == ["", "Open-VCLIP", "50.0 ± 1.0", ""]


def test_rows_of_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [["only one"]])


def _curve(name: str, seeds: int, shift: float) -> Curve:
    lams = (0.0, 0.5, 0.8)
    base = np.array([0.5, 0.4, 0.2]) + shift
    spread = np.linspace(-0.01, 0.01, seeds)[:, None]
    return Curve(name, lams, base + spread, base / 2 + spread, chosen=1, highlighted=name == "two")


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_is_drawn(tmp_path: Path, seeds: int) -> None:
    clip = Curve("CLIP", (1.0,), np.full((seeds, 1), 0.2), np.full((seeds, 1), 0.2))
    path = tmp_path / "new" / "tradeoff.png"
    tradeoff_figure([clip, _curve("one", seeds, 0), _curve("two", seeds, 0.05)], path, title="t")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["tradeoff.png"]

    from matplotlib.image import imread

    colours = np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0)
    assert len(colours) > 50  # three curves, stars and text, not an empty frame
