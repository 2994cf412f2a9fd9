"""``datasets.map`` takes a VideoEmbedder as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvclip import VideoCLIP
from openvclip.search import VideoEmbedder
from tests.search.tiny_shards import save_model, slow_windows, video

pytest.importorskip("av")
datasets = pytest.importorskip("datasets")
fingerprint = pytest.importorskip("datasets.fingerprint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    save_model(folder / "model")
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(video(number, 9 + number))
    (folder / "2.mp4").write_bytes(b"no video")
    return folder


def rows(folder: Path, kind: str) -> Any:
    paths = [str(folder / f"{number}.mp4") for number in range(4)]
    labels = {"label": [5, 6, 7, 8]}
    if kind == "paths":
        return datasets.Dataset.from_dict({"path": paths, **labels})
    features = datasets.Features(
        {"video": datasets.Video(decode=False), "label": datasets.Value("int64")}
    )
    cells = [{"bytes": Path(path).read_bytes(), "path": path} for path in paths]
    return datasets.Dataset.from_dict({"video": cells, **labels}, features=features)


@pytest.mark.parametrize("kind", ["paths", "videos"])
def test_one_vector_a_video(kind: str, folder: Path) -> None:
    embed = VideoEmbedder(folder / "model")
    found = rows(folder, kind).map(embed, batched=True, batch_size=3)
    model = VideoCLIP.from_pretrained(folder / "model")
    assert found["label"][:] == [5, 6, 7, 8]
    assert [bool(error) for error in found["error"]] == [False, False, True, False]
    for place in (0, 1, 3):
        expected = model.encode_video(folder / f"{place}.mp4").numpy()
        assert np.abs(np.array(found["vector"][place]) - expected).max() < 1e-6
    assert np.isnan(found["vector"][2]).all()
    # The library finds its cached result by this hash.
    assert fingerprint.Hasher.hash(embed) == fingerprint.Hasher.hash(
        VideoEmbedder(folder / "model")
    )


@pytest.mark.parametrize("kind", ["paths", "videos"])
def test_windows_change_the_number_of_rows(kind: str, folder: Path) -> None:
    table = rows(folder, kind)
    found = table.map(
        VideoEmbedder(folder / "model", windows=True),
        batched=True,
        batch_size=3,
        remove_columns=table.column_names,
        with_rank=True,
    )
    columns = {name: np.array(found[name][:]) for name in found.column_names}
    model = VideoCLIP.from_pretrained(folder / "model")
    for place in (0, 1, 3):
        times, vectors = slow_windows(model, folder / f"{place}.mp4")
        chosen = columns["path"] == str(folder / f"{place}.mp4")
        assert np.array_equal(columns["start"][chosen], times[:, 0])
        assert np.array_equal(columns["end"][chosen], times[:, 1])
        assert np.abs(columns["vector"][chosen] - vectors).max() < 1e-3
        assert set(columns["label"][chosen]) == {5 + place}
    assert (columns["error"] != "").sum() == 1
