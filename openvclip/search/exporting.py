"""Write the vectors of an index to NumPy or Parquet files, for other programs."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import MissingDependencyError, SearchError

if TYPE_CHECKING:
    from openvclip.search.index import Index
    from openvclip.search.snapshots import Snapshot

__all__ = ["EXPORT_SUFFIXES", "export_vectors"]

_ROWS = 8192  # rows that are in memory at a time

Dtype = Literal["float16", "float32"]


def export_vectors(
    index: Index, path: str | os.PathLike[str], *, dtype: Dtype | None = None
) -> int:
    """Write the vectors and the times of all windows to a file. The extension is the format.

    ``.npz``
        The arrays ``vectors`` ``[n, D]``, ``path``, ``start`` and ``end`` ``[n]``.
    ``.npy``
        The vectors ``[n, D]``. The file with the same name and the extension ``.csv`` has the
        columns ``path``, ``start`` and ``end``.
    ``.parquet``
        The columns ``path``, ``start``, ``end`` and ``vector``, lists of D numbers. It needs
        pyarrow.

    In CSV and Parquet, the bytes of a path that are no UTF-8 are written as ``\\udcff``, with the
    byte in the last two digits. The rows are sorted by path and time. Memory holds a few thousand
    vectors at a time.

    Args:
        index: the index.
        path: the file. An existing file is replaced. Missing folders are created.
        dtype: ``"float16"``, in which the index stores the vectors, or ``"float32"``. Default:
            float16 for NumPy, and float32 for Parquet, because many databases have no float16.

    Returns:
        The number of windows.

    Raises:
        SearchError: the extension or ``dtype`` is not known, or the file can't be written.
        MissingDependencyError: pyarrow is not installed.
    """
    target = Path(path)
    write = _FORMATS.get(target.suffix.lower())
    if write is None:
        raise SearchError(
            f"{target}: the extension {target.suffix!r} is no format of vectors; expected "
            f"{', '.join(EXPORT_SUFFIXES)}."
        )
    if dtype is not None and dtype not in get_args(Dtype):
        raise SearchError(f"dtype={dtype!r}: expected 'float16' or 'float32'.")
    content = _Content(index.snapshot(), dtype)
    try:
        write(content, target)
    except OSError as error:
        raise SearchError(
            f"{target}: can't be written ({error}). Check the free space and the permissions."
        ) from error
    return len(content.rows)


class _Content:
    """The windows of an index, sorted by path and time."""

    def __init__(self, snapshot: Snapshot, dtype: Dtype | None) -> None:
        self._blocks = snapshot.blocks
        self._dtype = dtype
        places = np.argsort(np.array(snapshot.paths, dtype=object), kind="stable")
        rank = np.empty(len(places), dtype=np.int64)
        rank[places] = np.arange(len(places))
        live = np.flatnonzero(snapshot.video >= 0)
        video = snapshot.video[live]
        self.rows = live[np.lexsort((snapshot.end[live], snapshot.start[live], rank[video]))]
        self.paths = snapshot.paths
        self.video = snapshot.video[self.rows]
        self.start, self.end = snapshot.start[self.rows], snapshot.end[self.rows]
        self.width = snapshot.blocks[0].vectors.shape[1] if snapshot.blocks else 0

    def dtype(self, default: Dtype) -> np.dtype[Any]:
        """Return the dtype that was asked for, or that of the format."""
        return np.dtype(self._dtype or default)

    def batches(self, dtype: np.dtype[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield which rows they are, and vectors ``[n, D]``."""
        for begin in range(0, len(self.rows), _ROWS):
            part = slice(begin, begin + _ROWS)
            rows = self.rows[part]
            vectors = np.empty((len(rows), self.width), dtype=dtype)
            for block in self._blocks:
                inside = (rows >= block.first_row) & (rows < block.first_row + len(block.vectors))
                vectors[inside] = block.vectors[rows[inside] - block.first_row]
            yield part, vectors

    def path_list(self, part: slice = slice(None)) -> list[str]:
        """Return the path of each row."""
        return [self.paths[video] for video in self.video[part].tolist()]


def _write_array(file: Any, content: _Content) -> None:
    """Write the vectors as NumPy's file format ``.npy``."""
    dtype = content.dtype("float16")
    shape = (len(content.rows), content.width)
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for _, vectors in content.batches(dtype):
        file.write(vectors.tobytes())


def _write_npy(content: _Content, target: Path) -> None:
    table = target.with_suffix(".csv")
    with (
        atomic_path(table) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "start", "end"))
        times = content.start.tolist(), content.end.tolist()
        writer.writerows(zip(content.path_list(), *times, strict=True))
    with atomic_path(target) as temporary, open(temporary, "wb") as array:
        _write_array(array, content)


def _write_npz(content: _Content, target: Path) -> None:
    arrays = {
        "path": np.array(content.path_list(), dtype=np.str_),
        "start": content.start,
        "end": content.end,
    }
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as file:
            _write_array(file, content)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_parquet(content: _Content, target: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            'pyarrow is not installed, but it is needed to write Parquet: pip install "openvclip'
            '[parquet]". The formats .npy and .npz need nothing more.'
        ) from error
    dtype = content.dtype("float32")
    number = pa.from_numpy_dtype(dtype)
    vector = pa.list_(number, content.width)
    schema = pa.schema(
        [("path", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("vector", vector)]
    )
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part, vectors in content.batches(dtype):
            flat = pa.array(vectors.reshape(-1), number)
            paths = [path.encode("utf-8", "backslashreplace") for path in content.path_list(part)]
            columns = [
                pa.array(paths, pa.string()),
                pa.array(content.start[part]),
                pa.array(content.end[part]),
                pa.FixedSizeListArray.from_arrays(flat, content.width),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


_FORMATS: dict[str, Callable[[_Content, Path], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
EXPORT_SUFFIXES = tuple(_FORMATS)
"""The extensions of the files that :func:`export_vectors` writes."""
