"""The folder of an index: its table, its shards and the contract of its model."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from openvclip.checkpoints.atomic import atomic_path
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_FILE
from openvclip.errors import OpenVCLIPError, SearchError, near_path
from openvclip.models.video_clip import VideoCLIP
from openvclip.search import table
from openvclip.search.changes import Writer
from openvclip.search.locking import LOCK_FILE, writer_lock
from openvclip.search.recorded import ModelSource
from openvclip.search.snapshots import Snapshot, damaged, read_snapshot
from openvclip.search.windows import WindowOptions, WindowSettings
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state

__all__ = ["IndexSettings", "Storage", "is_index", "require_free"]

VERSION = 1
"""The newest version of the table that this version of openvclip reads and writes."""

_FORMAT = "openvclip-index"
_OWN_FILES = {table.TABLE_FILE, f"{table.TABLE_FILE}-journal", LOCK_FILE, CONTRACT_FILE}
_TRIES = 10  # another process can remove shards while they are opened


@dataclass(frozen=True)
class IndexSettings:
    """What an index was made with.

    Attributes:
        contract: the contract of the model.
        weights_hash: :func:`openvclip.weights.weights_hash` of the weights of the model.
        windows: the windows of the videos.
        source: where the model is; ``None`` if that is not known.
    """

    contract: Contract
    weights_hash: str
    windows: WindowSettings
    source: ModelSource | None = None

    @classmethod
    def of(
        cls, model: VideoCLIP, windows: WindowOptions | None, source: ModelSource | None
    ) -> IndexSettings:
        """Return the settings of a new index.

        Args:
            model: the model.
            windows: the windows. Default: those of the contract of the model.
            source: where the model is. Default: where the model was loaded from.

        Raises:
            SearchError: the step is larger than the length of a window.
        """
        contract = model.contract
        return cls(
            contract,
            weights_hash(named_state(model.model)),
            (windows or WindowOptions()).settings(contract),
            source or ModelSource.of(model),
        )


class Storage:
    """The folder of an index.

    Args:
        folder: the folder, which :meth:`create` made.
        in_memory: whether :meth:`snapshot` reads all vectors into memory. Otherwise they are read
            from the disk when they are used, and the system keeps them in its cache.

    Attributes:
        folder: as the argument.
        settings: what the index was made with.

    Raises:
        SearchError: there is no index in the folder, or it can't be read, or a newer version of
            openvclip made it.
    """

    def __init__(self, folder: str | os.PathLike[str], *, in_memory: bool = False) -> None:
        self.folder = Path(folder)
        self._in_memory = in_memory
        self.settings = _settings_of(self.folder)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], settings: IndexSettings) -> Storage:
        """Make an index without videos in a folder.

        Args:
            folder: the folder. Missing folders are created.
            settings: what the index is made with.

        Raises:
            SearchError: the folder holds an index or other files, or is not writable.
        """
        path = Path(folder)
        require_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SearchError(
                f"{path}: the folder can't be made ({error.strerror}). Check the path, the free "
                "space and the permissions."
            ) from error
        with writer_lock(path):
            if is_index(path):
                raise SearchError(f"{path}: another process has made this index. Open the index.")
            try:
                with atomic_path(path / CONTRACT_FILE) as temporary:
                    temporary.write_text(settings.contract.to_json(), encoding="utf-8")
            except OSError as error:
                raise SearchError(
                    f"{path}: the index can't be made ({error.strerror}). Check the free space and "
                    "the permissions."
                ) from error
            with table.writing(path) as connection:
                connection.execute("BEGIN")
                with connection:
                    for statement in table.SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.executemany("INSERT INTO meta VALUES (?, ?)", _meta(settings))
        return cls(path)

    def snapshot(self) -> Snapshot:
        """Return the present content of the index.

        Raises:
            SearchError: the index can't be read.
        """
        missing = ""
        for _ in range(_TRIES):
            try:
                return self._read()
            except FileNotFoundError as error:  # another process removed a shard in between
                missing = os.path.basename(str(error.filename))
        raise SearchError(
            f"{self.folder}: the file {missing} is missing. Copy the index again, or make a new "
            "one."
        )

    def is_current(self, snapshot: Snapshot) -> bool:
        """Return whether no process has changed the index since a snapshot."""
        try:
            return table.change_counter(self.folder) == snapshot.counter
        except OSError:  # the folder is gone: what was read can still be searched
            return True

    def set_source(self, source: ModelSource) -> None:
        """Record where the model is now.

        Raises:
            SearchError: another process changes the index, or it can't be written.
        """
        if source == self.settings.source:
            return
        text = json.dumps(asdict(source))
        with writer_lock(self.folder), table.writing(self.folder) as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                connection.execute("UPDATE meta SET value = ? WHERE key = 'source'", (text,))
        self.settings = replace(self.settings, source=source)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Context manager in which this process alone changes the index.

        Raises:
            SearchError: another process changes the index, or the folder is not writable.
        """
        with writer_lock(self.folder), table.writing(self.folder) as connection:
            yield Writer(self.folder, connection)

    def _read(self) -> Snapshot:
        found = read_snapshot(self.folder)
        if not self._in_memory:
            return found
        blocks = [block._replace(vectors=np.array(block.vectors)) for block in found.blocks]
        return replace(found, blocks=blocks)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an index."""
    file = Path(path) / table.TABLE_FILE
    try:
        if file.stat().st_size == 0:  # a kill left it before the first commit
            return False
        with table.reading(Path(path)) as connection:
            return bool(connection.execute("SELECT 1 FROM sqlite_master").fetchone())
    except OSError:
        return False


def require_free(path: Path) -> None:
    """Check that an index can be made in a folder: it does not exist, or is empty.

    Raises:
        SearchError: the folder holds an index or other files, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise SearchError(f"{path} is a file; expected a folder for the index, such as name.ovx.")
    if not path.is_dir():
        return
    if is_index(path):
        raise SearchError(
            f"{path} holds an index already. Open the index, or choose another folder."
        )
    others = sorted(entry.name for entry in path.iterdir() if not _is_own(entry.name))
    if others:
        raise SearchError(
            f"{path} holds other files ({others[0]}) and no index; expected a new or an empty "
            "folder for the index."
        )


