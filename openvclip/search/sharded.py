"""Index many tar shards with many processes: one part for each shard, then a merge of the parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from openvclip.commands.progress import progress_bar
from openvclip.errors import SearchError, VideoError, listed
from openvclip.models.video_clip import VideoCLIP
from openvclip.processes import Processes, started_processes
from openvclip.search.building import BuildOptions, EncodedVideo, encode_windows, whole_videos
from openvclip.search.changes import FileState, NewVideo
from openvclip.search.parts import (
    Part,
    PartFolder,
    PartHeader,
    PartVideo,
    part_name,
    require_same,
)
from openvclip.search.recorded import ModelSource
from openvclip.search.storage import IndexSettings, Storage, is_index
from openvclip.search.windows import WindowOptions
from openvclip.video.shards import TarVideo, shard_size, shard_videos, shards_of

__all__ = ["MergeReport", "ShardReport", "index_shards", "merge_parts"]


@dataclass(frozen=True)
class ShardReport:
    """What was done with a shard.

    Attributes:
        shard: the path or the URL of the shard.
        videos: number of videos in its part.
        windows: number of windows in its part.
        failed: why a video could not be read, by its address.
        damaged: why only a part of a video could be read, by its address.
        error: why the shard could not be read to its end; ``None`` if it was.
        skipped: whether an earlier run had finished the part.
    """

    shard: str
    videos: int
    windows: int
    failed: dict[str, str]
    damaged: dict[str, str]
    error: str | None = None
    skipped: bool = False

    def __str__(self) -> str:
        text = f"{self.shard}: {self.videos} videos, {self.windows} windows"
        for name in ("failed", "damaged"):
            if getattr(self, name):
                text += f", {len(getattr(self, name))} {name}"
        if self.error is not None:
            text += f"; not read to its end: {self.error}"
        return text + (", finished before" if self.skipped else "")


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        parts: number of parts.
        added: number of videos that are new in the index.
        unchanged: number of videos that the index had.
        repeated: videos that several parts hold; the first part counts.
        failed: why a video could not be read, by its address.
        damaged: why only a part of a video could be read, by its address.
        incomplete: why a shard could not be read to its end, by its address.
        missing: shards without a part.
    """

    parts: int = 0
    added: int = 0
    unchanged: int = 0
    repeated: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def index_shards(
    shards: str | Sequence[str],
    output: str | os.PathLike[str],
    model: VideoCLIP,
    *,
    windows: WindowOptions | None = None,
    source: ModelSource | None = None,
    batch_size: int = 16,
    num_threads: int | None = None,
    processes: Processes | None = None,
    tell: Callable[[ShardReport], None] | None = None,
    progress: bool | None = None,
) -> list[ShardReport]:
    """Encode the windows of the videos in tar shards, and write one part for each shard.

    Each process takes its share of the shards. The processes need nothing from each other, so one
    of them can end early or start again. A part is written when its shard is done. Parts that an
    earlier run finished are skipped, so the same call continues a run that was killed. A shard that
    can't be read to its end has a part with the videos before the break, and the next run reads it
    again. :func:`merge_parts` makes an index of the parts.

    Args:
        shards: paths or URLs of tar files, with ``{0000..0999}`` and wildcards; see
            :func:`openvclip.video.shards.shards_of`.
        output: the folder of the parts: a path, or a URL that fsspec opens.
        model: the model that encodes the videos.
        windows: length and step of the windows. Default: those of the contract of the model.
        source: where the model is; see :meth:`Index.create`.
        batch_size: number of windows to encode at a time.
        num_threads: number of threads that decode videos; see :func:`openvclip.video.read_clips`.
        processes: the rank of this process and the number of processes. Default: those of
            ``torchrun`` or ``srun``.
        tell: function that is called after each shard.
        progress: whether to show a progress bar. Default: only in a terminal.

    Returns:
        What was done with each shard of this process.

    Raises:
        UsageError: see :func:`openvclip.video.shards.shards_of`; or the rank is out of range.
        SearchError: the folder holds parts of another model or of other windows, or can't be read
            or written.
        NonFiniteWeightsError, EvaluationError: the features are not finite.
        MissingDependencyError: fsspec or PyAV is not installed.
    """
    build = BuildOptions(batch_size, num_threads)
    processes = processes or started_processes()
    share = processes.share(shards_of(shards))
    folder = PartFolder(output)
    settings = IndexSettings.of(model, windows, source)
    names = set(folder.names())
    reports = []
    disable = None if progress is None else not progress
    with progress_bar(total=len(share), desc="shards", unit="shard", disable=disable) as bar:
        for shard in share:
            old = folder.header(part_name(shard)) if part_name(shard) in names else None
            if old is not None:
                require_same(
                    settings, old.settings, f"{folder.name}: the part of {shard}", "this run"
                )
            report = _index_shard(shard, folder, _Run(model, settings, build), old)
            reports.append(report)
            if tell is not None:
                tell(report)
            bar.update()
    return reports


@dataclass(frozen=True)
class _Run:
    """What all shards of a run have in common."""

    model: VideoCLIP
    settings: IndexSettings
    build: BuildOptions


def _index_shard(shard: str, folder: PartFolder, run: _Run, old: PartHeader | None) -> ShardReport:
    size = shard_size(shard)
    if old is not None and old.error is None and (size is None or size == old.shard_size):
        return _report(old, skipped=True)
    part = _encoded_shard(shard, size, run)
    is_broken = part.header.error is not None
    if is_broken and old is not None and len(old.videos) > len(part.header.videos):
        # An earlier run read more of the shard.
        return replace(_report(old), error=part.header.error)
    folder.write(part)
    return _report(part.header)


