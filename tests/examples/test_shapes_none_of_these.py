"""The measurement of "none of these": its clips, and the page that shows its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from examples.shapes import clips, none_of_these
from examples.shapes.experiment import clips_folder
from examples.shapes.model import create_model
from examples.shapes.none_of_these import MODELS, OTHERS, SCORES, SPLITS, Clips, Measures, tables
from examples.shapes.settings import FULL, SMOKE
from examples.shapes.world import ACTIONS, class_names
from openvclip import SWATracker
from openvclip.evaluation import auroc
from tests.forked import CONTEXT
from tests.helpers import REPO

RESULTS = REPO / "docs" / "assets" / "none-of-these.json"


def test_the_page_shows_the_results() -> None:
    page = (REPO / "docs" / "none-of-these.md").read_text(encoding="utf-8")
    measures = json.loads(RESULTS.read_text(encoding="utf-8"))["measures"]
    for name, table in tables(measures).items():
        assert table in page, name
    # What the page says in words.
    mean = {key: sum(values) for key, values in measures.items() if key.startswith(("au", "ece"))}
    for key in [key.removesuffix("cosine") for key in mean if key.startswith("auroc/")]:
        if f"{key}cosine" in mean:
            assert mean[f"{key}energy"] > mean[f"{key}cosine"]
            assert mean[f"{key}cosine"] > mean[f"{key}probability, background"]
            assert mean[f"{key}probability, background"] > mean[f"{key}probability"]
    cells = [key.removesuffix("cosine") for key in mean if key.startswith("aurc/")]
    cells = [key for key in cells if f"{key}cosine" in mean]
    best = [min((mean[key + score], score) for score in SCORES)[1] for key in cells]
    assert (len(best), best.count("probability, background")) == (12, 8)
    assert "probability" not in best
    assert all(
        mean[f"ece/{model}/{split}/after"] < mean[f"ece/{model}/{split}/before"]
        for model in MODELS
        for split in SPLITS
    )


@pytest.mark.parametrize("others", OTHERS)
def test_labels_and_other_clips_differ_in_shapes_or_in_actions(others: str) -> None:
    model, tokenizer = create_model()
    names = class_names("unseen")
    width = int(model.text_projection.shape[1])  # type: ignore[union-attr,index]
    features = torch.nn.functional.normalize(torch.randn(64, width), dim=-1)
    clips = none_of_these._clips(
        model, tokenizer, "unseen", others, features, torch.arange(len(names))
    )
    assert (clips.logits.shape, clips.with_background.shape) == ((64, 32), (64, 32 + 64))
    shape, action = torch.arange(64) // len(ACTIONS), torch.arange(64) % len(ACTIONS)
    part = shape if others == "shapes" else action
    assert not set(part[clips.inside].tolist()) & set(part[~clips.inside].tolist())
    assert clips.targets[clips.inside].tolist() == list(range(32))
    torch.testing.assert_close(clips.logits, model.logit_scale.exp() * clips.cosines)
    torch.testing.assert_close(clips.with_background[:, :32], clips.logits)


def test_scores_and_reliability() -> None:
    cosines = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    logits, targets = 10 * cosines, torch.tensor([0, -1])
    clips = Clips(cosines, logits, torch.cat([logits, torch.ones(2, 1)], dim=1), targets)
    assert clips.scores("cosine").tolist() == pytest.approx([0.9, 0.3])
    torch.testing.assert_close(clips.scores("energy"), logits.exp().sum(dim=1).log())
    torch.testing.assert_close(
        clips.scores("probability, background"),
        clips.with_background.softmax(dim=1)[:, :2].max(dim=1).values,
    )
    assert clips.correct.tolist() == clips.inside.tolist() == [True, False]
    measures: Measures = {}
    none_of_these._add(measures, "a", auroc(clips.scores("cosine"), clips.inside))
    assert measures == {"a": [1.0]}
    bins = none_of_these._reliability(torch.tensor([0.05, 0.25, 0.29, 1.0]), targets.new_ones(4))
    assert bins[0] == [1, 0, 2, 0, 0, 0, 0, 0, 0, 1]
    assert bins[1][2] == pytest.approx(0.54)
    assert bins[0] == bins[2]


@pytest.mark.slow
def test_the_command_measures_a_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers with PyTorch imported; tests of the clips start them from new interpreters.
    monkeypatch.setattr(clips, "get_context", lambda _: CONTEXT)
    arguments = ["--smoke", "--seeds", "1", "--out", str(tmp_path)]
    none_of_these.main(arguments)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "none-of-these.json").read_text(encoding="utf-8"))
    for table in tables(written["measures"]).values():
        assert table in printed
    assert written["measures"].keys() == json.loads(RESULTS.read_text())["measures"].keys()
    assert (tmp_path / "none-of-these.png").stat().st_size > 10_000
    first = (tmp_path / "none-of-these.json").read_text(encoding="utf-8")
    none_of_these.main(arguments)  # from the saved weights
    assert (tmp_path / "none-of-these.json").read_text(encoding="utf-8") == first


def test_weights_of_another_recipe_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    def train(classifier: Any, *_: Any, **__: Any) -> tuple[Any, SWATracker]:
        average = SWATracker(classifier.model)
        average.update(classifier.model)
        runs.append(classifier)
        return classifier, average

    data = TensorDataset(torch.zeros(64, 2, 3, 8, 8), torch.zeros(64, dtype=torch.long))
    monkeypatch.setattr(none_of_these, "train", train)
    monkeypatch.setattr(none_of_these, "load_clips", lambda *_: data)
    recipe = replace(SMOKE.recipe, lr=SMOKE.recipe.lr * 2)
    others = (replace(SMOKE, recipe=recipe), replace(SMOKE, clips=FULL.clips))
    for count, settings in enumerate((SMOKE, *others), start=1):
        for _ in range(2):  # the second call reads the file
            none_of_these._trained(settings, 0, tmp_path, tmp_path)
            assert len(runs) == count


def test_clips_of_other_settings_are_refused(tmp_path: Path) -> None:
    folder = clips_folder(tmp_path, 0)
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds clips made with \{\}"):
        none_of_these.main(["--out", str(tmp_path), "--smoke"])