def _is_own(name: str) -> bool:
    return name in _OWN_FILES or (name.startswith(".") and name.endswith(".tmp"))


def _meta(settings: IndexSettings) -> list[tuple[str, str]]:
    source = settings.source
    return [
        ("format", _FORMAT),
        ("version", str(VERSION)),
        ("weights_hash", settings.weights_hash),
        ("contract", settings.contract.to_json()),
        ("windows", json.dumps(asdict(settings.windows))),
        ("source", json.dumps(None if source is None else asdict(source))),
    ]


def _settings_of(folder: Path) -> IndexSettings:
    if not is_index(folder):
        kind = (
            "is not an index" if folder.exists() else f"there is no such index{near_path(folder)}"
        )
        raise SearchError(
            f"{folder}: {kind}; expected a folder that 'openvclip index' or Index.create made."
        )
    with table.reading(folder) as connection:
        try:
            meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
        except sqlite3.OperationalError:
            meta = {}
    if meta.get("format") != _FORMAT:
        raise SearchError(f"{folder / table.TABLE_FILE}: is a table of another program.")
    version = meta.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise SearchError(
            f"{folder}: the index has version {version}; this openvclip reads version {VERSION} "
            "and older. Update openvclip: pip install -U openvclip."
        )
    try:
        source = json.loads(meta["source"])
        return IndexSettings(
            Contract.from_json(meta["contract"], os.fspath(folder / table.TABLE_FILE)),
            meta["weights_hash"],
            WindowSettings(**json.loads(meta["windows"])),
            None if source is None else ModelSource(**source),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OpenVCLIPError):  # of the contract, which says more
            raise
        raise damaged(folder, f"its settings can't be read: {error!r}") from error
