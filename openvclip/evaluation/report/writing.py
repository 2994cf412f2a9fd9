"""Write a page about evaluations: read the results, make the pictures, write the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import write_text
from openvclip.commands.pages import NO_ROOM, DataBudget, require_above_zero
from openvclip.commands.progress import progress_bar
from openvclip.errors import EvaluationError, RecordsError, UsageError, VideoError, listed
from openvclip.evaluation.report.library import vega_script
from openvclip.evaluation.report.numbers import Run, numbers_of, runs_of
from openvclip.evaluation.report.page import page_parts
from openvclip.evaluation.report.reading import Results, read_results, results_folders
from openvclip.evaluation.video_pass import require_videos
from openvclip.video.excerpts import stream_facts
from openvclip.video.posters import poster_at, why_no_poster

__all__ = ["ReportSettings", "ReportSummary", "write_report"]


@dataclass(frozen=True)
class ReportSettings:
    """What a page about evaluations contains.

    Attributes:
        clips: the largest number of wrong clips that are listed for each model, test and λ.
        posters: whether the listed clips have pictures.
        videos: the folder of the videos, for the pictures. Default: the folder that was evaluated.
        megabytes: the greatest size of all pictures together. Clips that do not fit have no
            picture.
        poster_width: the longest side of a picture, in pixels.
        original: a folder with results of the original CLIP, or a folder above such folders. They
            are added to the page, and other models are compared with them. Default: the results
            whose original weights are the same.

    Raises:
        EvaluationError: a number is out of range.
    """

    clips: int = 60
    posters: bool = False
    videos: str | os.PathLike[str] | None = None
    megabytes: float = 8.0
    poster_width: int = 240
    original: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.clips, bool) or not isinstance(self.clips, int) or self.clips < 0:
            raise EvaluationError(f"clips={self.clips!r}: expected a whole number of at least 0.")
        require_above_zero(
            EvaluationError, megabytes=self.megabytes, poster_width=self.poster_width
        )


@dataclass(frozen=True)
class ReportSummary:
    """What :func:`write_report` wrote.

    Attributes:
        path: the page.
        bytes: size of the page.
        models: names of the models.
        tests: names of the tests.
        posters: number of pictures.
        failed: videos without a picture, and why.
        too_large: number of videos whose picture did not fit into the page.
        left_out: folders with results of retrieval, which the page does not show.
        incomplete: folders without predictions, whose classes or clips the page does not show.
    """

    path: str
    bytes: int
    models: list[str]
    tests: list[str]
    posters: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    too_large: int = 0
    left_out: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


def write_report(
    path: str | os.PathLike[str],
    results: Sequence[str | os.PathLike[str]],
    *,
    title: str = "",
    names: Sequence[str] = (),
    settings: ReportSettings | None = None,
    progress: bool | None = None,
) -> ReportSummary:
    """Write a page about evaluations to an HTML file.

    The page is a single file that needs no connection. A slider sets λ. The page shows the accuracy
    along λ, the accuracy of each class beside that of the original CLIP, the classes that are
    confused, and the clips with a wrong answer. All figures are also there as tables.

    The original CLIP is the folder that the settings name, or the folder whose model has the same
    original weights, and no fine-tuned weights or λ = 1 alone. Without such a folder, it is the
    sweep's own point λ = 1.

    Args:
        path: the page to write. An existing file is replaced. Missing folders are created.
        results: folders that ``openvclip evaluate`` wrote, or folders above them.
        title: the title of the page. Default: "Evaluation of", and the names of the models.
        names: a name for each model. Default: the names in the settings of the evaluations.
        settings: what the page contains. Default: :class:`ReportSettings`.
        progress: whether to show a progress bar for the pictures. Default: only in a terminal.

    Raises:
        RecordsError: a folder does not exist, holds no results of accuracy, is damaged, or holds
            the files of two evaluations.
        UsageError: there are more or fewer names than models, or the results of the original CLIP
            have another λ than 1.
        VideoNotFoundError: with ``posters``, the folder ``videos`` of the settings does not exist.
        CheckpointError: the page can't be written.
        MissingDependencyError: vl-convert is not installed; or, with ``posters``, PyAV or Pillow.
    """
    chosen = settings or ReportSettings()
    if chosen.posters and chosen.videos is not None:
        require_videos([], os.fspath(chosen.videos))  # raises if there is no such folder
    originals = [] if chosen.original is None else results_folders([chosen.original])
    folders = results_folders([*results, *originals])
    read = [(folder, _read(folder, originals)) for folder in folders]
    kept = [one for _, one in read if one is not None]
    if not kept:
        raise RecordsError(
            f"{folders[0]} holds results of retrieval, which have no classes; expected results of "
            "a protocol of accuracy, such as ucf101-ep1."
        )
    runs, models, tests = runs_of(kept, names)
    library = vega_script()
    numbers = numbers_of(runs, models, tests, chosen.clips)
    posters = _Posters(chosen, progress)
    if chosen.posters:
        posters.add(runs, numbers)
    title = title or _title(runs, models)
    size = write_text(path, page_parts(title, numbers, library))
    return ReportSummary(
        os.fspath(path),
        size,
        models,
        tests,
        posters.count,
        posters.failed,
        posters.too_large,
        [str(folder) for folder, one in read if one is None],
        list(dict.fromkeys(str(one.folder) for one in kept if one.predictions is None)),
    )


def _read(folder: Path, originals: Sequence[Path]) -> Results | None:
    """Read a folder of results, and note whether it is one of the original CLIP."""
    results = read_results(folder)
    if results is None or folder.resolve() not in {path.resolve() for path in originals}:
        return results
    lams = {entry["lam"] for entry in results.entries}
    if lams not in ({None}, {1.0}):
        raise UsageError(
            f"{folder}, the results of the original CLIP, has λ = "
            f"{', '.join(f'{lam:g}' for lam in sorted(lams))}; expected results of the original "
            "CLIP alone: the same 'openvclip evaluate' command with --lam 1 --no-expand and "
            "another --out."
        )
    return replace(results, original=True)


def _title(runs: Sequence[Run], models: Sequence[str]) -> str:
    """Return the names of the fine-tuned models, or of all if there are none."""
    clips = {run.model for run in runs if run.is_clip}
    tuned = [name for index, name in enumerate(models) if index not in clips]
    return f"Evaluation of {listed(tuned or models, 4)}"


class _Posters:
    """Pictures of the wrong clips, each once."""

    def __init__(self, settings: ReportSettings, progress: bool | None) -> None:
        self._settings, self._progress = settings, progress
        self._budget = DataBudget(settings.megabytes)
        self.count = self.too_large = 0
        self.failed: dict[str, str] = {}

    def add(self, runs: Sequence[Run], numbers: dict[str, Any]) -> None:
        """Add ``pictures`` to the numbers of a page, and the index of its picture to each clip."""
        wanted: dict[str, list[dict[str, Any]]] = {}
        for path, clip in self._in_turn(runs, numbers):
            wanted.setdefault(path, []).append(clip)
        pictures: list[str] = []
        disable = None if self._progress is None else not self._progress
        workers = max(1, min(4, os.cpu_count() or 1))
        with (
            ThreadPoolExecutor(workers) as pool,
            progress_bar(total=len(wanted), desc="pictures", disable=disable) as bar,
        ):
            made = pool.map(lambda path: _made(path, self._settings.poster_width), wanted)
            for path, (data, reason) in zip(wanted, made, strict=True):
                uri = self._budget.data_uri(data, "image/jpeg") if data else ""
                for clip in wanted[path]:
                    clip["picture"] = len(pictures) if uri else None
                    clip["note"] = "" if uri else why_no_poster(path) if reason else NO_ROOM
                if uri:
                    pictures.append(uri)
                elif reason:
                    self.failed[path] = reason
                else:
                    self.too_large += 1
                bar.update()
        self.count = len(pictures)
        numbers["pictures"] = pictures

    def _in_turn(
        self, runs: Sequence[Run], numbers: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the clips of all runs and all λ in turn, so that each gets its share."""
        lists = []
        for run, shown in zip(runs, numbers["runs"], strict=True):
            details = shown["details"]
            if details is None or details["wrong"] is None:
                continue
            root = self._root(run.results)
            lists += [
                [(os.path.join(root, clip["path"]), clip) for clip in wrong["shown"]]
                for wrong in details["wrong"]
            ]
        for row in zip_longest(*lists):
            yield from (pair for pair in row if pair is not None)

    def _root(self, results: Results) -> str:
        if self._settings.videos is not None:
            return os.fspath(self._settings.videos)
        return results.predictions.videos if results.predictions is not None else ""


def _made(path: str, width: int) -> tuple[bytes, str]:
    """Return the picture in the middle of a video, or why there is none."""
    try:
        seconds = stream_facts(path).seconds or 0.0
        return poster_at(path, seconds / 2, width=width).data, ""
    except VideoError as error:
        return b"", str(error)
