"""Add, update and remove the videos of an index."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from openvclip.commands.progress import progress_bar
from openvclip.errors import SearchError, VideoError, VideoNotFoundError, did_you_mean, listed
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.building import BuildOptions, Encoded, encode_windows
from openvclip.search.changes import PIECE, FileState, NewVideo, Writer
from openvclip.search.inputs import (
    VideoPaths,
    as_list,
    file_state,
    named_videos,
    require_video,
    whole_name,
)
from openvclip.search.storage import Storage

__all__ = ["Report", "Updating"]

COMMIT_SECONDS = 5.0
"""Seconds after which the videos that are done are committed."""


@dataclass
class Report:
    """What a change of an index did. All lists hold paths.

    Attributes:
        added: videos that are new.
        changed: videos that were encoded again, because their files changed.
        unchanged: videos that the index had.
        removed: videos whose files are gone, or changed and can't be read.
        failed: the reason for each video, folder or pattern that can't be read.
        damaged: the reason for each video of which only a part can be decoded. The part is in the
            index.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = [
            f"{len(getattr(self, name))} {name}"
            for name in ("added", "changed", "unchanged", "removed", "failed", "damaged")
            if getattr(self, name) or name == "added"
        ]
        return ", ".join(counts)


class Updating:
    """Changes the videos of an index.

    Args:
        storage: the index.
        model: returns the model. It is called if there are videos to encode.
        options: how videos are decoded and encoded.
        progress: whether to show a progress bar. ``None``: only in a terminal.
    """

    def __init__(
        self,
        storage: Storage,
        model: Callable[[], VideoCLIP],
        options: BuildOptions,
        progress: bool | None = None,
    ) -> None:
        self._storage, self._model = storage, model
        self._options, self._progress = options, progress

    def add(self, videos: VideoPaths) -> Report:
        """See :meth:`openvclip.search.Index.add`."""
        paths, failed = named_videos(videos)
        report = Report(failed=failed)
        with self._storage.writing() as writer:
            known = writer.known()
            states: dict[str, FileState] = {}
            for path in paths:
                try:
                    require_video(path)
                    states[path] = file_state(path)
                except VideoError as error:
                    report.failed[path] = str(error)
            self._encode(writer, known, states, report)
            writer.compact(last=True)
        return report

    def update(self) -> Report:
        """See :meth:`openvclip.search.Index.update`."""
        report = Report()
        with self._storage.writing() as writer:
            known = writer.known()
            states: dict[str, FileState] = {}
            for path in known:
                try:
                    states[path] = file_state(path)
                except VideoNotFoundError:
                    report.removed.append(path)
                except VideoError as error:
                    report.failed[path] = str(error)
            _require_some_left(self._storage, known, report.removed)
            if report.removed:
                writer.commit(removed=report.removed)
            self._encode(writer, known, states, report)
            writer.compact(last=True)
        return report

    def remove(self, videos: VideoPaths) -> list[str]:
        """See :meth:`openvclip.search.Index.remove`."""
        with self._storage.writing() as writer:
            known = writer.known()
            chosen: dict[str, None] = {}
            for argument in as_list(videos):
                found = _matching(argument, known)
                if not found:
                    raise SearchError(
                        f"{argument}: the index has no such video"
                        f"{did_you_mean(whole_name(argument), known)}; expected a video of the "
                        "index, a folder or a pattern. Nothing was removed."
                    )
                chosen.update(dict.fromkeys(found))
            writer.commit(removed=chosen)
            writer.compact(last=True)
        return list(chosen)

    def _encode(
        self,
        writer: Writer,
        known: Mapping[str, FileState],
        states: Mapping[str, FileState],
        report: Report,
    ) -> None:
        """Encode the videos that are new or whose state changed, and commit them."""
        todo = [path for path, state in states.items() if known.get(path) != state]
        report.unchanged += [path for path, state in states.items() if known.get(path) == state]
        if not todo:
            return
        places = {path: place for place, path in enumerate(todo)}
        run = _Run(writer, known, report, places)
        videos = [NewVideo(path, states[path]) for path in todo]
        events = encode_windows(self._model(), todo, self._storage.settings.windows, self._options)
        disable = None if self._progress is None else not self._progress
        bar = progress_bar(total=len(todo), desc="index", unit="video", disable=disable)
        with closing(events), bar:
            try:
                for event in events:
                    video = videos[event.place]
                    if isinstance(event, Encoded):
                        run.extend(video, event)
                        continue
                    if event.damage is not None:
                        report.damaged[video.path] = (
                            f"{video.path}: only a part of the video can be decoded: "
                            f"{event.damage}. The part is in the index."
                        )
                    run.end(video, event.error)
                    bar.set_postfix(windows=run.windows, refresh=False)
                    bar.update()
            finally:  # Ctrl-C keeps the videos that are done
                run.commit()
        # The order in which threads end says nothing to the reader.
        for reasons in (report.failed, report.damaged):
            ordered = sorted(reasons.items(), key=lambda item: places.get(item[0], -1))
            reasons.clear()
            reasons.update(ordered)


