"""``examples/lists.py``: the lists of videos of a setting."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from examples import lists
from openvclip.video import VideoDataset
from tests.helpers import DATA, FACTS, needs_lists


@pytest.fixture(scope="module")
def facts() -> Any:
    return json.loads((FACTS / "facts.json").read_text())


def _rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


@needs_lists
def test_lists_of_base_to_novel_hold_the_published_numbers(tmp_path: Path, facts: Any) -> None:
    published = facts["vifi_clip"]["base_to_novel"]["videos"]
    for data_set, counts in published.items():
        out, messages = tmp_path / data_set, list[str]()
        where = ["--annotations", str(DATA), "--out", str(out)]
        lists.main(["base-to-novel", data_set, *where, "--seed", "2"], messages.append)
        rows = {path.stem: _rows(path) for path in out.iterdir()}
        assert len(rows["train"]) == counts["train_16_shot"]
        assert len(rows["base"]) == counts["base_test"]
        assert len(rows["novel"]) == counts["novel_test"]
        classes = {
            name: {label for _, label in rows_of_list} for name, rows_of_list in rows.items()
        }
        assert classes["train"] == classes["base"]
        assert not classes["base"] & classes["novel"]
        assert f"{out / 'train'}.csv: {len(rows['train'])} videos of" in messages[0]
        lists.main(["base-to-novel", data_set, *where, "--shots", "all"], messages.append)
        assert len(_rows(out / "train.csv")) == counts["base_train"]


@needs_lists
def test_lists_of_few_shots_are_read_as_they_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--annotations", str(DATA), "--out", str(tmp_path)]
    lists.main(["few-shot", "hmdb51", *where, "--shots", "2"])
    dataset = VideoDataset(tmp_path / "train.csv", transform=None)
    assert len(dataset) == 2 * 51
    assert dataset.class_names is not None
    assert all(
        path.split("/")[0].replace("_", " ") == dataset.class_names[label]
        for path, label in dataset.samples
    )
    with pytest.raises(SystemExit):
        lists.main(["few-shot", "hmdb51", *where, "--shots", "71"])
    assert "has only 70 training videos" in capsys.readouterr().err
    lists.main(["protocol", "hmdb51-ep3", *where])
    assert [len(_rows(tmp_path / f"hmdb51-ep3-{i}.csv")) for i in (1, 2, 3)] == [1530] * 3
