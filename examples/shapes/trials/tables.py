"""The tables of the page with a row for each method: accuracies, λ, costs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.reading import MEAN, accuracies, lambda_of
from examples.shapes.trials.registry import CURVE, METHODS, REFERENCE
from examples.shapes.trials.store import key_of
from examples.shapes.trials.times import training_ratio
from examples.shapes.trials.wording import HEADS
from openvclip.evaluation import markdown_table, mean_and_std

__all__ = ["common_lambdas", "cost_table", "curve_table", "curves_of", "main_table"]


def main_table(results: Results, names: Iterable[str]) -> str:
    """Return the accuracies of methods: mean ± standard deviation over the cells, in %."""
    rows = []
    for name in names:
        if name == REFERENCE and lambda_of(results, name, None) != 0:
            rows.append(_row(results, name, 0.0))
        rows.append(_row(results, name, None))
    header = ["method", "λ", *HEADS.values(), "training time"]
    return markdown_table(header, [row for row in rows if row])


def _row(results: Results, name: str, lam: float | None) -> list[str]:
    values = [list(accuracies(results, name, lam, column).values()) for column in HEADS]
    if not values[0]:
        return []
    ratio = training_ratio(results, name)
    cells = [mean_and_std(column) if column else "" for column in values]
    return [
        name,
        f"{lambda_of(results, name, lam):g}",
        *cells,
        "" if ratio is None else f"{ratio:.2f}",
    ]


def curve_table(results: Results) -> str:
    """Return the mean accuracies of the methods of the figure at each λ, CLIP's stills included."""
    rows = []
    for name in curves_of(results):
        for lam in common_lambdas(results, name):
            means = [
                100 * float(np.mean(list(values.values())))
                for column in HEADS
                if (values := accuracies(results, name, lam, column))
            ]
            mark = "*" if lam == lambda_of(results, name, None) else ""
            rows.append([name, f"{lam:g}{mark}", *(f"{mean:.1f}" for mean in means)])
    return markdown_table(["method", "λ", *HEADS.values()], rows)


def curves_of(results: Results) -> list[str]:
    """Return the names of the methods of the figure."""
    return [name for name in results["chosen"] if name in METHODS and METHODS[name].curve]


def common_lambdas(results: Results, name: str) -> list[float]:
    """Return the chosen λ of a method and, if the method is in the figure, the λ of the figure."""
    lams = {lambda_of(results, name, None), *(CURVE if METHODS[name].curve else ())}
    return [lam for lam in sorted(lams) if accuracies(results, name, lam, MEAN)]


def cost_table(results: Results) -> str:
    """Return what each method does, its trained parameters and its training time."""
    rows = []
    for name in results["chosen"]:
        if name not in METHODS:
            continue
        method, ratio = METHODS[name], training_ratio(results, name)
        keys = [key_of(need, results["chosen"][name]["training"]) for need in method.needs[:1]]
        counts = {
            entry["trainings"][key]["parameters"]
            for entry in results["cells"].values()
            for key in keys
            if key in entry["trainings"]
        }
        rows.append(
            [
                name,
                method.does,
                f"{max(counts):,}" if counts else "0",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    text = markdown_table(["method", "what it does", "trained parameters", "training time"], rows)
    head, rule, *lines = text.split("\n")
    # Sentences start at the left.
    columns = rule.split("|")
    columns[2] = columns[2].replace("-:", "--")
    return "\n".join([head, "|".join(columns), *lines])
