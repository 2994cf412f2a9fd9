"""Vectors of an index in the files of other programs."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvclip.errors import MissingDependencyError, SearchError
from openvclip.search import Index, export_vectors, exporting
from tests.search.small_index import content, new_index, write_video


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index whose rows are not in the order of the paths, with rows of a removed video."""
    folder = tmp_path_factory.mktemp("export")
    made = new_index(folder / "x.ovx")
    for seed, name in enumerate(("c.mp4", "ü b.mp4", "a.mp4", "d.mp4")):
        made.add(write_video(folder / name, 12 + 6 * seed, seed))
    with made._storage.writing() as writer:  # unlike Index.remove, this keeps the rows
        writer.commit(removed=[str(folder / "d.mp4")])
    assert not made.blocks()[-1].live.any()  # type: ignore[union-attr]
    return made


def rows_of(index: Index) -> list[tuple[Any, ...]]:
    return [
        (path, *window) for path, windows in sorted(content(index).items()) for window in windows
    ]


def read(path: Path) -> list[tuple[Any, ...]]:
    """The rows of an exported file, read by the programs that it is for."""
    if path.suffix == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        columns = pq.read_table(path).to_pydict()
        names = ("path", "start", "end", "vector")
        return [(*row[:3], tuple(row[3])) for row in zip(*(columns[n] for n in names), strict=True)]
    if path.suffix == ".npz":
        arrays = np.load(path)
        times = [arrays[name].tolist() for name in ("path", "start", "end")]
        vectors = arrays["vectors"]
    else:
        with open(path.with_suffix(".csv"), encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        times = [[row["path"] for row in table]]
        times += [[float(row[name]) for row in table] for name in ("start", "end")]
        vectors = np.load(path)
    return [(*row, tuple(vector.tolist())) for *row, vector in zip(*times, vectors, strict=True)]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
@pytest.mark.parametrize("suffix", exporting.EXPORT_SUFFIXES)
def test_a_path_that_is_no_text_is_exported(tmp_path: Path, suffix: str) -> None:
    index = new_index(tmp_path / "x.ovx")
    path = tmp_path / os.fsdecode(b"new\nline \xff.mp4")
    write_video(tmp_path / "a.mp4", 5).rename(path)
    index.add(path)
    assert export_vectors(index, tmp_path / f"vectors{suffix}") == len(index)
    named = str(path) if suffix == ".npz" else str(path).replace("\udcff", "\\udcff")
    assert {row[0] for row in read(tmp_path / f"vectors{suffix}")} == {named}


@pytest.mark.parametrize("suffix", exporting.EXPORT_SUFFIXES)
@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("batch", [3, 8192])
def test_a_file_has_all_windows_by_path_and_time(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    dtype: Any,
    batch: int,
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(exporting, "_ROWS", batch)
    path = tmp_path / "new" / f"vectors{suffix}"
    assert export_vectors(index, path, dtype=dtype) == len(index)
    assert read(path) == rows_of(index)
    written = {"vectors.csv", path.name} if suffix == ".npy" else {path.name}
    assert {entry.name for entry in path.parent.iterdir()} == written
    if suffix == ".npy":
        assert np.load(path).dtype == (dtype or "float16")
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = pa.float16() if dtype == "float16" else pa.float32()
        assert pq.read_schema(path).field("vector").type == pa.list_(number, 8)


@pytest.mark.parametrize("suffix", exporting.EXPORT_SUFFIXES)
def test_an_index_without_videos_gives_an_empty_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    empty = new_index(tmp_path / "e.ovx")
    assert export_vectors(empty, tmp_path / f"v{suffix}") == 0
    assert read(tmp_path / f"v{suffix}") == []


@pytest.mark.parametrize("name", ["v.txt", "v", "v.npy.gz"])
def test_other_formats_are_errors(index: Index, tmp_path: Path, name: str) -> None:
    with pytest.raises(SearchError, match=r"expected \.npy, \.npz, \.parquet"):
        export_vectors(index, tmp_path / name)


def test_what_cannot_be_written_is_an_error(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SearchError, match="dtype='int8'"):
        export_vectors(index, tmp_path / "v.npy", dtype="int8")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match="can't be written"):
        export_vectors(index, tmp_path / "file" / "v.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"openvclip\[parquet\]"):
        export_vectors(index, tmp_path / "v.parquet")
    assert not (tmp_path / "v.parquet").exists()