def _report(header: PartHeader, *, skipped: bool = False) -> ShardReport:
    return ShardReport(
        header.shard,
        len(header.videos),
        header.windows,
        header.failed,
        header.damaged,
        header.error,
        skipped,
    )


class _Videos:
    """The videos of a shard. The file of a video is open until it is taken.

    Args:
        shard: the path or the URL of the shard.

    Attributes:
        error: why the shard could not be read to its end.
    """

    def __init__(self, shard: str) -> None:
        self.error: str | None = None
        self._open: dict[int, TarVideo] = {}
        self._iterator = self._files(shard)

    def __iter__(self) -> Iterator[Any]:
        return self._iterator

    def _files(self, shard: str) -> Generator[Any, None, None]:
        try:
            for place, video in enumerate(shard_videos(shard)):
                self._open[place] = video
                yield video.file
        except VideoError as error:
            self.error = str(error)

    def taken(self, place: int) -> TarVideo:
        """Return the video at a place, whose file is closed."""
        video = self._open.pop(place)
        video.file.close()
        return video

    def close(self) -> None:
        """Close the shard and all files."""
        self._iterator.close()
        for place in list(self._open):
            self.taken(place)


def _encoded_shard(shard: str, size: int | None, run: _Run) -> Part:
    """Encode the videos of a shard."""
    found: dict[int, tuple[TarVideo, EncodedVideo]] = {}
    with closing(_Videos(shard)) as videos:
        events = encode_windows(run.model, videos, run.settings.windows, run.build)
        with closing(events):
            for encoded in whole_videos(events):
                found[encoded.place] = videos.taken(encoded.place), encoded
    # Of two videos with one name, the later one replaces the earlier one, as tar does it.
    last = {video.path: (video, encoded) for _, (video, encoded) in sorted(found.items())}
    read = [(video, encoded) for video, encoded in last.values() if encoded.error is None]
    header = PartHeader(
        shard,
        size,
        run.settings,
        [PartVideo(video.path, video.size, len(encoded.times)) for video, encoded in read],
        {path: encoded.error for path, (_, encoded) in last.items() if encoded.error},
        {path: encoded.damage for path, (_, encoded) in last.items() if encoded.damage},
        videos.error,
    )
    vectors = [encoded.vectors for _, encoded in read] or [np.empty((0, 0), np.float16)]
    times = [encoded.times for _, encoded in read] or [np.empty((0, 2))]
    return Part(header, np.concatenate(vectors), np.concatenate(times))


def merge_parts(
    parts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    shards: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> MergeReport:
    """Make an index of the parts that :func:`index_shards` wrote, or add them to an index.

    All parts are checked before the index is changed. If the process is killed, the next call with
    the same parts continues.

    Args:
        parts: a folder of parts, or several folders: paths, or URLs that fsspec opens.
        output: the folder of the index. An index of the same model and windows gets the videos
            that it lacks.
        shards: the shards that should have parts; see :func:`index_shards`. Default: no check.
        progress: whether to show a progress bar. Default: only in a terminal.

    Raises:
        SearchError: there are no parts; parts were made with different models or windows, or the
            index with other ones; or a part can't be read, or the index can't be written.
        UsageError: see :func:`openvclip.video.shards.shards_of`.
    """
    several = [parts] if isinstance(parts, (str, os.PathLike)) else list(parts)
    report = MergeReport()
    checked, settings = _checked([PartFolder(folder) for folder in several], report)
    if shards is not None:
        report.missing = sorted(set(shards_of(shards)) - {part.shard for part in checked})
    if is_index(output):
        storage = Storage(output)
        names = f"{listed([os.fspath(folder) for folder in several])}: the parts"
        require_same(storage.settings, settings, names, f"the index {os.fspath(output)}")
    else:
        storage = Storage.create(output, settings)
    disable = None if progress is None else not progress
    bar = progress_bar(checked, desc="merge", unit="part", disable=disable)
    with storage.writing() as writer:
        known, merged = writer.known(), set[str]()
        for part in bar:
            new = []
            for video, vectors, times in part.folder.read(part.name).split():
                state = FileState(video.size, None)  # what `update` finds at the address
                if video.path in merged:
                    report.repeated.append(video.path)
                elif known.get(video.path) == state:
                    report.unchanged += 1
                else:
                    new.append(NewVideo(video.path, state, vectors=[vectors], times=[times]))
                merged.add(video.path)
            if new:
                writer.commit(new)
                writer.compact()
            report.added += len(new)
            report.parts += 1
        writer.compact(last=True)
    return report


class _Checked(NamedTuple):
    """A part that is complete."""

    folder: PartFolder
    name: str
    shard: str


def _checked(
    folders: Sequence[PartFolder], report: MergeReport
) -> tuple[list[_Checked], IndexSettings]:
    """Return the parts of folders and their common settings; note what they lack."""
    checked: list[_Checked] = []
    first: PartHeader | None = None
    for folder in folders:
        for name in folder.names():
            header = folder.header(name)
            if header is None:
                report.incomplete[f"{folder.name}/{name}"] = "the part was not written to its end"
                continue
            if first is None:
                first = header
            require_same(
                first.settings,
                header.settings,
                f"{folder.name}: the part of {header.shard}",
                f"the part of {first.shard}",
            )
            report.failed |= header.failed
            report.damaged |= header.damaged
            if header.error is not None:
                report.incomplete[header.shard] = header.error
            checked.append(_Checked(folder, name, header.shard))
    if first is None:
        names = listed([folder.name for folder in folders])
        raise SearchError(
            f"{names} holds no part of an index; expected a folder that "
            "'openvclip index --shards' wrote."
        )
    return checked, first.settings
