"""The results of a run: the JSON file, the table on the screen, and the section of a page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openvclip.checkpoints.atomic import atomic_path
from tests.device.checks import CORRECTNESS
from tests.device.targets import ROWS, Row

FAILED_SHOWN, REASON_SHOWN = 25, 150


def save(results: dict[str, Any], path: Path) -> None:
    """Write the JSON file. A reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def checks_of(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return all checks with their groups."""
    return [(group, check) for group in results["groups"] for check in group["checks"]]


def failures(results: dict[str, Any]) -> list[str]:
    """Return ``group/check: reason`` of each check that failed, correctness first."""
    found = [
        (group["kind"] != CORRECTNESS, f"{group['group']}/{check['check']}: {check['reason']}")
        for group, check in checks_of(results)
        if check["outcome"] == "failed"
    ]
    return [text for _, text in sorted(found, key=lambda pair: pair[0])]


def counts(results: dict[str, Any]) -> dict[str, int]:
    """Return the number of checks of each outcome; a group of pytest counts its tests."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for _, check in checks_of(results):
        total[check["outcome"]] += 1
    return total


def figures(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the figures: ``row -> case -> figure``, in the order of the table."""
    found: dict[str, dict[str, dict[str, Any]]] = {key: {} for key in ROWS}
    for _, check in checks_of(results):
        for figure in check["figures"]:
            found[figure["row"]][figure["case"]] = figure
    return found


def judged(figure: dict[str, Any], small: bool) -> dict[str, Any]:
    """Return a figure with its target, and whether the figure meets the target.

    The targets are those of real models: figures of small models are not judged.
    """
    row = ROWS[figure["row"]]
    return {**figure, "target": row.bound, "met": None if small else row.is_met(figure["value"])}


def screen(results: dict[str, Any]) -> str:
    """Return the whole result in few lines, for the end of the output."""
    lines = [describe(results["machine"])]
    number = counts(results)
    lines.append(
        f"{number['passed']} passed, {number['failed']} failed, {number['skipped']} skipped; "
        f"{results['seconds']:.0f} s"
    )
    for group in results["groups"]:
        if group["note"]:
            lines.append(f"NOTE {group['group']}: {_one_line(group['note'])}")
    for check in [c for _, c in checks_of(results) if c["outcome"] == "skipped"]:
        lines.append(f"skipped {check['check']}: {_one_line(check['reason'])}")
    failed = failures(results)
    lines += [f"FAILED {_one_line(text)}" for text in failed[:FAILED_SHOWN]]
    if len(failed) > FAILED_SHOWN:
        lines.append(f"FAILED: {len(failed) - FAILED_SHOWN} more, see the JSON file")
    return "\n".join([*lines, "", table(results)])


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= REASON_SHOWN else line[: REASON_SHOWN - 3] + "..."


def describe(machine: dict[str, Any]) -> str:
    """Return the machine in one line."""
    parts = [machine["card"] or machine["processor"], f"torch {machine['torch']}"]
    if machine["card"]:
        parts += [f"CUDA {machine['cuda']}", f"driver {machine['driver']}"]
    return ", ".join(parts) + (" (small models)" if machine["small"] else "")


def table(results: dict[str, Any] | None) -> str:
    """Return the table of ratios in Markdown; without results, nothing is measured yet."""
    found = figures(results) if results else {key: {} for key in ROWS}
    lines = ["| | figure | target | |", "| --- | --- | --- | --- |"]
    for key, row in ROWS.items():
        values = list(found[key].values())
        shown = "; ".join(_figure(row, figure) for figure in values) or "not measured yet"
        lines.append(f"| {row.title} | {shown} | {row.bound} | {_verdict(values)} |")
    return "\n".join(lines)


def _figure(row: Row, figure: dict[str, Any]) -> str:
    case = f"{figure['case']}: " if figure["case"] else ""
    note = f" ({figure['note']})" if figure["note"] else ""
    return f"{case}{figure['value']:.{row.digits}f}{note}"


def _verdict(values: Iterable[dict[str, Any]]) -> str:
    verdicts = {figure["met"] for figure in values} - {None}
    return ("met" if verdicts == {True} else "missed") if verdicts else ""


def page(results: dict[str, Any] | None) -> str:
    """Return the section of docs/benchmarks.md for a machine."""
    if results is None:
        return table(None)
    number = counts(results)
    lines = [f"### {results['machine']['card'] or results['machine']['processor']}", ""]
    lines.append(
        f"{describe(results['machine'])}, on {results['date']}. Of the checks, {number['passed']} "
        f"passed, {number['failed']} failed and {number['skipped']} were skipped."
    )
    for text in failures(results):
        lines += ["", f"- failed: {_one_line(text)}"]
    return "\n".join([*lines, "", table(results)])
