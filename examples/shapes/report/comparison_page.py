"""The page of the comparison, all of it from its results.

``python -m examples.shapes.report.comparison_page OUT/results.json`` reads that file and, beside
it, ``tuning.json`` and ``timing.json``. It writes ``docs/comparison.md`` with its figure and copies
of the three. Results that are not complete make a page as well, which says what is missing.
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
    """The whole page in Markdown."""
    found = Comparison(results)
    few = [q for q in found.quantities if q.label.endswith("shots")]
    rest = [q for q in found.quantities if q not in few]
    seeds = len(results["seeds"])
    sections = [
        HEADING,
        *map(wrapped, INTRODUCTION),
        COMMANDS,
        _missing(found),
        "## What each method learns",
        _what_learns(found, timing),
        about_times(timing),
        "## Closed set, zero-shot, base to novel",
        f"Top-1 accuracy in %, {over(seeds)}.",
        accuracy_table(found, rest),
        f"![Zero-shot over closed-set accuracy along λ](assets/{FIGURE})",
        "## Few shots",
        wrapped(SHOTS),
        accuracy_table(found, few),
        "## What differs",
        rule(),
        *([best_rows(found), differences(found)] if seeds > 1 else []),
        "## Along λ",
        wrapped(
            "Means of the methods that are interpolated, at each weight λ of CLIP that was tried; "
            "* marks the chosen one."
        ),
        lambda_table(found),
        "## How it was done",
        protocol(results),
        _tuned(tuning),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _missing(found: Comparison) -> str:
    """A warning that says how much is not there yet, empty where nothing is missing."""
    seeds, names = len(found.results["seeds"]), found.results["settings"]["sizes"]["methods"]
    there = sum(len(found.runs(name, setting)) for name in names for setting in found.settings)
    wanted = seeds * len(found.settings) * len(names)
    if there == wanted:
        return ""
    return wrapped(
        f"**Not complete:** {there} of {wanted} runs of {over(seeds).rpartition(' over ')[2]} are "
        "in. Numbers of fewer seeds have their count behind them."
    )


def accuracy_table(found: Comparison, columns: list[Quantity]) -> str:
    """Accuracies of all rows that have results; of interpolated ones at the chosen λ."""
    seeds = len(found.results["seeds"])
    lines = []
    for row in ROWS:
        by_seed = [found.values(row, column) for column in columns]
        if any(by_seed):
            lines.append([row.label, *(_cell(values, seeds) for values in by_seed)])
    return markdown_table(["method", *(column.label for column in columns)], lines)


def _cell(values: dict[str, float], seeds: int) -> str:
    if not values:
        return ""
    count = "" if len(values) == seeds else f" ({len(values)})"
    return mean_and_std(list(values.values())) + count


def _what_learns(found: Comparison, timing: Results) -> str:
    lines = []
    for name in found.results["settings"]["sizes"]["methods"]:
        ratio, trained = step_ratio(timing, name), found.trained(name)
        count = "" if trained is None else " + ".join(f"{n:,}" for n in trained) or "0"
        time = "" if ratio is None else f"{ratio:.2f}"
        lines.append([name, describe(METHODS[name]), count, time])
    return markdown_table(["method", "what learns", "parameters", "time of a step"], lines)


def best_rows(found: Comparison) -> str:
    """For each column the row with the highest mean, and the rows not clearly below it."""
    lines = []
    for quantity in found.quantities:
        means = {
            row: 100 * float(np.mean(list(values.values())))
            for row in ROWS
            if (values := found.values(row, quantity))
        }
        if not means:
            continue
        best = max(means, key=lambda row: means[row])
        near = [
            f"*{row.label}*"
            for row in means
            if row != best and not found.is_clear(best, row, quantity)
        ]
        text = f"**{quantity.label}**: the highest mean is *{best.label}*'s, {means[best]:.1f}; "
        text += (
            f"not clearly below it: {', '.join(near)}." if near else "all others are clearly below."
        )
        lines.append(wrapped(text, "- "))
    return "\n".join(lines)


def differences(found: Comparison) -> str:
    """A line for each of :data:`PAIRS`: where the first is clearly above or below the second."""
    rows = {row.label: row for row in ROWS}
    lines = []
    for a, b in PAIRS:
        parts: dict[Verdict, list[str]] = {"holds": [], "opposite": [], "unclear": []}
        for quantity in found.quantities:
            difference = found.difference(rows[a], rows[b], quantity)
            if difference is not None:
                points = f"{100 * difference.mean:+.1f}".replace("-", "−")
                parts[difference.verdict].append(f"{quantity.label} {points}")
        words = {"holds": "clearly more", "opposite": "clearly less"}
        words["unclear"] = "no clear difference"
        said = [f"{words[verdict]}: {', '.join(some)}" for verdict, some in parts.items() if some]
        if said:
            lines.append(wrapped(f"*{a}* against *{b}*: {'; '.join(said)}.", "- "))
    return "\n".join(lines)


def lambda_table(found: Comparison) -> str:
    """Means at every λ of the methods that are interpolated."""
    lines = []
    for method in (name for name, one in METHODS.items() if one.interpolated):
        row = Row(method, method, "chosen")
        for lam in found.results["settings"]["lambdas"]:
            cells = [_at(found, row, quantity, lam) for quantity in found.quantities]
            if any(cells):
                lines.append([method, f"{lam:g}", *cells])
    header = ["method", "λ", *(quantity.label for quantity in found.quantities)]
    return markdown_table(header, lines)


def _at(found: Comparison, row: Row, quantity: Quantity, lam: float) -> str:
    values = list(found.values(row, quantity, lam).values())
    if not values:
        return ""
    chosen = lam == found.chosen_lambda(row.method, quantity.setting)
    return f"{100 * float(np.mean(values)):.1f}{'*' if chosen else ''}"


def _tuned(tuning: Results) -> str:
    """The learning rates that were tried."""
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
        f"The learning rates that were tried, on clips of another seed: accuracy in % after {steps}"
        " steps on the seen shapes, without interpolation. * marks the highest mean of the two "
        "columns, which is taken."
    )
    header = ["kind", "learning rate", "seen shapes", "development shapes"]
    *first, last = (f"[`{name}`](assets/{name})" for name in FILES.values())
    files = f"All numbers are in {', '.join(first)} and {last}."
    return "\n\n".join([wrapped(text), markdown_table(header, lines), wrapped(files)])


def draw(results: Results, path: Path) -> None:
    """Zero-shot over closed-set accuracy, curves along λ where a method is interpolated."""
    found = Comparison(results)
    closed, zero = (q for q in found.quantities if q.label in ("closed set", "zero-shot"))
    curves = []
    for row in (row for row in ROWS if row.label in DRAWN):
        if not found.values(row, closed):
            continue
        swept = row.end == "chosen"
        lams = results["settings"]["lambdas"] if swept else [0.0]
        at = [
            [found.values(row, q, lam if swept else None) for lam in lams] for q in (closed, zero)
        ]
        x, y = (np.array([list(values.values()) for values in one]).T for one in at)
        chosen = lams.index(found.chosen_lambda(row.method, closed.setting)) if swept else None
        label = row.method if swept else row.label
        curves.append(Curve(label, lams, x, y, chosen, row.label == "Open-VCLIP"))
    tradeoff_figure(
        curves,
        path,
        title=f"Shapes world, {over(len(results['seeds']))}; numbers are λ, stars the chosen λ",
        closed_set_label="accuracy on clips of seen shapes (%)",
        zero_shot_label="accuracy on clips of unseen shapes (%)",
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the page, its figure and the copies of the results."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes.report.comparison_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="OUT/results.json; its siblings are read too")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    args = parser.parse_args(arguments)
    assets = args.docs / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    found = [json.loads(args.results.with_stem(name).read_text()) for name in FILES]
    for name, content in zip(FILES.values(), found, strict=True):
        save_results(content, assets / name)
    results, tuning, timing = found
    draw(results, assets / FIGURE)
    with atomic_path(args.docs / "comparison.md") as partial:
        partial.write_text(page(results, tuning, timing))
    print(f"wrote {args.docs / 'comparison.md'}")


if __name__ == "__main__":
    main()
