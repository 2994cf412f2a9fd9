"""``sweep_and_plot.py``: the accuracies in the table and in the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import openvclip
from examples import sweep_and_plot
from examples.shapes.model import create_model
from openvclip.evaluation.figures import Curve
from openvclip.video import read_clip, transforms
from tests.examples.single_files import FRAMES, OTHERS, rows_of
from tests.examples.tiny_videos import model_flags


def test_the_table_and_the_picture_have_the_accuracies_at_each_lambda(
    clips: Path,
    tuned: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[Curve] = []
    draw = sweep_and_plot.tradeoff_figure

    def record(curves: list[Curve], *args: Any, **options: Any) -> None:
        drawn.extend(curves)
        draw(curves, *args, **options)

    monkeypatch.setattr(sweep_and_plot, "tradeoff_figure", record)
    picture = tmp_path / "picture.png"
    options = ["--checkpoint", str(tuned[0]), "--videos", str(clips), "--out", str(picture)]
    options += ["--closed-set", str(clips / "closed.csv"), "--zero-shot", str(clips / "zero.csv")]
    options += ["--lam", "0", "0.5", "1", "--views", "1", *model_flags(), *FRAMES]
    sweep_and_plot.main(options)
    table = rows_of(capsys.readouterr().out)
    assert set(table) == {"0", "0.5", "1"}
    with Image.open(picture) as image:
        assert min(image.size) > 300
    (curve,) = drawn
    assert [curve.lams[curve.chosen or 0], curve.name] == [0.5, "tuned1"]
    for place, lam in enumerate((0.0, 0.5, 1.0)):
        row = [100 * curve.closed_set[0, place], 100 * curve.zero_shot[0, place]]
        assert table[f"{lam:g}"] == pytest.approx(row, abs=0.051)
    clip, tokenizer = create_model()
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    openvclip.expand_temporal_attention(clip)
    classifier = openvclip.ZeroShotClassifier(clip, tokenizer, sorted(OTHERS))
    openvclip.interpolate_into(clip, start, openvclip.load_checkpoint(tuned[0]), 0.5)
    right = []
    for label, name in enumerate(sorted(OTHERS)):
        for path in sorted((clips / "zero" / name).iterdir()):
            frames = read_clip(path, num_frames=2, sampling_rate=7)
            with torch.no_grad():
                logits = classifier(transforms.build("released", 32)(frames))
            right.append(int(logits.argmax()) == label)
    assert table["0.5"][1] == pytest.approx(100 * sum(right) / len(right), abs=0.051)


def test_lists_of_numbers_are_refused(clips: Path, tuned: list[Path], tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text("a.mp4,0\n")
    options = ["--checkpoint", str(tuned[0]), "--videos", str(clips), "--zero-shot", "zero.csv"]
    with pytest.raises(SystemExit, match=r"sweep_and_plot\.py: error: .*got class numbers"):
        sweep_and_plot.main(
            [*options, "--closed-set", str(tmp_path / "numbers.csv"), *model_flags(), *FRAMES]
        )
