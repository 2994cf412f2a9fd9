"""Further tables of the page: the second pass, CLIP's own knowledge, λ without labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import Judged
from examples.shapes.trials.reading import MEAN, accuracies, lambda_of
from examples.shapes.trials.registry import METHODS, PAPER, REFERENCE, TRAININGS
from examples.shapes.trials.tables import common_lambdas, curves_of
from examples.shapes.trials.tasks import RULES, STILLS
from examples.shapes.trials.times import training_ratio
from examples.shapes.trials.wording import HEADS, difference, p_text, points, signed
from openvclip.evaluation import markdown_table, mean_and_std

__all__ = ["share_table", "share_text", "stills_table", "stills_text", "unlabelled_section"]


def share_table(results: Results, judged: Sequence[Judged]) -> str:
    """Return Open-VCLIP with less of its second pass, between plain fine-tuning and Open-VCLIP."""
    names = [PAPER, *(name for name in METHODS if METHODS[name].like == PAPER), REFERENCE]
    against = {
        (item.claim.method, item.claim.other): item
        for item in judged
        if item.claim.question == MEAN
    }
    rows = []
    for name in (name for name in names if name in results["chosen"]):
        passes, ratio = TRAININGS[METHODS[name].needs[0]].passes, training_ratio(results, name)
        means = [
            f"{100 * float(np.mean(list(accuracies(results, name, None, column).values()))):.1f}"
            for column in (*QUESTIONS, MEAN)
        ]
        cells = []
        for other in (PAPER, REFERENCE):
            item = against.get((name, other))
            cells += ["", ""] if item is None else [difference(item), p_text(item)]
        time = "" if ratio is None else f"{ratio:.2f}"
        rows.append([name, f"{passes - 1:g}", time, *means, *cells])
    header = ["method", "second passes in a step", "training time"]
    header += [HEADS[column] for column in (*QUESTIONS, MEAN)]
    return markdown_table([*header, f"mean − {PAPER}", "p", f"mean − {REFERENCE}", "p"], rows)


def share_text(judged: Sequence[Judged]) -> str:
    """Return which parts of the second pass are enough, by the verdicts."""
    of_parts = [
        item
        for item in judged
        if item.claim.question == MEAN
        and item.claim.method in METHODS
        and METHODS[item.claim.method].like == PAPER
    ]
    sentences = []
    for other, verdict, words in (
        (PAPER, "not clear", f"No clear difference from {PAPER}"),
        (PAPER, "lower", f"Clearly below {PAPER}"),
        (PAPER, "higher", f"Clearly above {PAPER}"),
        (REFERENCE, "higher", f"Clearly above {REFERENCE}"),
        (REFERENCE, "not clear", f"No clear difference from {REFERENCE}"),
        (REFERENCE, "lower", f"Clearly below {REFERENCE}"),
    ):
        names = [
            f"{item.claim.method.removeprefix(PAPER + ', ')} ({points(item.mean)})"
            for item in of_parts
            if item.claim.other == other and item.verdict == verdict
        ]
        if names:
            sentences.append(f"{words}: {', '.join(names)}.")
    for item in of_parts:
        if item.claim.other not in (PAPER, REFERENCE):
            names = [n.removeprefix(PAPER + ", ") for n in (item.claim.method, item.claim.other)]
            kind = (
                "no clear difference" if item.verdict == "not clear" else f"clearly {item.verdict}"
            )
            sentences.append(
                f"With as many clips in second passes, {names[0]} beside {names[1]}: {kind} "
                f"({points(item.mean)})."
            )
    whole = [
        item
        for item in judged
        if (item.claim.method, item.claim.other) == (PAPER, REFERENCE)
        and item.claim.question == MEAN
        and item.claim.other_lam is None
    ]
    if whole and whole[0].verdict != "higher":
        sentences.append(
            f"{PAPER} itself is not clearly above {REFERENCE} ({points(whole[0].mean)}). So these "
            "results can't show how small a part is enough: there is no gain to keep."
        )
    return " ".join(["In the mean of the three questions:", *sentences])


def stills_table(results: Results) -> str:
    """Return what is left of CLIP's knowledge along λ, for the methods of the figure, in %.

    The last column has the paired differences of Open-VCLIP and plain fine-tuning at the same λ.
    """
    names = curves_of(results)
    lams = sorted({lam for name in names for lam in common_lambdas(results, name)})
    rows = []
    for lam in lams:
        columns = {name: accuracies(results, name, lam, STILLS) for name in names}
        cells = [mean_and_std(column.values()) if column else "" for column in columns.values()]
        first, second = columns.get(PAPER, {}), columns.get(REFERENCE, {})
        apart = [first[number] - second[number] for number in first if number in second]
        rows.append([f"{lam:g}", *cells, signed(apart) if apart else ""])
    clip = accuracies(results, "CLIP", None, STILLS)
    if clip:
        rows.append(["1 (CLIP)", *[mean_and_std(clip.values())] * len(names), ""])
    return markdown_table(["λ", *names, f"{PAPER} − {REFERENCE}"], rows)


def stills_text(results: Results) -> str:
    """Return which methods, at their chosen λ, keep most and least of CLIP's knowledge."""
    means = {
        name: 100 * float(np.mean(list(values.values())))
        for name in results["chosen"]
        if name != "CLIP" and (values := accuracies(results, name, None, STILLS))
    }
    order = sorted(means, key=lambda name: -means[name])

    def listed(names: Sequence[str]) -> str:
        return ", ".join(
            f"{name} {means[name]:.1f} % (λ = {lambda_of(results, name, None):g})" for name in names
        )

    return (
        f"At the chosen settings, most is left with {listed(order[:3])}. Least is left with "
        f"{listed(order[-3:][::-1])}. λ was chosen on the three questions alone, without stills."
    )


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
    header = ["method", "clips without labels", "accuracy at the chosen λ"]
    for rule in RULES:
        header += [f"mean λ of {rule}", f"accuracy at λ of {rule}"]
    return markdown_table(header, rows)
