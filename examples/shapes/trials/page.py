"""Write the pages of the comparison from its results.

``python -m examples.shapes.trials.page OUT/results.json`` writes ``docs/shapes.md``,
``docs/which-method.md``, a figure and a copy of the results. Every number and every verdict of the
pages comes from the results. If cells are missing, the page says how many there are so far.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes.results import Results, origins, save_results, wrapped
from examples.shapes.trials.advice import advice_page
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import (
    PAPER,
    REFERENCE,
    Judged,
    accuracies,
    claims_of,
    judge,
    lambda_of,
)
from examples.shapes.trials.registry import METHODS
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.settings import FULL
from examples.shapes.trials.statistics import LEVEL, cells_needed, power, smallest_difference
from examples.shapes.trials.tasks import RULES, STILLS
from examples.shapes.trials.tuning import score
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.evaluation import Curve, markdown_table, mean_and_std, tradeoff_figure

__all__ = ["draw", "main", "page", "publish"]

DOCS = Path(__file__).resolve().parents[3] / "docs"
README_MARK = "<!-- table: trials -->"
RESULTS, FIGURE = "shapes-trials.json", "shapes-trials.png"
TEMPLATE = Path(__file__).with_name("page_template.md")

HEADS = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
    STILLS: "stills",
}
"""The heads of the columns."""

DIFFERENCE = 0.015
"""The true difference that the number of cells is chosen for."""


def page(results: Results) -> str:
    """Return the page in Markdown."""
    judged = judge(results, claims_of(list(results["chosen"])))
    sections = {
        "state": _state(results),
        "main": main_table(results),
        "claims": claims_table(judged),
        "summary": _summary(judged),
        "power": _power(results, judged),
        "curves": curve_table(results),
        "grid": grid_table(results),
        "unlabelled": unlabelled_section(results),
        "costs": cost_table(results),
        "origin": _origin(results),
        "test": str(results["settings"]["sizes"]["test"]),
        "train": str(results["settings"]["sizes"]["train"]),
        "stills": str(results["settings"]["sizes"]["stills"]),
        "steps": str(results["settings"]["sizes"]["steps"]),
        "development": str(results["settings"]["sizes"]["development"]),
        "batch": str(results["settings"]["sizes"]["batch_size"]),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, section in sections.items():
        text = text.replace(f"$({name})", section)
    return text


def _cells(results: Results) -> int:
    return len(results["cells"])


def _state(results: Results) -> str:
    """Return how many cells there are, and which rows are missing."""
    cells = _cells(results)
    lines = []
    if cells < FULL.cells:
        lines.append(
            f"**Not complete:** there are results of {cells} of {FULL.cells} cells so far. The "
            "verdicts can change."
        )
    short = {
        name: count
        for name in results["chosen"]
        if (count := len(accuracies(results, name, None, "trained"))) < cells
    }
    if short:
        names = "; ".join(f"{name} ({count})" for name, count in short.items())
        lines.append(f"Rows with fewer cells: {names}.")
    absent = [name for name in PUBLISHED if name not in results["chosen"]]
    if absent:
        lines.append(f"Methods without results: {'; '.join(absent)}.")
    return "\n\n".join(wrapped(line) for line in lines)


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


def claims_table(judged: list[Judged]) -> str:
    """Return the differences of each pair of rows in points, and their p-values."""
    rows: dict[tuple[str, ...], dict[str, Judged]] = {}
    for item in judged:
        claim = item.claim
        lams = ["chosen" if lam is None else f"{lam:g}" for lam in (claim.lam, claim.other_lam)]
        pair = (claim.method, lams[0], claim.other, lams[1])
        rows.setdefault(pair, {})[claim.question] = item
    header = ["method", "λ", "compared with", "its λ"]
    for question in QUESTIONS:
        header += [HEADS[question], "p"]
    lines = []
    for names, by_question in rows.items():
        cells = list(names)
        for question in QUESTIONS:
            found = by_question.get(question)
            cells += ["", ""] if found is None else [_difference(found), _p(found)]
        lines.append(cells)
    return markdown_table(header, lines)


def _difference(item: Judged) -> str:
    return points(item) if item.verdict == "not clear" else f"**{points(item)}**"


def _p(item: Judged) -> str:
    return f"{item.p:.3f}" if item.p >= 0.001 else "< 0.001"


def points(item: Judged) -> str:
    """Return a difference in points of accuracy, such as ``"+1.2 ± 0.8"``."""
    mean = f"{round(100 * item.mean, 1) + 0.0:+.1f}".replace("-", "−")
    if len(item.differences) < 2:
        return mean
    return f"{mean} ± {100 * item.deviation:.1f}"


def _summary(judged: list[Judged]) -> str:
    count = dict.fromkeys(("higher", "lower", "not clear"), 0)
    for item in judged:
        count[item.verdict] += 1
    return wrapped(
        f"The page judges {len(judged)} claims. In {count['higher']} of them the first method is "
        f"clearly higher, in {count['lower']} it is clearly lower, and {count['not clear']} are "
        "not clear."
    )


def _power(results: Results, judged: list[Judged]) -> str:
    cells = _cells(results)
    deviations = sorted(item.deviation for item in judged if len(item.differences) > 1)
    if not deviations:
        return "With one cell there are no verdicts."
    level = LEVEL / len(judged)
    rows = []
    for name, share in (("median", 0.5), ("90 % of the claims", 0.9)):
        deviation = float(np.quantile(deviations, share))
        needed = cells_needed(deviation, DIFFERENCE, level)
        rows.append(
            [
                name,
                f"{100 * deviation:.1f}",
                f"{100 * power(cells, deviation, DIFFERENCE, level):.0f} %",
                f"{100 * smallest_difference(cells, deviation, level):.1f}",
                "more than 500" if needed is None else str(needed),
            ]
        )
    header = [
        "deviation of the differences",
        "points",
        "1.5 points are called clear",
        "clear nine times in ten",
        "cells for 1.5 points",
    ]
    return markdown_table(header, rows)


def curve_table(results: Results) -> str:
    """Return the mean accuracies of the methods of the figure at each λ, CLIP's stills included."""
    rows = []
    for name in (name for name in results["chosen"] if METHODS.get(name) and METHODS[name].curve):
        for lam in _lambdas(results, name):
            means = [
                100 * float(np.mean(list(values.values())))
                for column in HEADS
                if (values := accuracies(results, name, lam, column))
            ]
            mark = "*" if lam == lambda_of(results, name, None) else ""
            rows.append([name, f"{lam:g}{mark}", *(f"{mean:.1f}" for mean in means)])
    return markdown_table(["method", "λ", *HEADS.values()], rows)


