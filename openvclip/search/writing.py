"""Write the moments of a search to files of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openvclip.checkpoints.atomic import atomic_path
from openvclip.commands.progress import progress_bar
from openvclip.errors import SearchError, VideoError
from openvclip.search.moments import Moment
from openvclip.video.cutting import cut_video, part_name

__all__ = ["CutReport", "cut_moments"]


@dataclass(frozen=True)
class CutReport:
    """What :func:`cut_moments` wrote.

    Attributes:
        files: the files, in the order of the moments that were cut.
        failed: the moments that were not cut, and why.
    """

    files: list[Path] = field(default_factory=list)
    failed: dict[Moment, str] = field(default_factory=dict)


def cut_moments(
    moments: Sequence[Moment],
    folder: str | os.PathLike[str],
    *,
    progress: bool | None = None,
) -> CutReport:
    """Write each moment to an MP4 file.

    The names of the files begin with the rank of the moment: ``01 match 0012.0-0016.5.mp4``. See
    :func:`openvclip.video.cutting.cut_video` for the content. A video that is missing or can't be
    read is not an error: it is in the report.

    Args:
        moments: the moments, best first.
        folder: the folder of the files. Missing folders are created. Files with the same names are
            replaced.
        progress: whether to show a progress bar. Default: only in a terminal.

    Raises:
        SearchError: the folder can't be written.
        MissingDependencyError: PyAV is not installed.
    """
    report = CutReport()
    digits = max(2, len(str(len(moments))))
    disable = None if progress is None else not progress
    bar = progress_bar(moments, desc="cut", unit="moment", disable=disable)
    for rank, moment in enumerate(bar, start=1):
        name = part_name(moment.path, moment.start, moment.end)
        path = Path(folder) / f"{rank:0{digits}d} {name}"
        try:
            with atomic_path(path) as temporary:
                cut_video(moment.path, temporary, moment.start, moment.end)
        except VideoError as error:
            report.failed[moment] = str(error)
        except OSError as error:
            raise SearchError(
                f"{path}: can't be written ({error}). Check the free space and the permissions of "
                "the folder."
            ) from error
        else:
            report.files.append(path)
    return report
