"""Results of searches as text, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from openvclip.commands.names import one_line
from openvclip.models.timeline import clock
from openvclip.search.searching import SearchResult

__all__ = ["results_as_csv", "results_as_json", "results_as_text"]

_COLUMNS = ("query", "rank", "path", "start", "end", "score", "peak")


def results_as_text(results: Sequence[SearchResult]) -> str:
    """Return results as a table: path, start, end and score of each moment.

    If there are several results, each begins with its query.

    Args:
        results: the results.
    """
    parts = []
    for result in results:
        title = [one_line(result.query)] if len(results) > 1 else []
        parts.append("\n".join([*title, *(_table(result) or [result.reason()])]))
    return "\n\n".join(parts)


def _table(result: SearchResult) -> list[str]:
    rows = [("path", "start", "end", "score")]
    for moment in result.moments:
        times = clock(moment.start), clock(moment.end)
        rows.append((one_line(moment.path), *times, f"{moment.score:.3f}"))
    if len(rows) == 1:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def results_as_json(results: Sequence[SearchResult]) -> list[dict[str, Any]]:
    """Return results as JSON objects, one for each query. Times are in seconds.

    Args:
        results: the results.
    """
    return [
        {
            "query": result.query,
            "min_score": result.min_score,
            "best": result.best,
            "moments": [moment._asdict() for moment in result.moments],
        }
        for result in results
    ]


def results_as_csv(results: Sequence[SearchResult]) -> str:
    """Return results as CSV with a header, one line for each moment. Times are in seconds.

    Args:
        results: the results.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results:
        for rank, moment in enumerate(result.moments, start=1):
            times = (f"{value:.3f}" for value in (moment.start, moment.end))
            score, peak = f"{moment.score:.6f}", f"{moment.peak:.3f}"
            writer.writerow([result.query, rank, moment.path, *times, score, peak])
    return text.getvalue()