def _lambdas(results: Results, name: str) -> list[float]:
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


def step_ratio(results: Results, name: str) -> float | None:
    """Return the time of the training relative to one run of plain fine-tuning, or ``None``."""
    ratios = []
    for entry in results["cells"].values():
        own = _training_seconds(results, entry, name)
        plain = _training_seconds(results, entry, REFERENCE)
        if own is not None and plain:
            ratios.append(own / plain)
    return float(np.median(ratios)) if ratios else None


def _training_seconds(results: Results, entry: dict[str, Any], name: str) -> float | None:
    """Return the seconds of all training steps of a method in a cell."""
    row = entry["methods"].get(name)
    if row is None or name not in METHODS or not METHODS[name].needs:
        return None
    settings = " ".join(f"{key}={value}" for key, value in sorted(row["settings"].items()))
    seconds = 0.0
    for need in METHODS[name].needs:
        training = entry["trainings"].get(f"{need} {settings}".strip())
        if training is None or training["step_seconds"] is None:
            return None
        seconds += training["step_seconds"] * training["steps"]
    return seconds


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


def _origin(results: Results) -> str:
    seconds = sum(
        item["seconds"]
        for entry in (*results["cells"].values(), results["tuning"])
        for group in (entry.get("trainings", {}).values(), _rows_of(entry))
        for item in group
    )
    return wrapped(
        f"The results took {seconds / 3600:.1f} hours of one core in all ({origins(results)}). "
        f"[`{RESULTS}`](assets/{RESULTS}) has all of them."
    )


def _rows_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in entry.get("methods", {}).values():
        rows += [row] if "points" in row else list(row.values())
    return rows


def draw(results: Results, path: Path) -> None:
    """Draw unseen shapes and actions over trained classes along λ."""
    curves = []
    for name in (name for name in results["chosen"] if METHODS.get(name) and METHODS[name].curve):
        lams = _lambdas(results, name)
        axes = [
            [list(accuracies(results, name, lam, question).values()) for lam in lams]
            for question in ("trained", "actions")
        ]
        if not lams:
            continue
        x, y = (np.array(axis).T for axis in axes)
        chosen = lams.index(lambda_of(results, name, None))
        curves.append(Curve(name, lams, x, y, chosen, name == PAPER))
    cells = _cells(results)
    tradeoff_figure(
        curves,
        path,
        title=f"Shapes world, {cells} cells; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on trained classes (%)",
        zero_shot_label="accuracy on unseen shapes and actions (%)",
    )


def publish(results: Results, docs: Path = DOCS) -> list[Path]:
    """Write the pages, the figure and the results; return the paths of the pages."""
    (docs / "assets").mkdir(parents=True, exist_ok=True)
    save_results(results, docs / "assets" / RESULTS)
    draw(results, docs / "assets" / FIGURE)
    judged = judge(results, claims_of(list(results["chosen"])))
    pages = {"shapes.md": page(results), "which-method.md": advice_page(results, judged)}
    for name, text in pages.items():
        with atomic_path(docs / name) as partial:
            partial.write_text(text, encoding="utf-8")
    written = [docs / name for name in pages]
    readme = docs.parent / "README.md"
    if readme.exists() and README_MARK in readme.read_text(encoding="utf-8"):
        with_table = _with_table(readme.read_text(encoding="utf-8"), results)
        readme.write_text(with_table, encoding="utf-8")
        written.append(readme)
    return written


def _with_table(text: str, results: Results) -> str:
    """Return the text of the README with a new main table after its mark."""
    table = f"{README_MARK}\n{main_table(results)}\n"
    pattern = rf"{re.escape(README_MARK)}\n(\|.*\n)*"
    return re.sub(pattern, lambda _: table, text, count=1)


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the pages from a results file."""
    parser = Parser(
        prog="python -m examples.shapes.trials.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="OUT/results.json of the comparison")
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of the pages; default: docs"
    )
    args = parser.parse_args(arguments)
    try:
        results: Results = json.loads(args.results.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{args.results}: {error}") from error
    if not results.get("cells"):
        raise SystemExit(f"{args.results}: no cell has results. Run the comparison first.")
    for path in publish(results, args.docs):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
