"""The settings that were tried for each method, and the chosen settings at an edge."""

from __future__ import annotations

import math
from typing import Any

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.registry import METHODS, REFERENCE
from examples.shapes.trials.tuning import best, score
from examples.shapes.trials.wording import HEADS
from openvclip.evaluation import markdown_table

__all__ = ["alone_text", "at_edges", "edges_text", "grid_table", "luck_text"]


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


def at_edges(results: Results, name: str) -> list[str]:
    """Return the chosen numbers of a method that are the smallest or the largest that were tried.

    A better number may lie beyond such an edge. Numbers of which one value was tried have no edge,
    and nothing lies beyond 0. The settings of a training that were chosen for another method
    belong to the other method.

    Returns:
        Texts such as ``"lr 0.001 (largest)"``.
    """
    choice = results["chosen"][name]
    is_part = name in METHODS and METHODS[name].like is not None
    tried: dict[tuple[str, str], set[float]] = {}
    for entry in results["tuning"].get("methods", {}).get(name, {}).values():
        for point in entry["points"]:
            own = [("params", key, value) for key, value in point["params"].items()]
            of_training = (
                [] if is_part else [("training", *pair) for pair in entry["settings"].items()]
            )
            for part, key, value in (*own, *of_training, ("lam", "λ", point["lam"])):
                tried.setdefault((part, key), set()).add(value)
    texts = []
    for (part, key), values in tried.items():
        value = choice["lam"] if part == "lam" else choice[part].get(key)
        if len(values) < 2 or value in (None, 0) or value not in (min(values), max(values)):
            continue
        texts.append(f"{key} {value:g} ({'smallest' if value == min(values) else 'largest'})")
    return texts


def edges_text(results: Results) -> str:
    """Return the methods whose chosen setting lies at an edge, as a sentence."""
    edges = {name: at_edges(results, name) for name in results["chosen"]}
    found = [f"{name}: {', '.join(texts)}" for name, texts in edges.items() if texts]
    if not found:
        return "No chosen setting lies at an edge of the settings that were tried."
    head = (
        "These chosen settings lie at an edge of the settings that were tried. A better setting "
        "may lie beyond, so the method may be better than shown here:"
    )
    return head + "\n\n" + "\n".join(f"- {text}" for text in found)


def alone_text(results: Results) -> str:
    """Return which methods have a better point with settings that they do not share."""
    texts = {}
    for name, entries in results["tuning"].get("methods", {}).items():
        choice = results["chosen"].get(name)
        if choice is None or name not in METHODS or METHODS[name].like is not None:
            continue
        tried = [
            {"training": entry["settings"], **point}
            for entry in entries.values()
            for point in entry["points"]
        ]
        used = [point for point in tried if choice == _without_accuracy(point)]
        own = best(tried)
        if used and own["training"] != choice["training"] and score(own) > score(used[0]):
            settings = _text({**own["training"], **own["params"], "λ": f"{own['lam']:g}"})
            texts[name] = (
                f"{name} with {settings} ({100 * score(own):.1f} % in place of "
                f"{100 * score(used[0]):.1f} %)"
            )
    if not texts:
        return "None of them has a better point with other settings."
    text = f"Some of them have a better point with other settings: {'; '.join(texts.values())}."
    if REFERENCE in texts:
        text += (
            f" So {REFERENCE}, with which all methods are compared, is not at its own best point, "
            "while a method that shares no training is."
        )
    return text


def luck_text(results: Results) -> str:
    """Return how much of the choice of the settings is luck.

    The standard error is that of the mean of three accuracies on lists of independent clips.
    """
    clips = results["settings"]["sizes"]["development"]
    errors = []
    for name, entries in results["tuning"].get("methods", {}).items():
        choice = results["chosen"].get(name)
        for entry in entries.values():
            for point in entry["points"]:
                if choice == {"training": entry["settings"], **_without_accuracy(point)}:
                    accuracy = [point["accuracy"][question] for question in QUESTIONS]
                    variance = sum(value * (1 - value) / clips for value in accuracy)
                    errors.append(math.sqrt(variance) / len(QUESTIONS))
    if not errors:
        return ""
    return (
        f"A point of the tuning is one training, and {clips} clips of each question. The choice "
        "of these clips alone gives the mean of the three a standard error of up to "
        f"{100 * max(errors):.1f} points. So the choice among settings with nearly equal results "
        "is partly luck. The p-values of this page hold for the methods at the settings that were "
        "chosen. They don't include this luck, so a difference of a point or two between two "
        "methods can come from their settings."
    )


def _without_accuracy(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != "accuracy"}
