"""The folder of an index: kills, locks, full and read-only disks, damage, other versions."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvclip.errors import OpenVCLIPError, SearchError
from openvclip.search import Index, changes, snapshots, storage, table, updating
from openvclip.search.building import Encoded, Ended
from openvclip.search.changes import FileState, NewVideo
from openvclip.search.locking import writer_lock
from openvclip.search.storage import Storage
from openvclip.search.table import TABLE_FILE
from tests.forked import started
from tests.search.small_index import content, new_index
from tests.video.conftest import unprivileged

WIDTH = 8


def vectors_of(path: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times and vectors that depend on the name and the length of a video alone."""
    numbers = np.random.default_rng([count, *path.encode()])
    times = np.arange(count)[:, None] + np.array([0.0, 1.5])
    return times, numbers.standard_normal((count, WIDTH)).astype(np.float16)


def encode_size(model: object, paths: Sequence[str], *_: object) -> Iterator[Encoded | Ended]:
    """In place of ``encode_windows``: a file of n bytes has n windows, encoded two at a time."""
    for place, path in enumerate(paths):
        times, vectors = vectors_of(os.path.basename(path), os.path.getsize(path))
        for begin in range(0, len(times), 2):
            yield Encoded(place, times[begin : begin + 2], vectors[begin : begin + 2])
        yield Ended(place)


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are files of n bytes with n windows. Each video is committed; shards are small."""
    patch_sizes(monkeypatch.setattr)


def patch_sizes(setattr: Any) -> None:
    """See the fixture ``sized``."""
    setattr(updating, "encode_windows", encode_size)
    setattr(updating, "COMMIT_SECONDS", 0.0)
    # A kill of a process loses nothing that was written. Only a power cut does.
    setattr(table, "_SYNCHRONOUS", "OFF")
    setattr(os, "fsync", lambda _: None)
    for module in (changes, updating):
        setattr(module, "PIECE", 5)
    setattr(changes, "_SMALL", 12)
    setattr(changes, "_LARGEST", 40)
    setattr(changes, "_MANY", 3)
    setattr(changes, "_FEW", 3)


def expected(files: dict[Path, int]) -> dict[str, list[tuple[float, float, tuple[float, ...]]]]:
    rows = {}
    for path, count in files.items():
        times, vectors = vectors_of(path.name, count)
        rows[str(path)] = [
            (*time, tuple(vector))
            for time, vector in zip(times.tolist(), vectors.tolist(), strict=True)
        ]
    return rows


def write(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))


# --- any order of changes ----------------------------------------------------------------------

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "update", "save"]), st.integers(0, 4), st.integers(1, 23)
    ),
    min_size=3,
    max_size=10,
)


@given(steps=CHANGES)
@settings(max_examples=15)
def test_an_index_equals_its_files_after_any_changes(steps: list[tuple[str, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch_sizes(patch.setattr)
        root = Path(folder)
        index, held = new_index(root / "x.ovx"), dict[Path, int]()
        other = Index.open(root / "x.ovx")
        for number, (change, name, size) in enumerate(steps):
            path = root / f"{name}.mp4"
            if change == "add":
                write(path, size)
                os.utime(path, ns=(number, number))
                index.add(path)
                held[path] = size
            elif change == "update":
                write(path, size)
                os.utime(path, ns=(number, number))
                for lost in list(held)[2:3]:
                    lost.unlink()
                    del held[lost]
                index.update()
                held |= {path: size} if path in held else {}
            elif change == "remove" and path in held:
                index.remove(path)
                del held[path]
            elif change == "save":
                index.save()
            assert content(index) == expected(held)
            assert content(other) == expected(held)
            shards = {path.name for path in index.path.glob("vectors-*")}
            assert len(shards) == len(index.blocks())
            assert len(index) == sum(held.values())


def test_a_folder_is_not_another_folder_whose_name_begins_alike(
    tmp_path: Path, sized: None
) -> None:
    index, paths = new_index(tmp_path / "x.ovx"), [tmp_path / n / "v.mp4" for n in ("a", "ab")]
    for path in paths:
        path.parent.mkdir()
        write(path, 3)
    index.add(paths)
    assert index.remove(tmp_path / "a") == [str(paths[0])]
    assert content(index) == expected({paths[1]: 3})


def test_joined_shards_have_a_largest_size(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MANY", "_FEW"):
        monkeypatch.setattr(changes, name, 100)
    files = {tmp_path / f"{number}.mp4": 11 for number in range(8)}
    for path, size in files.items():
        write(path, size)
    index = new_index(tmp_path / "x.ovx")
    index.add(tmp_path)
    parts = len(index.blocks())
    index.save()
    assert len(index.blocks()) < parts
    rows = [len(block.vectors) for block in index.blocks()]
    assert max(rows) <= changes._LARGEST < sum(rows)
    assert content(index) == expected(files)


def test_a_long_video_that_breaks_off_leaves_no_file(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Iterator[Encoded | Ended]:
        for event in encode_size(*arguments):
            yield Ended(event.place, "broken") if isinstance(event, Ended) else event

    monkeypatch.setattr(updating, "encode_windows", broken)
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 23)
    assert index.add(tmp_path / "a.mp4").failed == {str(tmp_path / "a.mp4"): "broken"}
    assert list(index.path.glob("*vectors*")) == []


def test_many_windows_are_committed_before_the_time_has_passed(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds the windows until a commit."""
    monkeypatch.setattr(updating, "COMMIT_SECONDS", 1e9)
    commit, sizes = changes.Writer.commit, list[int]()

    def noted(self: changes.Writer, added: Sequence[NewVideo] = (), *more: Any) -> None:
        sizes.append(sum(video.waiting for video in added))
        commit(self, added, *more)

    monkeypatch.setattr(changes.Writer, "commit", noted)
    files = {tmp_path / f"{number}.mp4": 2 for number in range(7)}
    for path, size in files.items():
        write(path, size)
    index = new_index(tmp_path / "x.ovx")
    index.add(tmp_path)
    assert sizes == [6, 6, 2]
    assert content(index) == expected(files)


