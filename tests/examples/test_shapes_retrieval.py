"""The search of clips by captions in the shapes world: the command, and the numbers of the page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.shapes import retrieval
from examples.shapes.retrieval import FULL, MODELS, Clip, all_clips, chosen_lambda, tables
from examples.shapes.world import SPLITS
from openvclip.search import Index
from openvclip.video.captions import read_captions
from tests.helpers import REPO

RESULTS = REPO / "docs" / "assets" / "retrieval-shapes.json"


def test_no_two_clips_of_a_test_have_the_same_caption() -> None:
    clips = all_clips(FULL)
    assert len(clips) == len({clip.caption for clip in clips}) == 3 * 512
    assert Counter(clip.split for clip in clips) == dict.fromkeys(SPLITS, 512)
    assert Clip("seen", "star", "sliding", "red").caption == "a red star sliding"


def test_the_command_trains_searches_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--seeds", "1", "--out", str(tmp_path)]
    retrieval.main(arguments)
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "retrieval.json").read_text(encoding="utf-8"))
    measures = written["measures"]
    for table in tables(measures).values():
        assert table in said
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    folder = tmp_path / "retrieval" / "seed-0"
    captions = read_captions(folder / "train" / "captions.csv")
    assert set(captions) == {f"{number:04d}.mp4" for number in range(8)}
    assert any(len(texts) > 1 for texts in captions.values())
    # The numbers of the search, counted from the vectors of the index itself.
    index = Index.open(folder / "run-0.ovx")
    assert len(index) == retrieval.SMOKE.indexed
    clips = all_clips(retrieval.SMOKE)
    model = next(retrieval._searched_models(folder / "run", 0.5))
    vectors = np.concatenate([np.asarray(block.vectors, np.float32) for block in index.blocks()])
    windows = index.windows(range(len(index)))
    numbers = [int(Path(window.path).stem) for window in windows]
    texts = model.encode_text([clips[number].caption for number in numbers]).numpy()
    right = (texts @ vectors.T).argmax(axis=1) == np.arange(len(numbers))
    assert measures[f"search/{MODELS[0]}/all/R1"] == [pytest.approx(100 * right.mean())]
    first = (tmp_path / "retrieval.json").read_text(encoding="utf-8")
    retrieval.main(arguments)  # from the saved weights and indexes
    assert (tmp_path / "retrieval.json").read_text(encoding="utf-8") == first


def test_the_page_shows_the_results() -> None:
    page = (REPO / "docs" / "fine-tune-retrieval.md").read_text(encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    measures = content["measures"]
    assert content["seeds"] == 3
    for name, table in tables(measures).items():
        assert table in page, name
    # What the page says in words.
    assert chosen_lambda(measures) == 0.5
    for split in ("all", *SPLITS):
        means = [np.mean(measures[f"search/{name}/{split}/R1"]) for name in MODELS]
        assert means == sorted(means), split
    assert sum(measures[f"search/{split}/captions"][0] for split in SPLITS) == 1000
