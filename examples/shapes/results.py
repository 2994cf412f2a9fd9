"""The results file of the shapes world, and the table and figure made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.shapes.experiment import Accuracies
from openvclip.checkpoints import atomic_path
from openvclip.report import Curve, markdown_table, mean_and_std, tradeoff_figure

Results = dict[str, Any]
"""``{"settings": ..., "environment": ..., "seeds": {seed: {row: Accuracies}}}``"""

ROW_ORDER = ("CLIP", "FINE-TUNE", "L2", "IWR", "SWA", "Open-VCLIP")


def save_results(results: Results, path: Path) -> None:
    """Write the results file; after a crash the old file or the new one is there, whole."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def load_results(path: Path, settings: dict[str, Any]) -> Results:
    """Results that an earlier call left, or an empty start.

    Raises:
        FileExistsError: they were made with other settings.
    """
    if not path.exists():
        return {"settings": settings, "environment": {}, "seeds": {}}
    results: Results = json.loads(path.read_text())
    if results.get("settings") != settings:
        raise FileExistsError(
            f"{path} holds results of other settings. Give another --out, or remove that folder."
        )
    return results


def rows(results: Results) -> list[str]:
    """The rows that every seed has, in the order of the table."""
    seeds = results["seeds"].values()
    return [row for row in ROW_ORDER if all(row in seed for seed in seeds)]


def accuracies(results: Results, row: str, name: str) -> NDArray[np.float64]:
    """Accuracies of a row on a list, ``[seeds, lambdas]``, in [0, 1]."""
    seeds: list[dict[str, Accuracies]] = list(results["seeds"].values())
    return np.array([list(seed[row][name].values()) for seed in seeds], dtype=np.float64)


def lambdas(results: Results, row: str) -> list[float]:
    """The lambdas of a row, in the order of the columns of :func:`accuracies`."""
    first: dict[str, Accuracies] = next(iter(results["seeds"].values()))
    return [float(lam) for lam in first[row]["seen_test"]]


def chosen_lambda(results: Results, row: str) -> float:
    """The lambda of the best mean zero-shot accuracy on the *development* shapes."""
    means = accuracies(results, row, "development").mean(axis=0)
    return lambdas(results, row)[int(means.argmax())]


def table(results: Results) -> str:
    """Markdown: accuracies of each row at the fine-tuned end, half way, and at its chosen λ."""
    header = ["method", "seen, λ=0", "unseen, λ=0", "seen, λ=0.5", "unseen, λ=0.5"]
    header += ["chosen λ", "seen", "unseen"]
    return markdown_table(header, [_table_row(results, row) for row in rows(results)])


def _table_row(results: Results, row: str) -> list[str]:
    if row == "CLIP":
        return [row, "", "", "", "", "", *_cells(results, row, 1.0)]
    best = chosen_lambda(results, row)
    at = [_cells(results, row, lam) for lam in (0.0, 0.5, best)]
    return [row, *at[0], *at[1], f"{best:g}", *at[2]]


def _cells(results: Results, row: str, lam: float) -> list[str]:
    column = lambdas(results, row).index(lam)
    return [
        mean_and_std(accuracies(results, row, name)[:, column]) for name in ("seen_test", "unseen")
    ]


def draw(results: Results, path: Path) -> None:
    """The trade-off figure: unseen over seen accuracy along lambda, stars at the chosen lambda."""
    curves = []
    for row in rows(results):
        lams = lambdas(results, row)
        seen, unseen = (accuracies(results, row, name) for name in ("seen_test", "unseen"))
        chosen = None if row == "CLIP" else lams.index(chosen_lambda(results, row))
        highlighted = row in ("FINE-TUNE", "Open-VCLIP")
        curves.append(Curve(row, lams, seen, unseen, chosen, highlighted))
    n = len(results["seeds"])
    tradeoff_figure(
        curves,
        path,
        title=f"Shapes world, {n} seed{'s' if n > 1 else ''}; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on clips of seen shapes (%)",
        zero_shot_label="accuracy on clips of unseen shapes (%)",
    )