class _Run:
    """Collects the videos that are encoded, and commits those that are done."""

    def __init__(
        self, writer: Writer, known: Mapping[str, Any], report: Report, places: Mapping[str, int]
    ) -> None:
        self._writer, self._known, self._report = writer, known, report
        self._places = places
        self._done: list[NewVideo] = []
        self._broken: list[str] = []  # videos of the index that can't be read any more
        self._waiting = 0  # windows of videos that are done
        self._last = time.monotonic()
        self.windows = 0

    def extend(self, video: NewVideo, encoded: Encoded) -> None:
        """Add windows to a video."""
        self.windows += len(encoded.times)
        video.times.append(encoded.times)
        video.vectors.append(encoded.vectors)
        if video.waiting >= PIECE:
            video.pieces.append(self._writer.write_piece(video.vectors))
            video.vectors.clear()

    def end(self, video: NewVideo, error: str | None) -> None:
        """Note that a video is done, or can't be read, and commit if it is time."""
        if error is not None:
            self._report.failed[video.path] = error
            self._writer.discard(video.pieces)
            if video.path in self._known:
                self._broken.append(video.path)
        else:
            self._done.append(video)
            self._waiting += video.waiting
        if self._waiting >= PIECE or time.monotonic() - self._last >= COMMIT_SECONDS:
            self.commit()
            self._writer.compact()

    def commit(self) -> None:
        """Commit the videos that are done."""
        done = sorted(self._done, key=lambda video: self._places[video.path])
        broken = self._broken
        self._done, self._broken, self._waiting = [], [], 0
        if done or broken:
            self._writer.commit(done, broken)
        for video in done:
            changed = video.path in self._known
            (self._report.changed if changed else self._report.added).append(video.path)
        self._report.removed += broken
        self._last = time.monotonic()


def _require_some_left(storage: Storage, known: Mapping[str, Any], removed: list[str]) -> None:
    """Raise SearchError if all of several files are gone: perhaps a disk is not connected."""
    if 1 < len(known) == len(removed):
        raise SearchError(
            f"{storage.folder}: none of the {len(known)} videos of the index is where it was: "
            f"{listed(removed)}. Nothing was changed. Connect the disk of the videos; or remove "
            "the videos: openvclip index INDEX --remove FOLDER, or Index.remove."
        )


def _matching(argument: str, known: Iterable[str]) -> list[str]:
    """Return the videos that an argument names: a video, a folder or a pattern."""
    if not argument:  # an empty variable of a shell, and not the present folder
        return []
    name = whole_name(argument)
    if name in known:
        return [name]
    folder = name.rstrip(os.sep) + os.sep
    inside = [path for path in known if path.startswith(folder)]
    return inside or [
        path for path in known if any(fnmatch.fnmatchcase(path, p) for p in (name, argument))
    ]
