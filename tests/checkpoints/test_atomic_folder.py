"""A folder that is written anew holds its old files or its new files after a kill at any moment."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from openvclip.checkpoints.atomic import atomic_folder, finish_folder

OLD = {"weights": "old", "config": "old", "outdated": "old"}
NEW = {"weights": "new", "config": "new", "more": "new"}


class Killed(BaseException):
    pass


def write(folder: Path, files: dict[str, str]) -> None:
    with atomic_folder(folder, lambda new: (OLD.keys() | NEW.keys()) - new) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    finish_folder(folder)
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "folder", OLD)
    (tmp_path / "folder" / "notes").write_text("mine")
    return tmp_path / "folder"


def killed_at(step: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Kill the process before the given change of a file system; the list gets all changes."""
    changes: list[str] = []

    def killing(name: str) -> Any:
        function = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            changes.append(name)
            if len(changes) >= step:  # nothing is changed any more, not even by a clean-up
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, killing(name))
    return changes


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for step in range(1, 40):
        with monkeypatch.context() as patch:
            changes = killed_at(step, patch)
            with suppress(Killed):
                write(folder, NEW)
        after = read(folder)
        assert after.pop("notes") == "mine"
        assert after in (OLD, NEW), (step, changes)
        results.append(after == NEW)
        if len(changes) < step:
            break
        write(folder, OLD)
    assert results == sorted(results)  # the old files up to one moment, then the new files
    assert results.index(True) > 1
    assert results.count(True) > len(NEW)


def test_an_error_leaves_the_old_files(folder: Path) -> None:
    def fail() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "weights").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert read(folder) == {**OLD, "notes": "mine"}
    assert not list(folder.glob(".*"))


def test_threads_write_one_after_the_other(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [folder] * 8, [OLD, NEW] * 4))
    after = read(folder)
    assert after.pop("notes") == "mine"
    assert after in (OLD, NEW)
    assert not list(folder.glob(".*"))


def test_another_process_can_complete_its_folder_at_any_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename and each removal of the complete folder meets one of another process."""
    other = folder / ".openvclip-complete"
    renames, removals = os.rename, Path.rmdir

    def complete(of_other: str) -> None:
        other.mkdir(exist_ok=True)
        (other / of_other).write_text("of another process")

    def rename(source: Path, target: Path) -> None:
        if not (folder / "first").exists():
            complete("first")
        renames(source, target)

    def rmdir(path: Path) -> None:
        if path == other and not (folder / "second").exists():
            complete("second")
        removals(path)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    write(folder, NEW)
    finish_folder(folder)
    after = read(folder)
    assert {after.pop(name) for name in ("first", "second")} == {"of another process"}
    assert after == {**NEW, "notes": "mine"}
    assert not list(folder.glob(".*"))


def test_what_a_kill_left_long_ago_is_removed(folder: Path) -> None:
    for name, age in (("long-ago", 200_000), ("now", 0)):
        left = folder / f".openvclip-unfinished-{name}"
        left.mkdir()
        (left / "weights").touch()
        os.utime(left, (time.time() - age,) * 2)
    write(folder, NEW)
    assert [path.name for path in folder.glob(".*")] == [".openvclip-unfinished-now"]


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", NEW)
    assert read(tmp_path / "a" / "b") == NEW
    finish_folder(tmp_path / "nowhere")  # nothing to do
