"""The page of the shapes world, from a results file.

``python -m examples.shapes.report.page RESULTS`` writes ``docs/shapes.md`` and its figures, copies
the results beside them, and puts the main table into ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from string import Template

from examples.shapes.report.sections import SECTIONS, Section
from examples.shapes.report.statements import Claim, Difference, Verdict, judge
from examples.shapes.results import (
    Results,
    Table,
    draw,
    origins,
    save_results,
    table,
    wrapped,
)
from examples.shapes.studies import MAIN

ROOT = Path(__file__).parents[3]
PAGE, README = Path("docs") / "shapes.md", Path("README.md")
RESULTS = Path("docs") / "assets" / "shapes-results.json"
TRADEOFF = "shapes-tradeoff.png"

MARKER = "<!-- table: shapes -->"
_VERDICTS: dict[Verdict, str] = {
    "holds": "holds",
    "opposite": "the opposite holds",
    "unclear": "not clear",
}
_CHANGES: dict[Verdict, str] = {"holds": "better", "opposite": "worse", "unclear": "not clear"}


def render(results: Results) -> str:
    """The page's text."""
    template = Template(Path(__file__).with_name("page_template.md").read_text())
    return template.substitute(
        test=results["settings"]["clips"]["test"],
        summary=wrapped(_summary(results)),
        sections="\n\n".join(_section(section, results) for section in SECTIONS),
        origin=wrapped(_origin(results)),
    )


def judged(section: Section, results: Results) -> list[tuple[Claim, Difference]]:
    """The section's claims for which there are results."""
    found = Table(section.study, results)
    pairs = ((claim, judge(claim, found)) for claim in section.claims)
    return [(claim, difference) for claim, difference in pairs if difference is not None]


def sentence(claim: Claim, difference: Difference) -> str:
    """What comes of a claim."""
    verdict = _VERDICTS[difference.verdict]
    if len(difference.values) == 1:
        verdict += ", one seed"
    return f"{claim.text[0].upper()}{claim.text[1:]}: **{verdict}** ({difference} points)."


def _summary(results: Results) -> str:
    outcomes = [pair for section in SECTIONS for pair in judged(section, results)]
    if not outcomes:
        return "There are no results yet."
    count = Counter(difference.verdict for _, difference in outcomes)
    return (
        f"In short: of {len(outcomes)} claims of the paper that are judged below, "
        f"{count['holds']} hold here, {count['unclear']} are not clear, and the opposite of "
        f"{count['opposite'] or 'none'} holds."
    )


def _section(section: Section, results: Results) -> str:
    found = Table(section.study, results)
    parts = [f"## {section.title}", wrapped(section.text)]
    lines = [sentence(*pair) for pair in judged(section, results)]
    if section.default is not None:
        lines += _alternatives(section, section.default, found)
    if not lines:
        return "\n\n".join([*parts, "There are no results yet."])
    parts.append(wrapped(_seeds(found)))
    if section.tabulated:
        text = table(results, section.study, seconds=section.seconds)
        parts.append(f"{MARKER}\n{text}" if section.study == MAIN else text)
    if section.figure is not None:
        parts.append(f"![Unseen over seen accuracy along λ](assets/{section.figure})")
    parts.append("\n".join(wrapped(line, "- ") for line in lines))
    return "\n\n".join(parts)


def _seeds(found: Table) -> str:
    n = len(found.seeds)
    text = "One seed" if n == 1 else f"{n} seeds"
    if n < found.study.seeds:
        text += f" of {found.study.seeds} so far"
    absent = [row.label for row in found.study.rows if row not in found.rows]
    if absent:
        text += f"; without results yet: {'; '.join(absent)}"
    return f"{text}."


def _alternatives(section: Section, default: str, found: Table) -> Iterator[str]:
    """How the other rows compare with the default, and which are clearly better."""
    usual = found.row(default)
    others = [row for row in found.rows if row != usual]
    if usual is None or not others or not found.seeds:
        return
    better: dict[str, list[str]] = {"unseen": [], "seen_test": []}
    for row in others:
        changes = []
        for name, labels in better.items():
            change = Difference(found.at(row, 0.5, name) - found.at(usual, 0.5, name))
            changes.append(f"{change} points ({_CHANGES[change.verdict]})")
            labels += [row.label] if change.verdict == "holds" else []
        yield (
            f"{row.label} against {section.called}, at λ = 0.5: {changes[0]} on unseen and "
            f"{changes[1]} on seen shapes."
        )
    unseen, seen = ("; ".join(labels) or "none" for labels in better.values())
    yield (
        f"Clearly better than {section.called}: on unseen shapes **{unseen}**, on seen shapes "
        f"**{seen}**."
    )


def _origin(results: Results) -> str:
    entries = [entry for runs in results["seeds"].values() for entry in runs.values()]
    hours = sum(entry["seconds"] or 0.0 for entry in entries) / 3600
    return (
        f"{len(entries)} runs, {hours:.1f} hours of one core in all "
        f"({origins(results)}). The accuracies at every "
        f"λ, run by run, are in [`{RESULTS.name}`](assets/{RESULTS.name}); seconds of a step are "
        "those of the processor, the median of a run's steps."
    ) + "".join(f" {note}" for note in results.get("notes", []))


def with_table(text: str, results: Results) -> str:
    """A page's text with the main table in place of the one after its marker.

    Raises:
        ValueError: the page has no such place.
    """
    pattern = re.compile(rf"(?<={re.escape(MARKER)}\n)(\|.*\n)+")
    if not pattern.search(text):
        raise ValueError(f"expected a line {MARKER!r} and a table below it")
    return pattern.sub(lambda _: table(results) + "\n", text, count=1)


def figures(results: Results, folder: Path) -> None:
    """Draw the figures of the sections that have results, and that of all methods."""
    wanted = [(section.study, section.figure, section.curves) for section in SECTIONS]
    for study, name, curves in [*wanted, (MAIN, TRADEOFF, {})]:
        found = Table(study, results)
        if name is not None and found.seeds:
            draw(found, folder / name, curves)


def publish(results: Results, root: Path = ROOT) -> list[Path]:
    """Write all that shows the results, under the project's root; the paths of the texts."""
    save_results(results, root / RESULTS)
    figures(results, root / RESULTS.parent)
    (root / PAGE).write_text(render(results))
    readme = root / README
    readme.write_text(with_table(readme.read_text(), results))
    return [root / PAGE, readme, root / RESULTS]


def main(arguments: list[str] | None = None) -> None:
    """Write the page from the results."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes.report.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="results.json of `python -m examples.shapes`")
    args = parser.parse_args(arguments)
    try:
        results: Results = json.loads(args.results.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{args.results}: {error}") from error
    for path in publish(results):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
