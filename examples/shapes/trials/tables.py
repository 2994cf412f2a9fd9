"""The tables of the page: accuracies, curves, tried settings, λ without labels, costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import REFERENCE, accuracies, lambda_of
from examples.shapes.trials.registry import METHODS
from examples.shapes.trials.tasks import RULES, STILLS
from examples.shapes.trials.times import step_ratio
from examples.shapes.trials.tuning import score
from openvclip.evaluation import markdown_table, mean_and_std

__all__ = [
    "HEADS",
    "common_lambdas",
    "cost_table",
    "curve_table",
    "grid_table",
    "main_table",
    "unlabelled_section",
]

HEADS = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
    STILLS: "stills",
}
"""The heads of the columns."""


def main_table(results: Results) -> str:
    """Return the accuracies of every method: mean ± standard deviation over the cells, in %."""
    rows = []
    for name in results["chosen"]:
        if name == REFERENCE and lambda_of(results, name, None) != 0:
            rows.append(_row(results, name, 0.0))
        rows.append(_row(results, name, None))
    header = ["method", "λ", *HEADS.values(), "training time"]
    return markdown_table(header, [row for row in rows if row])


def _row(results: Results, name: str, lam: float | None) -> list[str]:
    values = [list(accuracies(results, name, lam, column).values()) for column in HEADS]
    if not values[0]:
        return []
    ratio = step_ratio(results, name)
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
    for name in (name for name in results["chosen"] if METHODS.get(name) and METHODS[name].curve):
        for lam in common_lambdas(results, name):
            means = [
                100 * float(np.mean(list(values.values())))
                for column in HEADS
                if (values := accuracies(results, name, lam, column))
            ]
            mark = "*" if lam == lambda_of(results, name, None) else ""
            rows.append([name, f"{lam:g}{mark}", *(f"{mean:.1f}" for mean in means)])
    return markdown_table(["method", "λ", *HEADS.values()], rows)


def common_lambdas(results: Results, name: str) -> list[float]:
    """Return the λ for which all cells have results."""
    common: set[float] | None = None
    for entry in results["cells"].values():
        points = entry["methods"].get(name, {}).get("points", [])
        lams = {float(point["lam"]) for point in points}
        if lams:
            common = lams if common is None else common & lams
    return sorted(common or ())


def grid_table(results: Results) -> str:
    """Return all settings that were tried, at their best λ, and the number of evaluated points."""
    rows = []
    for name, entries in results["tuning"].get("methods", {}).items():
        if name not in results["chosen"]:
            continue
        choice = results["chosen"][name]
        for entry in entries.values():
            by_params: dict[str, list[dict[str, Any]]] = {}
            for point in entry["points"]:
                by_params.setdefault(_text(point["params"]), []).append(point)
            for params, points in by_params.items():
                top = max(points, key=score)
                chosen = (
                    entry["settings"] == choice["training"]
                    and top["params"] == choice["params"]
                    and top["lam"] == choice["lam"]
                )
                rows.append(
                    [
                        name + (" *" if chosen else ""),
                        _text(entry["settings"]),
                        params,
                        f"{top['lam']:g}",
                        str(len(points)),
                        *(f"{100 * top['accuracy'][question]:.1f}" for question in QUESTIONS),
                        f"{100 * score(top):.1f}",
                    ]
                )
    header = ["method", "training", "own numbers", "best λ", "λ tried"]
    return markdown_table([*header, *(HEADS[question] for question in QUESTIONS), "mean"], rows)


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))


def unlabelled_section(results: Results) -> str:
    """Return the study of λ without labels, or that there are no results."""
    rows = []
    for name in results["chosen"]:
        for question in QUESTIONS:
            chosen = accuracies(results, name, None, question)
            found = {
                number: entry["methods"][name]["unlabelled"][question]
                for number, entry in results["cells"].items()
                if number in chosen and "unlabelled" in entry["methods"][name]
            }
            if not found:
                continue
            cells = [mean_and_std([chosen[number] for number in found])]
            for rule in RULES:
                lams = [float(by_rule[rule]["lam"]) for by_rule in found.values()]
                cells.append(f"{float(np.mean(lams)):.2f}")
                cells.append(
                    mean_and_std([by_rule[rule]["accuracy"] for by_rule in found.values()])
                )
            rows.append([name, HEADS[question], *cells])
    if not rows:
        return "There are no results yet."
    header = ["method", "clips without labels", "chosen λ"]
    for rule in RULES:
        header += [f"λ of {rule}", f"with λ of {rule}"]
    return markdown_table(header, rows)


def cost_table(results: Results) -> str:
    """Return what each method does, its trained parameters and its training time."""
    rows = []
    for name in results["chosen"]:
        if name not in METHODS:
            continue
        method, ratio = METHODS[name], step_ratio(results, name)
        counts = {
            training["parameters"]
            for entry in results["cells"].values()
            for key, training in entry["trainings"].items()
            if method.needs and key.startswith(method.needs[0] + " ")
        }
        rows.append(
            [
                name,
                method.does,
                f"{max(counts):,}" if counts else "0",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return markdown_table(["method", "what it does", "trained parameters", "training time"], rows)