def test_a_reader_whose_files_are_joined_meanwhile_reads_again(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, files = new_index(tmp_path / "x.ovx"), {tmp_path / f"{n}.mp4": 3 for n in range(2)}
    for path, size in files.items():
        write(path, size)
        index.add(path)
    open_shard, times = snapshots.map_shard, iter(range(100))

    def late(*arguments: Any) -> Any:
        if next(times) == 1:  # after the table and a shard were read
            Index.open(index.path).save()
        return open_shard(*arguments)

    monkeypatch.setattr(snapshots, "map_shard", late)
    assert content(Index.open(index.path)) == expected(files)
    assert len(index.blocks()) == 1


# --- kills -------------------------------------------------------------------------------------


class _Killer:
    """Kills this process at the n-th event: a SQL statement, an opened, renamed or removed file."""

    def __init__(self, folder: str, moment: int) -> None:
        self.count, self._folder, self._moment = 0, folder, moment
        sys.addaudithook(self._event)
        connect = table._connect

        def traced(*arguments: Any) -> sqlite3.Connection:
            connection = connect(*arguments)
            connection.set_trace_callback(lambda _: self._next())
            return connection

        table._connect = traced

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        is_change = is_write or event in ("os.rename", "os.remove")
        if is_change and str(arguments[0]).startswith(self._folder):
            self._next()

    def _next(self) -> None:
        self.count += 1
        if self.count == self._moment:
            os.kill(os.getpid(), signal.SIGKILL)


def _change(index: Index, root: Path) -> None:
    index._unchanged_model = lambda: None  # type: ignore[method-assign,return-value]
    index.update()
    index.add(sorted(root.glob("new*")))


def _killed_runs(folder: str) -> None:
    """Change copies of an index; kill each run at another moment."""
    patch_sizes(setattr)
    root = Path(folder)

    def run(copy: Path, moment: int) -> int:
        shutil.copytree(root / "x.ovx", copy)
        pid = os.fork()
        if pid == 0:
            try:
                killer = _Killer(str(copy), moment)
                _change(Index.open(copy), root)
                (root / "count").write_text(str(killer.count))
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run(root / "whole.ovx", 0) == 0
    count = int((root / "count").read_text())
    for moment in np.unique(np.linspace(1, count, MOMENTS).astype(int)).tolist():
        assert run(root / f"{moment}.killed.ovx", moment) == -signal.SIGKILL


MOMENTS = 14


def test_a_kill_at_any_moment_leaves_whole_videos(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [tmp_path / f"old{number}.mp4" for number in range(4)]
    new = [tmp_path / f"new{number}.mp4" for number in range(3)]
    old = dict(zip(names, (3, 17, 1, 4), strict=True))
    for path, size in old.items():
        write(path, size)
    index = new_index(tmp_path / "x.ovx")
    for path in names:
        index.add(path)
    before = expected(old)
    write(names[0], 6)  # changed
    names[2].unlink()  # gone
    for number, path in enumerate(new):
        write(path, 2 + 7 * number)
    after = {**old, names[0]: 6} | {path: path.stat().st_size for path in new}
    del after[names[2]]
    whole = expected(after)
    with started(_killed_runs, str(tmp_path), log=tmp_path / "log") as process:
        process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    copies = sorted(tmp_path.glob("*.killed.ovx"))
    assert len(copies) == MOMENTS
    contents, decoded = set(), list[str]()
    monkeypatch.setattr(
        updating,
        "encode_windows",
        lambda _, paths, *more: (decoded.extend(paths), encode_size(_, paths))[1],
    )
    for number, copy in enumerate(copies):
        index = Index.open(copy)
        found = content(index)
        for path, windows in found.items():
            assert windows in (before.get(path), whole.get(path)), (copy, path)
        contents.add(tuple(sorted((path, len(windows)) for path, windows in found.items())))
        if number % 3 == 0:
            done = {path for path in found if found[path] == whole.get(path)}
            decoded.clear()
            _change(index, tmp_path)
            assert content(index) == whole
            assert not done & set(decoded), "a video that was done is encoded again"
            names = {path.name for path in copy.iterdir()}
            assert len([name for name in names if "vectors" in name]) == len(index.blocks())
            assert not [name for name in names if name.endswith((".tmp", "-journal"))]
    assert len(contents) >= 5  # before, after each commit, at the end


def test_a_kill_while_an_index_is_made_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x.ovx").mkdir()
    (tmp_path / "x.ovx" / TABLE_FILE).touch()
    (tmp_path / "x.ovx" / ".openvclip.json.7.tmp").touch()
    with pytest.raises(SearchError, match=r"x\.ovx: is not an index; expected a folder that"):
        Index.open(tmp_path / "x.ovx")
    assert len(new_index(tmp_path / "x.ovx")) == 0


# --- two processes -----------------------------------------------------------------------------


def _hold(folder: str) -> None:
    with writer_lock(Path(folder)):
        (Path(folder).parent / "locked").touch()
        signal.pause()


def test_a_second_writer_gets_an_error_at_once(tmp_path: Path, sized: None) -> None:
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    with started(_hold, str(index.path), log=tmp_path / "log") as process:
        while not (tmp_path / "locked").exists():
            assert process.is_alive(), (tmp_path / "log").read_text()
        match = rf"another process \({process.pid}\) is changing this index. Wait until"
        for change in (lambda: index.add(tmp_path / "a.mp4"), index.update, index.save):
            with pytest.raises(SearchError, match=match):
                change()
        assert len(index) == 0  # readers do not wait
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        index.add(tmp_path / "a.mp4")
    assert len(index) == 3


def test_two_objects_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    index = new_index(tmp_path / "x.ovx")
    with index._storage.writing(), pytest.raises(SearchError, match="is changing this index"):
        Index.open(index.path).save()


# --- disks -------------------------------------------------------------------------------------


def test_a_read_only_index_is_searched_and_not_changed(sized: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        index = new_index(folder / "x.ovx")
        write(folder / "a.mp4", 3)
        index.add(folder / "a.mp4")
        os.chmod(index.path, 0o555)
        for file in index.path.iterdir():
            os.chmod(file, 0o444)
        try:
            with unprivileged():
                other = Index.open(index.path)
                assert content(other) == expected({folder / "a.mp4": 3})
                for change in (other.update, other.save, lambda: other.remove(folder / "a.mp4")):
                    with pytest.raises(SearchError, match=r"can't be changed \(Permission denied"):
                        change()
                with pytest.raises(SearchError, match=r"can't be made \(Permission denied\)"):
                    new_index(folder / "y.ovx")
        finally:
            os.chmod(index.path, 0o755)


def test_a_disk_without_locks_is_read(
    tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    index.add(tmp_path / "a.mp4")
    connect = table._connect

    def refuse(folder: Path, mode: str, more: str = "") -> sqlite3.Connection:
        if "immutable" not in more:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(folder, mode, more)

    monkeypatch.setattr(table, "_connect", refuse)
    assert content(Index.open(index.path)) == expected({tmp_path / "a.mp4": 3})
    (index.path / f"{TABLE_FILE}-journal").write_bytes(b"half a commit")
    with pytest.raises(SearchError, match="A process was killed while it changed the index"):
        Index.open(index.path)


def test_the_order_does_not_depend_on_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(model: object, paths: Sequence[str], *_: object) -> Iterator[Encoded | Ended]:
        for place in reversed(range(len(paths))):
            if "bad" in paths[place]:
                yield Ended(place, "broken")
                continue
            yield Encoded(place, *vectors_of(os.path.basename(paths[place]), 3))
            yield Ended(place, damage="cut off" if "part" in paths[place] else None)

    monkeypatch.setattr(updating, "encode_windows", backwards)
    monkeypatch.setattr(updating, "COMMIT_SECONDS", 1e6)
    names = [f"{number} {kind}.mp4" for number in range(3) for kind in ("good", "bad", "part")]
    for name in names:
        write(tmp_path / name, 3)
    index = new_index(tmp_path / "x.ovx")
    report = index.add([tmp_path / name for name in names])
    paths = [str(tmp_path / name) for name in names]
    assert index.videos == report.added == [path for path in paths if "bad" not in path]
    assert list(report.failed) == [path for path in paths if "bad" in path]
    assert list(report.damaged) == [path for path in paths if "part" in path]
    found = content(index)
    for name, path in zip(names, paths, strict=True):
        if "bad" not in name:
            vectors = vectors_of(name, 3)[1]
            assert [row[2] for row in found[path]] == [tuple(row) for row in vectors.tolist()]


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    index = new_index(tmp_path / "x.ovx")
    shutil.rmtree(index.path)
    with pytest.raises(SearchError, match="the folder of the index is gone"):
        index.save()


@pytest.mark.parametrize("room", [0, 300, 20_000])
def test_a_full_disk_leaves_the_old_index(tmp_path: Path, sized: None, room: int) -> None:
    resource = pytest.importorskip("resource")
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    index.add(tmp_path / "a.mp4")
    before = content(index)
    # Each of the files has less room than the new vectors or the new rows of the table need.
    write(tmp_path / "b.mp4", 1200 if room > 1000 else 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(SearchError, match=r"can't be (written|changed)"):
            index.add(tmp_path / "b.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(index) == before
    assert content(Index.open(index.path)) == before
    index.add(tmp_path / "b.mp4")
    assert len(index.videos) == 2
    assert len(list(index.path.glob("*vectors*"))) == len(index.blocks())


# --- what is no index --------------------------------------------------------------------------


def test_an_index_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    index = new_index(tmp_path / "x.ovx")
    with table.writing(index.path) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'version'")
    with pytest.raises(SearchError, match=r"has version 2; this openvclip reads version 1 and old"):
        Index.open(index.path)


def test_what_is_no_index_is_named(tmp_path: Path) -> None:
    new_index(tmp_path / "library.ovx")
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.jpg").touch()
    with pytest.raises(SearchError, match=r"no such index \(did you mean .*library\.ovx"):
        Index.open(tmp_path / "librery.ovx")
    for name in ("file", "other"):
        with pytest.raises(SearchError, match="is not an index"):
            Index.open(tmp_path / name)
    for name, text in (
        ("file", "is a file; expected a folder"),
        ("other", r"holds other files \(photo\.jpg\) and no index"),
        ("library.ovx", "holds an index already"),
    ):
        with pytest.raises(SearchError, match=text):
            new_index(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard, _: shard.write_bytes(shard.read_bytes()[:-1]), r"000001.* is damaged"),
        (lambda shard, _: shard.write_bytes(b""), r"000001\.safetensors: is damaged"),
        (lambda shard, _: shard.write_bytes(b"\xff" * 100), r"000001\.safetensors: is damaged"),
        (lambda shard, _: shard.unlink(), r"vectors-000001\.safetensors is missing"),
        (lambda _, file: file.write_bytes(b"x" * 5000), r"table\.sqlite: is damaged"),
        (lambda _, file: file.write_bytes(file.read_bytes()[:5000]), "is damaged"),
        (lambda _, file: file.unlink(), "is not an index"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, sized: None, damage: Any, message: str) -> None:
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    index.add(tmp_path / "a.mp4")
    damage(index.path / "vectors-000001.safetensors", index.path / TABLE_FILE)
    with pytest.raises(SearchError, match=message):
        Index.open(index.path).videos  # noqa: B018


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (f"DELETE FROM meta WHERE key = '{key}'", f"settings can't be read: .*'{key}'")
            for key in ("source", "windows", "contract", "weights_hash")
        ),
        ("UPDATE meta SET value = '{' WHERE key = 'source'", "settings can't be read"),
        ("UPDATE meta SET value = '{' WHERE key = 'contract'", "is not JSON"),
        ("UPDATE meta SET value = 'null' WHERE key = 'windows'", "settings can't be read"),
        ("UPDATE meta SET value = '{\"x\": 1}' WHERE key = 'windows'", "settings can't be read"),
        ("UPDATE meta SET value = '{\"x\": 1}' WHERE key = 'source'", "settings can't be read"),
        ("UPDATE windows SET start = 'abc'", "a window is no row of numbers"),
        ("UPDATE windows SET video = 777", "windows belong to no video"),
        ("DELETE FROM videos", "windows belong to no video"),
        ("DELETE FROM shards", "windows belong to no file of vectors"),
        ("UPDATE windows SET row = row + 100", "windows belong to no file of vectors"),
        ("INSERT INTO shards (first, rows, width) VALUES (1, 2, 8)", "two shards hold the same"),
    ],
)
def test_a_table_that_contradicts_itself_is_named(
    tmp_path: Path, sized: None, damage: str, message: str
) -> None:
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    index.add(tmp_path / "a.mp4")
    with closing(sqlite3.connect(index.path / TABLE_FILE)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(OpenVCLIPError, match=rf"table\.sqlite: .*{message}"):
        Index.open(index.path).videos  # noqa: B018


def test_rows_that_do_not_exist_are_named(tmp_path: Path, sized: None) -> None:
    index = new_index(tmp_path / "x.ovx")
    for name in "ab":
        write(tmp_path / f"{name}.mp4", 6)
        index.add(tmp_path / f"{name}.mp4")
    with index._storage.writing() as writer:
        writer.commit(removed=[str(tmp_path / "a.mp4")])
    block = next(block for block in index.blocks() if block.live is not None)
    dead = block.first_row + int(np.flatnonzero(~block.live)[0])
    for row in (-1, 12, dead):
        with pytest.raises(SearchError, match=f"The index has no row {row}"):
            index.windows([row])


def test_a_table_of_other_tools(tmp_path: Path, sized: None) -> None:
    """The table is plain SQL, for other programs."""
    index = new_index(tmp_path / "x.ovx")
    write(tmp_path / "a.mp4", 3)
    index.add(tmp_path / "a.mp4")
    with sqlite3.connect(index.path / TABLE_FILE) as connection:
        rows = connection.execute(
            "SELECT path, size, start, end FROM windows JOIN videos ON id = video ORDER BY row"
        ).fetchall()
    connection.close()
    assert rows == [(str(tmp_path / "a.mp4"), 3, i, i + 1.5) for i in range(3)]
    assert isinstance(storage.VERSION, int)
    assert isinstance(Storage(index.path).settings, storage.IndexSettings)
    assert NewVideo("a", FileState(1, 1)).waiting == 0


def test_a_look_for_changes_drops_no_lock_of_a_commit(tmp_path: Path) -> None:
    """On POSIX, closing a file drops all locks that the process has on it, those of SQLite too."""
    address = tmp_path / TABLE_FILE
    with closing(sqlite3.connect(address, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE meta (key TEXT)")
        connection.execute("BEGIN EXCLUSIVE")
        table.change_counter(tmp_path)
        code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], 0).execute('BEGIN EXCLUSIVE')"
        command = [sys.executable, "-c", code, str(address)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "database is locked" in other.stderr


def test_the_counter_changes_with_each_commit_and_with_a_new_table(tmp_path: Path) -> None:
    address, counters = tmp_path / TABLE_FILE, []
    for _ in range(2):
        with closing(sqlite3.connect(address, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE meta (key TEXT)")
            counters.append(table.change_counter(tmp_path))
            assert table.change_counter(tmp_path) == counters[-1]
            connection.execute("INSERT INTO meta VALUES ('a')")
            counters.append(table.change_counter(tmp_path))
        address.unlink()
    assert len(set(counters)) == 4
