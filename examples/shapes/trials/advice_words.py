"""What λ brings to plain fine-tuning, and verdicts in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import Judged
from examples.shapes.trials.reading import MEAN, OUTCOMES, accuracies, lambda_of
from examples.shapes.trials.registry import CURVE, REFERENCE
from examples.shapes.trials.tasks import STILLS
from examples.shapes.trials.tuning import best, score
from examples.shapes.trials.wording import points

__all__ = ["PLACES", "of_interpolation", "of_pair", "verdict_words"]

PLACES = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
    MEAN: "the mean of the three questions",
}
"""The questions, in sentences."""


def of_interpolation(results: Results, judged: Sequence[Judged]) -> list[str]:
    """Return what interpolation does to plain fine-tuning."""
    if REFERENCE not in results["chosen"]:
        return []
    lam = lambda_of(results, REFERENCE, None)
    lines = []
    items = of_pair(results, judged, REFERENCE, None, REFERENCE, 0.0)
    if lam == 0:
        lines.append(
            "**Interpolate a fine-tuned model with CLIP?** On the development classes, no λ above "
            f"0 was better for {REFERENCE} with the settings that it shares with other methods."
            f"{_elsewhere(results)}{_along(results)} [All accuracies along λ](shapes.md#along)."
        )
    if items:
        lines.append(
            f"**Interpolate a fine-tuned model with CLIP?** {REFERENCE} at λ = {lam:g} beside "
            f"λ = 0: {verdict_words(items)}."
        )
    items = of_pair(results, judged, REFERENCE, 0.0, "CLIP", None)
    if items:
        words = verdict_words(items)
        lines.append(f"**Fine-tuning without interpolation** (λ = 0) beside CLIP: {words}.")
    return lines


def _elsewhere(results: Results) -> str:
    """Return the settings of plain fine-tuning for which a λ above 0 brought most."""
    gains = []
    entries = results["tuning"]["methods"].get(REFERENCE, {}).values()
    for entry in entries:
        top = best(entry["points"])
        start = next((point for point in entry["points"] if point["lam"] == 0), top)
        gains.append((score(top) - score(start), score(start), entry["settings"], top["lam"]))
    gain, start_score, settings, lam = max(gains, key=lambda each: each[0], default=(0, 0, {}, 0))
    if gain <= 0:
        return ""
    words = ", ".join(f"{name} = {value:g}" for name, value in settings.items())
    is_best = start_score + gain >= max(score(best(entry["points"])) for entry in entries)
    most = f", the best of all points of {REFERENCE}" if is_best else ""
    return (
        f" With {words}, λ = {lam:g} was: {100 * (start_score + gain):.1f} % in place of "
        f"{100 * start_score:.1f} %{most} ([all settings](shapes.md#how-the-settings-were-chosen))."
    )


def _along(results: Results) -> str:
    """Return the accuracies of plain fine-tuning at λ = 0 and at the λ between it and CLIP."""
    texts = []
    for column, words in (*((q, PLACES[q]) for q in QUESTIONS), (STILLS, "stills")):
        ends = [accuracies(results, REFERENCE, lam, column).values() for lam in (0.0, CURVE[1])]
        if not all(ends):
            return ""
        before, after = (100 * float(np.mean(list(end))) for end in ends)
        texts.append(f"{words} {before:.1f} and {after:.1f}")
    return f" At λ = 0 and λ = {CURVE[1]:g}, in %, not tested: {', '.join(texts)}."


def of_pair(
    results: Results,
    judged: Sequence[Judged],
    method: str,
    lam: float | None,
    other: str,
    other_lam: float | None,
) -> list[Judged]:
    """Return the claims about two rows. The chosen λ can be given as ``None`` or as its value."""

    def row(name: str, lam: float | None) -> tuple[str, float]:
        return name, lambda_of(results, name, lam)

    return [
        item
        for item in judged
        if (item.claim.method, item.claim.other) == (method, other)
        and row(method, item.claim.lam) == row(method, lam)
        and row(other, item.claim.other_lam) == row(other, other_lam)
    ]


def verdict_words(items: Sequence[Judged], other: str = "") -> str:
    """Return the verdicts in words, such as ``"clearly higher than X on ... (+1.2)"``."""
    texts = []
    kinds = {
        "higher": "clearly higher",
        "lower": "clearly lower",
        "not clear": "no clear difference",
    }
    for verdict, words in kinds.items():
        of_kind = [item for item in items if item.verdict == verdict]
        if of_kind:
            than = ("from " if verdict == "not clear" else "than ") + f"{other} " if other else ""
            places = ", ".join(
                f"{PLACES[item.claim.question]} ({points(item.mean)})" for item in of_kind
            )
            texts.append(f"{words} {than}on {places}")
    return "; ".join(texts)


assert set(PLACES) == set(OUTCOMES)
