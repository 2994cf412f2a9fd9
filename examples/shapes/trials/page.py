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
from examples.shapes.trials.claims import (
    PAPER,
    accuracies,
    claims_of,
    judge,
    lambda_of,
)
from examples.shapes.trials.registry import METHODS
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.settings import FULL
from examples.shapes.trials.tables import (
    common_lambdas,
    cost_table,
    curve_table,
    grid_table,
    main_table,
    unlabelled_section,
)
from examples.shapes.trials.verdicts import claims_table, power_table, summary
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.evaluation import Curve, tradeoff_figure

__all__ = ["draw", "main", "page", "publish"]

DOCS = Path(__file__).resolve().parents[3] / "docs"
README_MARK = "<!-- table: trials -->"
RESULTS, FIGURE = "shapes-trials.json", "shapes-trials.png"
TEMPLATE = Path(__file__).with_name("page_template.md")


def page(results: Results) -> str:
    """Return the page in Markdown."""
    judged = judge(results, claims_of(list(results["chosen"])))
    sections = {
        "state": _state(results),
        "main": main_table(results),
        "claims": claims_table(judged),
        "summary": summary(judged),
        "power": power_table(results, judged),
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
        lams = common_lambdas(results, name)
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
