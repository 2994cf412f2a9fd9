"""Write the pages of the comparison from its results.

``python -m examples.shapes.trials.page OUT/results.json`` writes ``docs/shapes.md``,
``docs/which-method.md``, a figure and a copy of the results. Every number and every verdict of the
pages comes from the complete cells. The page says how many there are so far.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes.results import Results, origins, save_results
from examples.shapes.trials.advice import advice_page
from examples.shapes.trials.cells import DIVISIONS, QUESTIONS
from examples.shapes.trials.claims import Judged, claims_of, judge
from examples.shapes.trials.grid import alone_text, edges_text, grid_table, luck_text
from examples.shapes.trials.reading import MEAN, accuracies, complete, lambda_of
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.sections import (
    share_table,
    share_text,
    stills_table,
    stills_text,
    unlabelled_section,
)
from examples.shapes.trials.settings import FULL
from examples.shapes.trials.tables import (
    common_lambdas,
    cost_table,
    curve_table,
    curves_of,
    main_table,
)
from examples.shapes.trials.tasks import CLIP_SECONDS
from examples.shapes.trials.verdicts import claims_table, power_table, power_text, summary
from examples.shapes.trials.wording import cells_text, wrapped_page
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.evaluation import Curve, tradeoff_figure

__all__ = ["draw", "main", "page", "publish"]

DOCS = Path(__file__).resolve().parents[3] / "docs"
README_MARK = "<!-- table: trials -->"
#: The methods in the table of the README.
README_METHODS = (
    "CLIP",
    "FINE-TUNE",
    "L2",
    "SWA",
    "Open-VCLIP",
    "Open-VCLIP, share 1/4",
    "LoRA",
    "LoRA + IWR",
    "FROSTER",
    "FROSTER + IWR",
    "Lipsum-FT",
    "MonoSoup",
    "Model Stock",
    "ViFi-CLIP",
    "Vita-CLIP",
)
RESULTS, FIGURE = "shapes-trials.json", "shapes-trials.png"
TEMPLATE = Path(__file__).with_name("page_template.md")


def page(results: Results) -> str:
    """Return the page in Markdown."""
    shown = complete(results)
    judged = judge(shown, claims_of(list(shown["chosen"])))
    sizes = results["settings"]["sizes"]
    sections = {
        "state": state(shown, judged),
        "main": main_table(shown, shown["chosen"]),
        "edges": edges_text(shown),
        "luck": luck_text(shown),
        "alone": alone_text(shown),
        "means": claims_table(judged, [MEAN]),
        "claims": claims_table(judged, QUESTIONS),
        "summary": summary(judged),
        "power": power_table(shown, judged),
        "level": f"{len(judged)}",
        "share": share_table(shown, judged),
        "enough": share_text(judged),
        "curves": curve_table(shown),
        "left": stills_table(shown),
        "keeps": stills_text(shown),
        "grid": grid_table(shown),
        "unlabelled": unlabelled_section(shown),
        "costs": cost_table(shown),
        "origin": _origin(results, shown),
        "failures": failures_text(results),
        "cells": str(FULL.cells),
        "divisions": str(len(DIVISIONS)),
        "again": str(FULL.cells - len(DIVISIONS)),
        **{name: str(sizes[name]) for name in ("test", "train", "stills", "steps", "development")},
        "batch": str(sizes["batch_size"]),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, section in sections.items():
        text = text.replace(f"$({name})", section)
    return wrapped_page(text)


def state(shown: Results, judged: Sequence[Judged]) -> str:
    """Return how many cells are complete, what they can show, and which methods are missing."""
    lines = [cells_text(shown), power_text(shown, judged)]
    absent = [name for name in PUBLISHED if name not in shown["chosen"]]
    if absent:
        lines.append(f"Methods without results: {'; '.join(absent)}.")
    return "\n\n".join(line for line in lines if line)


def failures_text(results: Results) -> str:
    """Return the tasks that failed, or an empty text."""
    failures = results.get("failures", {})
    if not failures:
        return ""
    lines = ["These tasks failed. Cells that need them are not complete:"]
    lines += [f"- {task}: {failure['text']}" for task, failure in failures.items()]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _origin(results: Results, shown: Results) -> str:
    """Return the time of the trainings and evaluations, and the machine."""
    of_cells = [_seconds(entry) for entry in results["cells"].values()]
    tuning = _seconds(results["tuning"])
    whole = [_seconds(entry) for entry in shown["cells"].values()]
    sizes = results["settings"]["sizes"]
    drawing = CLIP_SECONDS * (sizes["train"] + len(QUESTIONS) * sizes["test"])
    everything = (tuning + FULL.cells * (drawing + sum(whole) / len(whole))) / 2
    return (
        f"The trainings and evaluations took {(sum(of_cells) + tuning) / 3600:.1f} hours of one "
        f"core ({origins(results)}). At this speed, the tuning and {FULL.cells} cells take "
        f"{everything / 3600:.1f} hours of 2 cores. This includes {1000 * CLIP_SECONDS:.0f} ms for "
        f"each clip that is drawn, measured apart. [`{RESULTS}`](assets/{RESULTS}) has all results."
    )


def _seconds(entry: dict[str, Any]) -> float:
    """Return the processor seconds of the trainings and rows of a cell."""
    groups = (entry.get("trainings", {}).values(), _rows_of(entry))
    return float(sum(item["seconds"] for group in groups for item in group))


def _rows_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in entry.get("methods", {}).values():
        rows += [row] if "points" in row else list(row.values())
    return rows


def draw(shown: Results, path: Path) -> None:
    """Draw unseen shapes and actions over trained classes along λ."""
    curves = []
    for name in curves_of(shown):
        lams = common_lambdas(shown, name)
        x, y = (
            np.array([list(accuracies(shown, name, lam, question).values()) for lam in lams]).T
            for question in ("trained", "actions")
        )
        curves.append(Curve(name, lams, x, y, lams.index(lambda_of(shown, name, None)), True))
    tradeoff_figure(
        curves,
        path,
        title="The number at a point is λ, the weight of the original CLIP. The star is the "
        "chosen λ.",
        closed_set_label="accuracy on the trained classes (%)",
        zero_shot_label="accuracy on unseen shapes in unseen actions (%)",
    )


def publish(results: Results, docs: Path = DOCS) -> list[Path]:
    """Write the pages, the figure and the results; return the paths of the pages."""
    (docs / "assets").mkdir(parents=True, exist_ok=True)
    shown = complete(results)
    save_results(_without_traces(results), docs / "assets" / RESULTS)
    draw(shown, docs / "assets" / FIGURE)
    judged = judge(shown, claims_of(list(shown["chosen"])))
    pages = {"shapes.md": page(results), "which-method.md": advice_page(shown, judged)}
    for name, text in pages.items():
        with atomic_path(docs / name) as partial:
            partial.write_text(text, encoding="utf-8")
    written = [docs / name for name in pages]
    # Only a folder "docs" belongs to the README beside it. A reader's own pages can be anywhere.
    readme = docs.parent / "README.md"
    is_own = docs.resolve().name == "docs"
    if is_own and readme.exists() and README_MARK in readme.read_text(encoding="utf-8"):
        with_table = _with_table(readme.read_text(encoding="utf-8"), shown)
        readme.write_text(with_table, encoding="utf-8")
        written.append(readme)
    return written


def _without_traces(results: Results) -> Results:
    """Return the results without tracebacks, which have the paths of a machine."""
    failures = results.get("failures", {})
    texts = {task: {"text": failure["text"]} for task, failure in failures.items()}
    return {**results, "failures": texts}


def _with_table(text: str, shown: Results) -> str:
    """Return the text of the README with a new table and number of cells after its mark."""
    table = main_table(shown, [name for name in README_METHODS if name in shown["chosen"]])
    new = f"{README_MARK}\n{table}\n\n_{cells_text(shown)}_\n"
    pattern = rf"{re.escape(README_MARK)}\n(\|.*\n)*(\n_.*_\n)?"
    return re.sub(pattern, lambda _: new, text, count=1)


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
        "--docs",
        type=Path,
        default=DOCS,
        help="folder of the pages; default: docs, and the table of the README",
    )
    parser.add_argument(
        "--methods",
        metavar="MODULE",
        help="module that registers methods of your own, such as examples.shapes.own_method",
    )
    args = parser.parse_args(arguments)
    if args.methods:
        try:
            importlib.import_module(args.methods)
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"--methods {args.methods}: {error}. Expected the name of a module that Python "
                "finds from this folder, such as examples.shapes.own_method."
            ) from error
    try:
        results: Results = json.loads(args.results.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{args.results}: {error}") from error
    if not results.get("cells") or not complete(results)["cells"]:
        raise SystemExit(
            f"{args.results}: no cell has results of all methods. Run the comparison first, or "
            "again: it goes on after a stop."
        )
    for path in publish(results, args.docs):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
