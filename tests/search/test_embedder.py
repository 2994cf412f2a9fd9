"""VideoEmbedder on batches of dicts: every kind of video, errors in a column, pickling, caching."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openvclip import VideoCLIP
from openvclip.errors import SearchError, UsageError, VideoOptionError
from openvclip.search import VideoEmbedder, WindowOptions, embedder
from tests.search.tiny_shards import save_model, slow_windows, tiny_model, video

pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and three videos of different lengths."""
    folder = tmp_path_factory.mktemp("embedder")
    save_model(folder / "model")
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(video(number, 6 + 5 * number))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoCLIP:
    return VideoCLIP.from_pretrained(folder / "model")


def paths(folder: Path) -> list[str]:
    return [str(folder / f"{number}.mp4") for number in range(3)]


KINDS = {
    "paths": lambda names: {"path": np.array(names)},
    "objects": lambda names: {"path": np.array(names, dtype=object)},
    "lists": lambda names: {"path": list(names)},
    "bytes": lambda names: {"bytes": [Path(n).read_bytes() for n in names], "path": names},
    "dicts": lambda names: {
        "video": [{"bytes": Path(n).read_bytes(), "path": n} for n in names],
    },
    "dicts of paths": lambda names: {"video": [{"bytes": None, "path": n} for n in names]},
    "another column": lambda names: {"path": ["x"] * 3, "file": np.array(names)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_the_model(kind: str, folder: Path, model: VideoCLIP) -> None:
    names = paths(folder)
    batch: dict[str, Any] = {"label": [4, 5, 6], **KINDS[kind](names)}
    column = "file" if "file" in batch else None
    result = VideoEmbedder(folder / "model", column=column)(batch)
    assert set(result) == {"label", "path", "vector", "error"}
    assert result["vector"].dtype == np.float32
    expected = model.encode_video(names, batch_size=8)
    assert torch.equal(torch.from_numpy(result["vector"]), expected)
    assert list(result["path"]) == (["x"] * 3 if column else names)
    assert list(result["error"]) == [""] * 3
    assert result["label"] == [4, 5, 6]


@pytest.mark.parametrize("threads", [0, 3])
def test_windows_are_rows(threads: int, folder: Path, model: VideoCLIP) -> None:
    names = paths(folder)
    batch = {"path": np.array(names), "label": np.array([4, 5, 6]), "note": ["a", "b", "c"]}
    embed = VideoEmbedder(folder / "model", windows=True, batch_size=3, num_threads=threads)
    result = embed(batch)
    expected = [slow_windows(model, name) for name in names]
    assert min(len(times) for times, _ in expected) > 1
    places = np.concatenate([[i] * len(times) for i, (times, _) in enumerate(expected)])
    times = np.concatenate([times for times, _ in expected])
    assert np.array_equal(np.stack([result["start"], result["end"]], axis=1), times)
    assert np.abs(result["vector"] - np.concatenate([v for _, v in expected])).max() < 1e-3
    assert result["path"].tolist() == [names[place] for place in places]
    assert result["label"].tolist() == (4 + places).tolist()
    assert result["note"] == ["abc"[place] for place in places]


def test_windows_of_other_lengths(folder: Path) -> None:
    embed = VideoEmbedder(folder / "model", windows=WindowOptions(seconds=0.5, step=0.25))
    result = embed({"path": paths(folder)[1:2]})
    assert result["start"].tolist() == [0.25 * n for n in range(len(result["path"]))]
    with pytest.raises(SearchError, match="step"):
        VideoEmbedder(folder / "model", windows=WindowOptions(step=9.0))({"path": paths(folder)})


@pytest.mark.parametrize("windows", [False, True])
def test_a_video_that_cannot_be_read_is_a_row_of_nan(windows: bool, folder: Path) -> None:
    good = paths(folder)[0]
    videos = [None, good, str(folder / "broken.mp4"), str(folder / "lost.mp4"), b"", 5.0]
    names = ["none", "good", "broken", "lost", "empty", "number"]
    batch = {"video": np.array([*videos, 0], dtype=object)[:-1], "path": np.array(names)}
    result = VideoEmbedder(folder / "model", windows=windows)(batch)
    errors = dict(zip(result["path"], result["error"], strict=True))
    assert list(errors) == names
    assert [name for name, error in errors.items() if not error] == ["good"]
    assert str(folder / "lost.mp4") in errors["lost"]
    lost = result["path"] != "good"
    assert np.isnan(result["vector"][lost]).all()
    assert np.allclose(np.linalg.norm(result["vector"][~lost], axis=1), 1, atol=1e-3)
    if windows:
        assert np.isnan(result["start"][lost]).all()
        assert lost.sum() == 5


@pytest.mark.parametrize("windows", [False, True])
def test_batches_without_a_readable_video(windows: bool, folder: Path) -> None:
    embed = VideoEmbedder(folder / "model", windows=windows)
    result = embed({"path": ["lost.mp4", "none.mp4"]})
    assert result["vector"].shape == (2, 8)
    assert np.isnan(result["vector"]).all()
    assert embed({"path": np.array([], dtype=object)})["vector"].shape == (0, 8)


@pytest.mark.parametrize("windows", [False, True])
def test_arrays_of_frames(windows: bool, folder: Path, model: VideoCLIP) -> None:
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 255, (2, 20, 16, 16, 3), dtype=np.uint8)  # as Ray gives tensors
    embed = VideoEmbedder(folder / "model", fps=10.0, windows=windows)
    result = embed({"video": frames})
    # datasets gives arrays as lists of lists
    as_lists = embed({"video": frames.tolist()})
    assert np.array_equal(result["vector"], as_lists["vector"])
    if windows:
        assert set(result["path"]) == {"<20 frames>"}
    else:
        expected = model.encode_video(list(frames), fps=10.0)
        assert torch.equal(torch.from_numpy(result["vector"]), expected)
    mixed = embed({"video": [frames[0], frames[0, 0], frames[0].astype(float)]})
    assert [bool(error) for error in mixed["error"]][-1]
    with pytest.raises(VideoOptionError, match="fps"):
        VideoEmbedder(folder / "model", windows=windows)({"video": frames})


# --- processes ---------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The models that are loaded, by source and device."""
    found: list[Any] = []
    load = VideoCLIP.from_pretrained

    def note(source: str, *args: Any, device: str, **options: Any) -> VideoCLIP:
        found.append((source, device))
        return load(source, *args, device="cpu", **options)

    embedder._load.cache_clear()
    monkeypatch.setattr(VideoCLIP, "from_pretrained", note)
    yield found
    embedder._load.cache_clear()


def test_a_process_loads_the_model_once_and_pickles_settings_alone(
    folder: Path, loads: list[Any]
) -> None:
    embed = VideoEmbedder(folder / "model", autocast=torch.bfloat16)
    before = pickle.dumps(embed)
    assert not loads
    for copy in (embed, pickle.loads(before), pickle.loads(pickle.dumps(embed))):
        copy({"path": paths(folder)[:1]})
    assert loads == [(str(folder / "model"), "cpu")]
    assert pickle.dumps(embed) == before  # a cache of results is found again
    assert len(before) < 2000


def test_other_weights_in_the_folder_are_another_embedder(tmp_path: Path) -> None:
    """``datasets`` finds cached results by a hash of the pickle. A process loads them again."""
    batch, pickles = {"bytes": [video(0, 9)]}, []
    for seed in (0.0, 0.5):
        embed = VideoEmbedder(save_model(tmp_path / "model", seed))
        pickles.append(pickle.dumps(embed))
        expected = tiny_model(seed).encode_video(video(0, 9)).numpy()
        assert np.abs(embed(batch)["vector"][0] - expected).max() < 1e-6
    assert pickles[0] != pickles[1]


def test_processes_share_the_gpus(
    folder: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    embed = VideoEmbedder(folder / "model")
    for rank in (None, 0, 3):
        embed({"path": paths(folder)[:1]}, rank)
    assert [device for _, device in loads] == ["cuda", "cuda:0", "cuda:1"]


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_errors_and_not_rows(folder: Path) -> None:
    with pytest.raises(UsageError, match="save_pretrained"):
        VideoEmbedder(tiny_model())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size=0"):
        VideoEmbedder("x", batch_size=0)
    embed = VideoEmbedder(folder / "model")
    with pytest.raises(UsageError, match="numpy"):
        embed([{"path": "a.mp4"}])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="clip, label"):
        embed({"clip": ["a.mp4"], "label": [1]})
    with pytest.raises(UsageError, match="did you mean clip"):
        VideoEmbedder(folder / "model", column="clips")({"clip": ["a.mp4"]})
    assert "one vector a video" in repr(embed)


def test_mappings_of_datasets_are_batches(folder: Path) -> None:
    class Lazy(Mapping[str, Any]):
        """A batch that is no dict."""

        def __init__(self) -> None:
            self.columns = {"path": paths(folder)}

        def __getitem__(self, name: str) -> Any:
            return self.columns[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

        def __len__(self) -> int:
            return 1

    result = VideoEmbedder(folder / "model")(Lazy())
    assert json.dumps(result["path"])
    assert result["vector"].shape == (3, 8)
