"""What comes out of an evaluation on a protocol: numbers as JSON, a table to paste, a summary."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from openvclip.evaluation import ProtocolEvaluation, SplitScore
from openvclip.evaluation.figures import markdown_table, mean_and_std


def as_json(
    result: ProtocolEvaluation, *, per_class: bool = False, confusion: bool = False
) -> dict[str, Any]:
    """Everything as JSON has it; accuracies in [0, 1], what has no value is ``None``.

    Args:
        result: of :func:`evaluate_protocol`.
        per_class: with the accuracy on each class of each split.
        confusion: with the confusion matrix of each split, rows by true class.
    """
    results = []
    for protocol, lam in product(result.protocols, result.scores):
        entry: dict[str, Any] = {"protocol": protocol, "lam": lam}
        for k in (1, 5):
            mean, std = _mean_and_std(result.top(k, lam, protocol))
            entry[f"top{k}"] = {"mean": mean, "std": std}
        scores = result.of(lam, protocol)
        results.append({**entry, "splits": [_split(one, per_class, confusion) for one in scores]})
    timing = result.timing
    return {
        "settings": result.settings,
        "results": results,
        "unreadable": [failure._asdict() for failure in result.failures],
        "timing": {
            "clips": timing.clips,
            "seconds": timing.wall,
            "clips_per_second": _number(timing.clips_per_second),
            "shares": {name: _number(value) for name, value in timing.shares().items()},
        },
    }


def as_table(result: ProtocolEvaluation, name: str, columns: str = "top-{k}") -> str:
    """A Markdown table with a row for each protocol and λ: mean ± standard deviation, in %.

    A single protocol is not named in it. The deviation is the sample's (divided by n - 1). The
    papers do not say which one theirs is; the population's is smaller by a factor of 0.95 over ten
    splits and 0.82 over three.

    Args:
        result: of :func:`evaluate_protocol`.
        name: what the first column calls the model.
        columns: the heads of the columns of accuracies, with ``{k}`` for 1 and 5.
    """
    several = len(result.protocols) > 1
    header = ["model", *(["protocol"] if several else []), "λ"]
    rows = []
    for protocol, lam in product(result.protocols, result.scores):
        first = [name, *([protocol] if several else []), "" if lam is None else f"{lam:g}"]
        rows.append([*first, *(mean_and_std(result.top(k, lam, protocol)) for k in (1, 5))])
    return markdown_table([*header, *(columns.format(k=k) for k in (1, 5))], rows)


def time_spent(result: ProtocolEvaluation) -> str:
    """One line: throughput, and where the time went."""
    timing = result.timing
    if not timing.clips:
        return "nothing was left to encode"
    shares = ", ".join(f"{name} {share:.0%}" for name, share in timing.shares().items())
    return (
        f"{timing.clips} clips in {timing.wall:.1f} s ({timing.clips_per_second:.2f} clips/s): "
        f"{shares}"
    )


def _split(score: SplitScore, per_class: bool, confusion: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": score.name,
        "classes": len(score.class_names),
        "clips": score.evaluation.n_clips,
        "left_out": score.left_out,
        "top1": _number(score.evaluation.top(1)),
        "top5": _number(score.evaluation.top(5)),
    }
    if per_class:
        found["per_class"] = {name: _number(value) for name, value in score.per_class().items()}
    if confusion:
        found["class_names"] = score.class_names
        found["confusion"] = score.confusion().tolist()
    return found


def _mean_and_std(values: list[float]) -> tuple[float | None, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return _number(mean), None
    square = math.fsum((value - mean) ** 2 for value in values)
    return _number(mean), _number(math.sqrt(square / (len(values) - 1)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
