"""Write the page "Which method when" from the results.

The words about accuracy are made from the verdicts, so they follow the results. The other words,
about what a method needs and costs, are those of the method's entry in the table of methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.shapes.results import Results, wrapped
from examples.shapes.trials.claims import PAPER, REFERENCE, Judged, accuracies, lambda_of
from examples.shapes.trials.registry import METHODS, Method

__all__ = ["advice_page", "verdict_words"]

QUESTION_WORDS = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
}

INTRODUCTION = (
    "For each method, this page says what it does, what it costs, and when to take it or not. "
    "The results are those of [the shapes world](shapes.md), a small world of drawn clips and a "
    "CLIP of 0.6 million parameters. They hold for this world; on your videos, choose among the "
    "methods on held-out classes of your own.",
    "*Result here* compares a method with plain fine-tuning at its best λ (FINE-TUNE) by the "
    "verdicts of the shapes world. *Clearly* means: after the correction for all claims of that "
    "page.",
)


def advice_page(results: Results, judged: Sequence[Judged]) -> str:
    """Return the page in Markdown."""
    parts = [
        "<!-- Written by `python -m examples.shapes.trials.page`; its words are in "
        "examples/shapes/trials/. -->",
        "# Which method when",
        *map(wrapped, INTRODUCTION),
        _short(results, judged),
    ]
    for name in results["chosen"]:
        if name in METHODS:
            parts.append(f"## {name}")
            parts.append("\n".join(_advice(results, METHODS[name], judged)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _short(results: Results, judged: Sequence[Judged]) -> str:
    """Return one line for each question: the methods that are clearly above the reference."""
    lines = []
    for question, words in QUESTION_WORDS.items():
        above = [
            item.claim.method
            for item in judged
            if item.claim.question == question
            and item.verdict == "higher"
            and _is_against_reference(item)
        ]
        text = ", ".join(above) or "no method"
        lines.append(wrapped(f"**{words}**: clearly above FINE-TUNE at its best λ: {text}.", "- "))
    return "\n".join(lines)


def _is_against_reference(item: Judged) -> bool:
    return item.claim.other == REFERENCE and item.claim.other_lam is None


def _advice(results: Results, method: Method, judged: Sequence[Judged]) -> list[str]:
    lines = [f"It {method.does}."] if method.does else []
    if method.cost:
        lines.append(f"**Costs:** {method.cost}.")
    own = [item for item in judged if item.claim.method == method.name]
    against = [item for item in own if _is_against_reference(item)]
    if against:
        lines.append(f"**Result here:** {verdict_words(against, REFERENCE)}.")
    paper = [item for item in own if item.claim.other == PAPER]
    if paper:
        lines.append(f"**Beside {PAPER}:** {verdict_words(paper, PAPER)}.")
    stills = list(accuracies(results, method.name, None, "stills").values())
    if stills:
        lam = f" (λ = {lambda_of(results, method.name, None):g})" if method.needs else ""
        lines.append(
            f"**CLIP's own knowledge:** {100 * float(np.mean(stills)):.0f} % of the held-out "
            f"stills are still right{lam}."
        )
    if method.when:
        lines.append(f"**Take it** {_if_worth(method.when, against)}.")
    if method.beware:
        lines.append(f"**Don't take it** {method.beware}.")
    return [wrapped(line, "- ") for line in lines]


def _if_worth(when: str, against: Sequence[Judged]) -> str:
    """Return when to take a method, with a warning if the results speak against it."""
    verdicts = {item.verdict for item in against}
    if "higher" in verdicts or not against:
        return when
    if "lower" in verdicts:
        return f"only {when}: here it is clearly lower and nowhere clearly higher"
    return f"{when}; a gain over FINE-TUNE was not shown here"


def verdict_words(items: Sequence[Judged], other: str) -> str:
    """Return the verdicts in words, such as ``"clearly higher than X on ... (+1.2 points)"``."""
    texts = []
    kinds = {
        "higher": "clearly higher",
        "lower": "clearly lower",
        "not clear": "no clear difference",
    }
    for verdict, words in kinds.items():
        of_kind = [item for item in items if item.verdict == verdict]
        if of_kind:
            preposition = "from" if verdict == "not clear" else "than"
            places = ", ".join(
                f"{QUESTION_WORDS[item.claim.question]} "
                f"({round(100 * item.mean, 1) + 0.0:+.1f})".replace("-", "−")
                for item in of_kind
            )
            texts.append(f"{words} {preposition} {other} on {places}")
    return "; ".join(texts)
