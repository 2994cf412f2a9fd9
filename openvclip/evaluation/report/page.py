"""The HTML of a page about evaluations; its script fills the parts that depend on λ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from openvclip.commands.pages import PAGE_STYLE, page_head

__all__ = ["page_parts"]

_SCRIPTS = ("base.js", "tables.js", "figures.js", "page.js")  # page.js draws the page


def page_parts(title: str, numbers: Mapping[str, Any], library: str) -> Iterator[str]:
    """Yield the HTML of a page in pieces.

    Args:
        title: the title.
        numbers: the result of :func:`openvclip.evaluation.report.numbers.numbers_of`.
        library: the script of Vega-Lite.
    """
    script, style, body = _script(), _file("page.css"), _file("page.html")
    yield page_head(title, PAGE_STYLE + style, [library, script])
    parts = {
        "title": escape(title),
        "table": _all_accuracies(numbers),
        "facts": _facts(numbers),
    }
    yield re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], body)
    # "<" would let a name end the element.
    text = json.dumps(numbers, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="numbers">{text}</script>\n'
    yield f"<script>{library}</script>\n<script>{script}</script>\n</body>\n</html>\n"


def _script() -> str:
    """Return the script of the page: one function, which keeps its names apart from Vega's."""
    parts = "\n".join(map(_file, _SCRIPTS))
    return f'(function () {{\n"use strict";\n{parts}}})();'


def _file(name: str) -> str:
    return (files("openvclip.evaluation.report") / name).read_text(encoding="utf-8")


def _all_accuracies(numbers: Mapping[str, Any]) -> str:
    """Return a table of all accuracies, which needs no script."""
    heads = ("Model", "Test", "λ", "Top-1", "Top-5")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = []
    for number, run in enumerate(numbers["runs"]):
        model, test = numbers["models"][run["model"]], numbers["tests"][run["test"]]
        for i, lam in enumerate(run["lams"]):
            cells = [
                f'<th scope="row">{escape(model)}</th>',
                f"<td>{escape(test)}</td>",
                f"<td>{'–' if lam is None else f'{lam:g}'}</td>",
                *(f"<td>{_percent(run, k, i)}</td>" for k in ("top1", "top5")),
            ]
            rows.append(f'<tr data-run="{number}" data-lam="{i}">{"".join(cells)}</tr>')
    several = any(len(run["splits"]) > 1 for run in numbers["runs"])
    spread = ", mean ± standard deviation over the splits" if several else ""
    return (
        '<table id="all"><caption>Accuracy in % of each model on each test'
        f"{spread}. λ weighs the original CLIP.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _percent(run: Mapping[str, Any], k: str, i: int) -> str:
    mean, std = run[k][i], run[f"{k}_std"][i]
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"


def _facts(numbers: Mapping[str, Any]) -> str:
    """Return what was evaluated, as the elements of a list of terms."""
    facts = []
    for run in numbers["runs"]:
        model, test = numbers["models"][run["model"]], numbers["tests"][run["test"]]
        words = [_count(run["clips"], "clip"), _count(len(run["splits"]), "split")]
        if run["unreadable"]:
            where = " in the tests of the folder" if run["several_tests"] else ""
            treated = "left out" if run["left_out"] else "counted as wrong"
            words.append(f"{_count(run['unreadable'], 'unreadable video')}{where}, {treated}")
        words.append(f"folder {run['folder']}")
        facts.append((f"{model} on {test}", "; ".join(words)))
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
