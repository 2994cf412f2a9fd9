"""Write the page of the comparison from its results.

``python -m examples.shapes.report.comparison_page OUT/results.json`` reads this file, and
``tuning.json`` and ``timing.json`` in the same folder. It writes ``docs/comparison.md``, a figure,
and copies of the three files. A page of incomplete results says how many runs are missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from examples.shapes.comparison import best_rates
from examples.shapes.comparison_settings import METHODS
from examples.shapes.report.comparison_table import ROWS, Comparison, Quantity, Row, step_ratio
from examples.shapes.report.comparison_words import (
    COMMANDS,
    HEADING,
    INTRODUCTION,
    SHOTS,
    about_times,
    describe,
    over,
    protocol,
    rule,
)
from examples.shapes.report.statements import Verdict
from examples.shapes.results import Results, save_results, wrapped
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.evaluation import Curve, markdown_table, mean_and_std, tradeoff_figure

DOCS = Path(__file__).resolve().parents[3] / "docs"

FILES = {name: f"comparison-{name}.json" for name in ("results", "tuning", "timing")}
FIGURE = "comparison-tradeoff.png"

PAIRS = (
    ("Open-VCLIP", "CLIP"),
    ("Open-VCLIP", "FINE-TUNE"),
    ("Open-VCLIP", "FINE-TUNE, interpolated"),
    ("Open-VCLIP", "ViFi-CLIP"),
    ("Open-VCLIP", "ViFi-CLIP, interpolated"),
    ("Open-VCLIP", "bridge and prompt"),
    ("Open-VCLIP", "Vita-CLIP"),
    ("ViFi-CLIP + IWR + SWA", "Open-VCLIP"),
    ("ViFi-CLIP + IWR + SWA", "ViFi-CLIP"),
    ("ViFi-CLIP + IWR + SWA", "ViFi-CLIP, interpolated"),
    ("ViFi-CLIP", "FINE-TUNE"),
    ("ViFi-CLIP, image tower", "ViFi-CLIP"),
    ("ViFi-CLIP, text tower", "ViFi-CLIP"),
    ("bridge and prompt", "ViFi-CLIP"),
    ("Vita-CLIP", "ViFi-CLIP"),
    ("Vita-CLIP", "Vita-CLIP, text prompts"),
)
"""The pairs of rows that the page compares in words."""

DRAWN = (
    "CLIP",
    "FINE-TUNE, interpolated",
    "Open-VCLIP",
    "ViFi-CLIP, interpolated",
    "ViFi-CLIP + IWR + SWA",
    "ViFi-CLIP, image tower",
    "ViFi-CLIP, text tower",
    "bridge and prompt",
    "Vita-CLIP",
)
"""The rows of the figure."""


def page(results: Results, tuning: Results, timing: Results) -> str:
    """Return the whole page in Markdown."""
    comparison = Comparison(results)
    few_shots = [q for q in comparison.quantities if q.label.endswith("shots")]
    other_columns = [q for q in comparison.quantities if q not in few_shots]
    seeds = len(results["seeds"])
    sections = [
        HEADING,
        *map(wrapped, INTRODUCTION),
        COMMANDS,
        _missing(comparison),
        "## What each method learns",
        _what_learns(comparison, timing),
        about_times(timing),
        "## Closed set, zero-shot, base to novel",
        f"Top-1 accuracy in %, {over(seeds)}.",
        accuracy_table(comparison, other_columns),
        f"![Zero-shot over closed-set accuracy along λ](assets/{FIGURE})",
        "## Few shots",
        wrapped(SHOTS),
        accuracy_table(comparison, few_shots),
        "## What differs",
        rule(),
        *([best_rows(comparison), differences(comparison)] if seeds > 1 else []),
        "## Along λ",
        wrapped(
            "The table has a row for each interpolated method and each λ, the weight of CLIP. A "
            "cell is the mean accuracy in %; * marks the chosen λ."
        ),
        lambda_table(comparison),
        "## How it was done",
        protocol(results),
        _tuned(tuning),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _missing(comparison: Comparison) -> str:
    """Return a warning with the number of missing runs, or an empty text if none is missing."""
    seeds, names = (
        len(comparison.results["seeds"]),
        comparison.results["settings"]["sizes"]["methods"],
    )
    finished = sum(
        len(comparison.runs(name, setting)) for name in names for setting in comparison.settings
    )
    wanted = seeds * len(comparison.settings) * len(names)
    if finished == wanted:
        return ""
    return wrapped(
        f"**Not complete:** {finished} of {wanted} runs of {over(seeds).rpartition(' over ')[2]} "
        "are finished. If a mean is over fewer seeds, the number of seeds follows in parentheses."
    )


def accuracy_table(comparison: Comparison, columns: list[Quantity]) -> str:
    """Return the accuracies of all rows with results; interpolated rows are at the chosen λ."""
    seeds = len(comparison.results["seeds"])
    lines = []
    for row in ROWS:
        by_seed = [comparison.values(row, column) for column in columns]
        if any(by_seed):
            lines.append([row.label, *(_cell(values, seeds) for values in by_seed)])
    return markdown_table(["method", *(column.label for column in columns)], lines)


def _cell(values: dict[str, float], seeds: int) -> str:
    if not values:
        return ""
    count = "" if len(values) == seeds else f" ({len(values)})"
    return mean_and_std(list(values.values())) + count


def _what_learns(comparison: Comparison, timing: Results) -> str:
    lines = []
    for name in comparison.results["settings"]["sizes"]["methods"]:
        ratio, trained = step_ratio(timing, name), comparison.trained(name)
        count = "" if trained is None else " + ".join(f"{n:,}" for n in trained) or "0"
        time = "" if ratio is None else f"{ratio:.2f}"
        lines.append([name, describe(METHODS[name]), count, time])
    return markdown_table(["method", "trained parts", "parameters", "time of a step"], lines)


def best_rows(comparison: Comparison) -> str:
    """Return the row with the highest mean of each column, and the rows not clearly below it."""
    lines = []
    for quantity in comparison.quantities:
        means = {
            row: 100 * float(np.mean(list(values.values())))
            for row in ROWS
            if (values := comparison.values(row, quantity))
        }
        if not means:
            continue
        best = max(means, key=lambda row: means[row])
        near = [
            f"*{row.label}*"
            for row in means
            if row != best and not comparison.is_clear(best, row, quantity)
        ]
        unclear = f"The difference to these methods is not clear: {'; '.join(near)}"
        others = unclear if near else "All others are clearly lower"
        text = f"**{quantity.label}**: *{best.label}* has the highest mean, {means[best]:.1f}. "
        lines.append(wrapped(f"{text}{others}.", "- "))
    return "\n".join(lines)


def differences(comparison: Comparison) -> str:
    """Return a line for each of :data:`PAIRS`, with the columns in which the rows differ."""
    rows = {row.label: row for row in ROWS}
    lines = []
    for a, b in PAIRS:
        parts: dict[Verdict, list[str]] = {"holds": [], "opposite": [], "unclear": []}
        for quantity in comparison.quantities:
            difference = comparison.difference(rows[a], rows[b], quantity)
            if difference is not None:
                points = f"{100 * difference.mean:+.1f}".replace("-", "−")
                parts[difference.verdict].append(f"{quantity.label} {points}")
        words = {"holds": "Clearly higher", "opposite": "Clearly lower", "unclear": "Not clear"}
        texts = [f"{words[v]}: {', '.join(columns)}." for v, columns in parts.items() if columns]
        if texts:
            lines.append(wrapped(f"*{a}* compared with *{b}*. {' '.join(texts)}", "- "))
    return "\n".join(lines)


def lambda_table(comparison: Comparison) -> str:
    """Return the mean accuracies of the interpolated methods at each λ."""
    lines = []
    for method in (name for name, settings in METHODS.items() if settings.interpolated):
        row = Row(method, method, "chosen")
        for lam in comparison.results["settings"]["lambdas"]:
            cells = [_at(comparison, row, quantity, lam) for quantity in comparison.quantities]
            if any(cells):
                lines.append([method, f"{lam:g}", *cells])
    header = ["method", "λ", *(quantity.label for quantity in comparison.quantities)]
    return markdown_table(header, lines)


def _at(comparison: Comparison, row: Row, quantity: Quantity, lam: float) -> str:
    values = list(comparison.values(row, quantity, lam).values())
    if not values:
        return ""
    chosen = lam == comparison.chosen_lambda(row.method, quantity.setting)
    return f"{100 * float(np.mean(values)):.1f}{'*' if chosen else ''}"


def _tuned(tuning: Results) -> str:
    """Return the table of the learning rates that were tried, and the names of the files."""
    (tried,) = tuning["seeds"].values()
    best = best_rates(tuning)
    lines = []
    for family, results in tried.items():
        for rate, run in results.items():
            cells = [f"{100 * run['accuracy'][test]['0']:.1f}" for test in ("seen", "development")]
            mark = " *" if float(rate) == best[family] else ""
            lines.append([family, f"{rate}{mark}", *cells])
    steps = tuning["settings"]["sizes"]["tuning"]["steps"]
    text = (
        "The table has the learning rates that were tried, on clips of another seed. The accuracy "
        f"in % is that of the weights after {steps} steps of training on the seen shapes, without "
        "interpolation. * marks the chosen rate of a kind. The mean of its two accuracies is the "
        "highest."
    )
    header = ["kind", "learning rate", "seen shapes", "development shapes"]
    *first, last = (f"[`{name}`](assets/{name})" for name in FILES.values())
    files = f"The files {', '.join(first)} and {last} have all numbers."
    return "\n\n".join([wrapped(text), markdown_table(header, lines), wrapped(files)])


def draw(results: Results, path: Path) -> None:
    """Draw zero-shot over closed-set accuracy; an interpolated method is a curve along λ."""
    comparison = Comparison(results)
    closed, zero = (q for q in comparison.quantities if q.label in ("closed set", "zero-shot"))
    curves = []
    for row in (row for row in ROWS if row.label in DRAWN):
        if not comparison.values(row, closed):
            continue
        swept = row.end == "chosen"
        lams = results["settings"]["lambdas"] if swept else [0.0]
        at = [
            [comparison.values(row, q, lam if swept else None) for lam in lams]
            for q in (closed, zero)
        ]
        x, y = (np.array([list(values.values()) for values in axis]).T for axis in at)
        chosen = lams.index(comparison.chosen_lambda(row.method, closed.setting)) if swept else None
        label = row.method if swept else row.label
        curves.append(Curve(label, lams, x, y, chosen, row.label == "Open-VCLIP"))
    tradeoff_figure(
        curves,
        path,
        title=f"Shapes world, {over(len(results['seeds']))}; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on clips of seen shapes (%)",
        zero_shot_label="accuracy on clips of unseen shapes (%)",
    )


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the page, the figure, and the copies of the results."""
    parser = Parser(
        prog="python -m examples.shapes.report.comparison_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        type=Path,
        help="OUT/results.json; the command also reads tuning.json and timing.json beside it",
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page; default: docs")
    args = parser.parse_args(arguments)
    assets = args.docs / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    stems = [args.results.stem.replace("results", name) for name in FILES]
    contents = [
        json.loads(args.results.with_stem(stem).read_text(encoding="utf-8")) for stem in stems
    ]
    for name, content in zip(FILES.values(), contents, strict=True):
        save_results(content, assets / name)
    results, tuning, timing = contents
    draw(results, assets / FIGURE)
    with atomic_path(args.docs / "comparison.md") as partial:
        partial.write_text(page(results, tuning, timing), encoding="utf-8")
    print(f"wrote {args.docs / 'comparison.md'}")


if __name__ == "__main__":
    main()
