"""Write the page "Which method when" from the results.

All words about accuracy are made from the verdicts, so they follow the results. The other words,
about what a method needs and costs, are those of the method's entry in the table of methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.advice_words import PLACES, of_interpolation, of_pair, verdict_words
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import Judged, Verdict
from examples.shapes.trials.grid import at_edges
from examples.shapes.trials.reading import MEAN, accuracies, lambda_of
from examples.shapes.trials.registry import METHODS, REFERENCE, Method
from examples.shapes.trials.times import training_ratio
from examples.shapes.trials.verdicts import powers
from examples.shapes.trials.wording import cells_text, points, wrapped_page
from openvclip.evaluation import markdown_table

__all__ = ["advice_page"]

MARKS: dict[Verdict, str] = {
    "higher": "▲\N{NO-BREAK SPACE}",
    "lower": "▼\N{NO-BREAK SPACE}",
    "not clear": "",
}

INTRODUCTION = (
    "This page says for each method what it needs and costs, what it brought in [the shapes "
    "world](shapes.md), and when to take it or not. The shapes world is a small world of drawn "
    "clips, with a CLIP of 0.6 million parameters. The results hold for this world. On your "
    "videos, compare two or three methods on held-out classes of your own.",
    "The settings were chosen in [one tuning run](shapes.md#how-the-settings-were-chosen) with "
    "the same limits for all methods. Methods that share a training share its settings. A "
    "difference of a point or two between two methods can come from the luck of this choice. "
    "*Clear* means: in the cells of that page, at these settings, after the correction for all "
    "claims.",
    "Each model is asked three questions, each with clips of its own: the trained classes, unseen "
    "shapes, and unseen shapes in unseen actions. A cell is a division of six actions into three "
    "trained and three unseen actions, with a seed. {cells}",
)

GROUPS = (
    ("at most 1.15 times the training of FINE-TUNE", 0.0, 1.15),
    ("1.15 to 2.2 times the training of FINE-TUNE", 1.15, 2.2),
    ("more than 2.2 times the training of FINE-TUNE", 2.2, float("inf")),
)
"""Costs by training time relative to plain fine-tuning: words, above, up to."""


def advice_page(results: Results, judged: Sequence[Judged]) -> str:
    """Return the page in Markdown.

    Args:
        results: the complete cells.
        judged: the claims with their verdicts.
    """
    parts = [
        "<!-- Written by `python -m examples.shapes.trials.page`; its words are in "
        "examples/shapes/trials/. -->",
        "# Which method when",
        *(text.format(cells=cells_text(results)) for text in INTRODUCTION),
        "## In short",
        _short(results, judged),
        "## All methods in one table",
        *_overview(results, judged),
    ]
    for name in results["chosen"]:
        if name in METHODS:
            parts.append(f"## {name}")
            parts.append("\n".join(_advice(results, METHODS[name], judged)))
    return wrapped_page("\n\n".join(part for part in parts if part))


# --- in short -------------------------------------------------------------------------------------


def _short(results: Results, judged: Sequence[Judged]) -> str:
    """Return a list: interpolate or not, and the methods by their training time."""
    lines = of_interpolation(results, judged)
    overall = {
        item.claim.method: item
        for item in judged
        if _is_against_reference(item) and item.claim.question == MEAN
    }
    above_reference = [item for item in overall.values() if item.verdict == "higher"]
    found = _by_verdict(above_reference) or f"no method is clearly above {REFERENCE}"
    lines.append(f"**Which method?** In {PLACES[MEAN]}: {found}.")
    for words, above, limit in GROUPS:
        names = [
            name
            for name in overall
            if (ratio := training_ratio(results, name)) is not None and above < ratio <= limit
        ]
        if names:
            text = _by_verdict([overall[name] for name in names])
            lines.append(f"**For {words}**, {PLACES[MEAN]}: {text}.")
    for question in QUESTIONS:
        items = [i for i in judged if _is_against_reference(i) and i.claim.question == question]
        text = _by_verdict([item for item in items if item.verdict != "not clear"])
        lines.append(f"**On {PLACES[question]}**: {text or 'no method differs clearly'}.")
    return "\n".join(f"- {line}" for line in lines)


def _by_verdict(items: Sequence[Judged]) -> str:
    """Return names of methods by their verdict, those with the largest differences first."""
    kinds = {
        "higher": "clearly above",
        "not clear": "no clear difference",
        "lower": "clearly below",
    }
    texts = []
    for verdict, words in kinds.items():
        of_kind = [item for item in items if item.verdict == verdict]
        of_kind.sort(key=lambda item: -abs(item.mean))
        if of_kind:
            names = ", ".join(f"{item.claim.method} ({points(item.mean)})" for item in of_kind)
            if verdict == "not clear" and len(of_kind) > 3:
                low, high = (f(of_kind, key=lambda item: item.mean) for f in (min, max))
                ends = (f"{points(item.mean)} ({item.claim.method})" for item in (low, high))
                names = f"{len(of_kind)} methods, from {' to '.join(ends)}"
            texts.append(
                f"{words} for {names}"
                if verdict == "not clear"
                else f"{words} {REFERENCE}: {names}"
            )
    return "; ".join(texts)


def _overview(results: Results, judged: Sequence[Judged]) -> list[str]:
    """Return the words about the table of all methods, and the table."""
    found = powers(results, judged)
    unseen = ""
    if found and found[0].smallest > 1:
        unseen = " With so few cells, hardly any difference can be called clear."
    elif found:
        unseen = (
            f" For half of the claims on the mean, a true difference of {found[0].smallest_text} "
            "points is called clear nine times in ten. The differences of the other methods vary "
            "more over the cells, so larger differences can stay without a mark: for one claim in "
            f"ten, it takes {found[1].smallest_text} points or more. So *no clear difference* does "
            "not mean that there is none."
        )
    words = (
        f"Differences from {REFERENCE} at its chosen λ, in points of accuracy, means over the "
        "cells. ▲ is clearly above, ▼ is clearly below, after the correction for all claims; "
        "without a mark, there is no clear difference. An empty place was not tested. *Stills* is "
        "what is left of CLIP's own knowledge, in %. *Training time* is relative to "
        f"{REFERENCE}, whose training also computes the three averages.{unseen}"
    )
    rows = []
    for name in results["chosen"]:
        of_method = {
            item.claim.question: item
            for item in judged
            if item.claim.method == name and _is_against_reference(item)
        }
        cells_of_row = [
            f"{MARKS[item.verdict]}{points(item.mean)}" if (item := of_method.get(o)) else ""
            for o in (MEAN, *QUESTIONS)
        ]
        ratio = training_ratio(results, name)
        stills = list(accuracies(results, name, None, "stills").values())
        rows.append(
            [
                f"[{name}](#{_anchor(name)})" if name in METHODS else name,
                f"{lambda_of(results, name, None):g}",
                "" if ratio is None else f"{ratio:.2f}",
                *cells_of_row,
                f"{100 * float(np.mean(stills)):.0f}" if stills else "",
            ]
        )
    header = ["method", "λ", "training time", "mean", *(PLACES[q] for q in QUESTIONS), "stills"]
    return [words, "<!-- table: overview -->\n" + markdown_table(header, rows)]


def _anchor(name: str) -> str:
    """Return the anchor of a heading, as Python-Markdown makes it."""
    kept = "".join(c for c in name.lower() if c.isalnum() or c in " -_")
    return "-".join(kept.replace("-", " ").split())


# --- a method -------------------------------------------------------------------------------------


def _is_against_reference(item: Judged) -> bool:
    claim = item.claim
    return claim.other == REFERENCE and claim.other_lam is None and claim.method != REFERENCE


def _advice(results: Results, method: Method, judged: Sequence[Judged]) -> list[str]:
    name = method.name
    lines = [f"It {method.does}."] if method.does else []
    if method.how:
        lines.append(f"**In code:** {method.how}.")
    if method.cost:
        ratio = None if name == REFERENCE else training_ratio(results, name)
        time = "" if ratio is None else f"; measured: {ratio:.2f} times the training of {REFERENCE}"
        if ratio is not None and ratio < 1:
            time += ", which also computes three averages"
        if name != REFERENCE and method.needs == METHODS[REFERENCE].needs:
            time = f"; the training is that of {REFERENCE}"
        lines.append(f"**Costs:** {method.cost}{time}.")
    against = [item for item in judged if item.claim.method == name and _is_against_reference(item)]
    against.sort(key=lambda item: item.claim.question != MEAN)
    if against:
        lines.append(f"**Result here:** {verdict_words(against, REFERENCE)}.")
    lines += _comparisons(results, name, judged)
    stills = list(accuracies(results, name, None, "stills").values())
    if stills:
        lam = f" (λ = {lambda_of(results, name, None):g})" if method.needs else ""
        lines.append(
            f"**CLIP's own knowledge:** {100 * float(np.mean(stills)):.0f} % of the held-out "
            f"stills are right{lam}."
        )
    edges = at_edges(results, name)
    if edges:
        lines.append(
            f"**At an edge:** the chosen {', '.join(edges)}, of the settings that were tried. A "
            "better setting may lie beyond."
        )
    pro, contra = _reasons(results, name, against, judged)
    lines.append(_sentences("**Take it**", method.when, pro))
    lines.append(_sentences("**Don't take it**", method.beware, contra))
    return [f"- {line}" for line in lines if line]


def _sentences(head: str, needs: str, accuracy: str) -> str:
    if not needs and not accuracy:
        return ""
    return " ".join(part for part in (head, f"{needs}." if needs else "", accuracy) if part)


def _comparisons(results: Results, name: str, judged: Sequence[Judged]) -> list[str]:
    """Return the comparisons of a method with other methods than the reference."""
    lines = []
    if name == REFERENCE:
        chosen = lambda_of(results, REFERENCE, None)
        rows = [(chosen, REFERENCE, "λ = 0"), (chosen, "CLIP", "CLIP"), (0.0, "CLIP", "CLIP")]
        for lam, other, words in dict.fromkeys(rows):
            items = of_pair(
                results, judged, REFERENCE, lam, other, 0.0 if other == REFERENCE else None
            )
            if items:
                lines.append(f"**λ = {lam:g} beside {words}:** {verdict_words(items)}.")
        return lines
    for other in results["chosen"]:
        items = [] if other == REFERENCE else of_pair(results, judged, name, None, other, None)
        if items:
            lines.append(f"**Beside {other}:** {verdict_words(items)}.")
    return lines


def _reasons(
    results: Results, name: str, against: Sequence[Judged], judged: Sequence[Judged]
) -> tuple[str, str]:
    """Return what the accuracy says for a method, and what it says against the method."""
    if name == "CLIP":
        items = of_pair(results, judged, REFERENCE, None, "CLIP", None)
        lam = f"FINE-TUNE at λ = {lambda_of(results, REFERENCE, None):g}" if items else ""
        lower, higher = _places(items, "lower"), _places(items, "higher")
        return (
            f"CLIP is clearly above {lam} on {lower}." if lower else "",
            f"{lam} is clearly above CLIP on {higher}." if higher else "",
        )
    if name == REFERENCE:
        items = of_pair(results, judged, REFERENCE, None, REFERENCE, 0.0)
        lam = f"λ = {lambda_of(results, REFERENCE, None):g}"
        lower, higher = _places(items, "lower"), _places(items, "higher")
        pro = f"Interpolate: {lam} is clearly above λ = 0 on {higher}." if higher else ""
        contra = f"Interpolation costs accuracy: {lam} is clearly below λ = 0 on {lower}."
        return pro, contra if lower else ""
    if not against:
        return "", ""
    overall = next((item.verdict for item in against if item.claim.question == MEAN), "not clear")
    questions = [item for item in against if item.claim.question != MEAN]
    lower, higher = _places(questions, "lower"), _places(questions, "higher")
    pro, contra = "", ""
    if overall == "higher":
        pro = f"Accuracy is a reason: it is clearly above {REFERENCE} in {PLACES[MEAN]}"
        pro += f", and on {higher}." if higher else "."
    elif higher:
        pro = f"Accuracy on {higher} is a reason: it is clearly above {REFERENCE} there."
    elif overall == "not clear":
        pro = f"Accuracy is no reason: a gain over {REFERENCE} was not shown here."
    pro += _as_good_as_control(results, name, against, judged)
    below = f"it is clearly below {REFERENCE}"
    if overall == "lower":
        contra = f"Accuracy is a reason against it: {below} in {PLACES[MEAN]}"
        contra += f", and on {lower}." if lower else "."
    elif lower:
        contra = f"Accuracy on {lower} is a reason against it: {below} there."
    return pro, contra


def _as_good_as_control(
    results: Results, name: str, against: Sequence[Judged], judged: Sequence[Judged]
) -> str:
    """Return on which of its clear gains a method is not clearly above its control."""
    control = next((n for n, m in METHODS.items() if m.control and m.like == name), "")
    gains = {item.claim.question for item in against if item.verdict == "higher"}
    names = [
        PLACES[item.claim.question]
        for item in of_pair(results, judged, name, None, control, None)
        if item.claim.question in gains and item.verdict != "higher"
    ]
    places = ", and on ".join(names)
    return f' On {places}, it is not clearly above the row "{control}".' if names else ""


def _places(items: Sequence[Judged], verdict: Verdict) -> str:
    """Return the questions with a verdict, such as ``"trained classes, and on unseen shapes"``."""
    names = [PLACES[item.claim.question] for item in items if item.verdict == verdict]
    return ", and on ".join(names) if len(names) < len(QUESTIONS) else "all three questions"
