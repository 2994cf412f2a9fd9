"""Tabulate results: numbers as JSON, Markdown tables, and one-line summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, Protocol

from openvclip.evaluation.results import ProtocolEvaluation, SplitScore
from openvclip.evaluation.timing import Timing


class _Timed(Protocol):
    @property
    def timing(self) -> Timing: ...


def mean_and_std(values: Iterable[float], digits: int = 1) -> str:
    """Format accuracies in [0, 1] as mean ± standard deviation in percent.

    The standard deviation is that of a sample (divided by n - 1). A single accuracy has no standard
    deviation.

    Args:
        values: accuracies in [0, 1], such as those of several seeds or splits.
        digits: number of digits after the decimal point.

    Example:
        >>> mean_and_std([0.5, 0.6, 0.7]), mean_and_std([0.503])
        ('60.0 ± 10.0', '50.3')
    """
    mean, std = _statistics([100 * value for value in values])
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table. The columns are padded to equal width.

    The first column is aligned to the left, the other columns to the right.

    Args:
        header: the heads of the columns.
        rows: the cells of each row, as many as there are heads.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *(len(cell) for cell in column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_row(cells, widths) for cells in (header, rule, *rows))


def as_json(
    result: ProtocolEvaluation, *, per_class: bool = False, confusion: bool = False
) -> dict[str, Any]:
    """Return a result as JSON objects. Accuracies are in [0, 1]; NaN becomes ``None``.

    Args:
        result: the result of :func:`openvclip.evaluation.evaluate_protocol`.
        per_class: whether to add the accuracy of each class of each split.
        confusion: whether to add the confusion matrix of each split. Rows are true classes.
    """
    results = []
    for protocol, lam in product(result.protocols, result.scores):
        entry: dict[str, Any] = {"protocol": protocol, "lam": lam}
        for k in (1, 5):
            mean, std = _statistics(result.top(k, lam, protocol))
            entry[f"top{k}"] = {"mean": _number(mean), "std": None if std is None else _number(std)}
        scores = result.of(lam, protocol)
        entry["splits"] = [_split_as_json(score, per_class, confusion) for score in scores]
        results.append(entry)
    return {
        "settings": result.settings,
        "results": results,
        "unreadable": [failure._asdict() for failure in result.failures],
        "timing": timing_as_json(result.timing),
    }


def timing_as_json(timing: Timing) -> dict[str, Any]:
    """Return the time of a run as JSON objects; NaN becomes ``None``."""
    return {
        "clips": timing.clips,
        "seconds": timing.wall,
        "clips_per_second": _number(timing.clips_per_second),
        "shares": {name: _number(value) for name, value in timing.shares().items()},
    }


def as_table(result: ProtocolEvaluation, name: str, columns: str = "top-{k}") -> str:
    """Format a result as a Markdown table with a row for each protocol and λ.

    The cells are mean ± standard deviation over the splits, in percent. If there is only one
    protocol, the table has no column for it. The standard deviation is that of a sample (divided by
    n - 1). The papers do not say which standard deviation they report. The standard deviation of a
    population is smaller, by a factor of 0.95 for ten splits and 0.82 for three.

    Args:
        result: the result of :func:`openvclip.evaluation.evaluate_protocol`.
        name: the name of the model, for the first column.
        columns: the head of a column of accuracies. 1 or 5 replaces ``{k}``.
    """
    several = len(result.protocols) > 1
    header = ["model", *(["protocol"] if several else []), "λ"]
    rows = []
    for protocol, lam in product(result.protocols, result.scores):
        first = [name, *([protocol] if several else []), "" if lam is None else f"{lam:g}"]
        rows.append([*first, *(mean_and_std(result.top(k, lam, protocol)) for k in (1, 5))])
    return markdown_table([*header, *(columns.format(k=k) for k in (1, 5))], rows)


def time_spent(result: _Timed) -> str:
    """Summarise throughput and time in one line.

    Args:
        result: the result of :func:`openvclip.evaluation.evaluate_protocol` or of
            :func:`openvclip.evaluation.evaluate_retrieval`.
    """
    timing = result.timing
    if not timing.clips:
        return "nothing was left to encode"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in timing.shares().items())
    return (
        f"{timing.clips} clips in {timing.wall:.1f} s ({timing.clips_per_second:.2f} clips/s): "
        f"{shares}"
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def _split_as_json(score: SplitScore, per_class: bool, confusion: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": score.name,
        "classes": len(score.class_names),
        "clips": score.evaluation.n_clips,
        "left_out": score.left_out,
        "top1": _number(score.evaluation.top(1)),
        "top5": _number(score.evaluation.top(5)),
    }
    if per_class:
        entry["per_class"] = {name: _number(value) for name, value in score.per_class().items()}
    if confusion:
        entry["class_names"] = score.class_names
        entry["confusion"] = score.confusion().tolist()
    return entry


def _statistics(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation of a sample; ``None`` for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
