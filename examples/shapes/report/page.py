"""Write the page of the shapes world from a results file.

``python -m examples.shapes.report.page RESULTS`` writes ``docs/shapes.md`` and its figures, copies
the results to ``docs/assets``, and updates the main table in ``README.md``.
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
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command

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
    """Return the text of the page."""
    template = Template(Path(__file__).with_name("page_template.md").read_text(encoding="utf-8"))
    return template.substitute(
        test=results["settings"]["clips"]["test"],
        summary=wrapped(_summary(results)),
        sections="\n\n".join(_section(section, results) for section in SECTIONS),
        origin=wrapped(_origin(results)),
    )


def judged(section: Section, results: Results) -> list[tuple[Claim, Difference]]:
    """Return the claims of a section that have results, with their differences."""
    study_table = Table(section.study, results)
    pairs = ((claim, judge(claim, study_table)) for claim in section.claims)
    return [(claim, difference) for claim, difference in pairs if difference is not None]


def sentence(claim: Claim, difference: Difference) -> str:
    """Return a claim with its verdict as a sentence."""
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
        f"In short: this page judges {len(outcomes)} claims of the paper. {count['holds']} hold "
        f"here, {count['unclear']} are not clear, and the opposite holds for "
        f"{count['opposite'] or 'none of them'}."
    )


def _section(section: Section, results: Results) -> str:
    study_table = Table(section.study, results)
    parts = [f"## {section.title}", wrapped(section.text)]
    lines = [sentence(*pair) for pair in judged(section, results)]
    if section.default is not None:
        lines += _alternatives(section, section.default, study_table)
    if not lines:
        return "\n\n".join([*parts, "There are no results yet."])
    parts.append(wrapped(_seeds(study_table)))
    if section.tabulated:
        text = table(results, section.study, seconds=section.seconds)
        parts.append(f"{MARKER}\n{text}" if section.study == MAIN else text)
    if section.figure is not None:
        parts.append(f"![Unseen over seen accuracy along λ](assets/{section.figure})")
    parts.append("\n".join(wrapped(line, "- ") for line in lines))
    return "\n\n".join(parts)


def _seeds(study_table: Table) -> str:
    n = len(study_table.seeds)
    text = "One seed" if n == 1 else f"{n} seeds"
    if n < study_table.study.seeds:
        text += f" of {study_table.study.seeds} so far"
    absent = [row.label for row in study_table.study.rows if row not in study_table.rows]
    if absent:
        text += f"; without results yet: {'; '.join(absent)}"
    return f"{text}."


def _alternatives(section: Section, default: str, study_table: Table) -> Iterator[str]:
    """Yield sentences that compare the rows of a study with the default row.

    There is one sentence for each other row. The last sentence lists the rows that are better.
    """
    usual = study_table.row(default)
    others = [row for row in study_table.rows if row != usual]
    if usual is None or not others or not study_table.seeds:
        return
    better: dict[str, list[str]] = {"unseen": [], "seen_test": []}
    for row in others:
        changes = []
        for name, labels in better.items():
            change = Difference(study_table.at(row, 0.5, name) - study_table.at(usual, 0.5, name))
            changes.append(f"{change} points ({_CHANGES[change.verdict]})")
            labels += [row.label] if change.verdict == "holds" else []
        yield (
            f"*{row.label}* compared with {section.called}, at λ = 0.5: {changes[0]} on unseen and "
            f"{changes[1]} on seen shapes."
        )
    unseen, seen = ("; ".join(labels) or "none" for labels in better.values())
    yield (
        f"Rows that are clearly better than {section.called}: **{unseen}** on unseen shapes, "
        f"**{seen}** on seen shapes."
    )


def _origin(results: Results) -> str:
    entries = [entry for runs in results["seeds"].values() for entry in runs.values()]
    hours = sum(entry["seconds"] or 0.0 for entry in entries) / 3600
    return (
        f"The {len(entries)} runs took {hours:.1f} hours of one core in all "
        f"({origins(results)}). [`{RESULTS.name}`](assets/{RESULTS.name}) has the accuracies of "
        "each run at each λ. The seconds of a step are processor time, the median over the steps "
        "of a run."
    ) + "".join(f" {note}" for note in results.get("notes", []))


def with_table(text: str, results: Results) -> str:
    """Return the text of a page with a new main table after its marker.

    Raises:
        ValueError: the text has no marker with a table below.
    """
    pattern = re.compile(rf"(?<={re.escape(MARKER)}\n)(\|.*\n)+")
    if not pattern.search(text):
        raise ValueError(f"The page has no table: expected a line {MARKER!r} with a table below.")
    return pattern.sub(lambda _: table(results) + "\n", text, count=1)


def figures(results: Results, folder: Path) -> None:
    """Draw the figure of each section that has results, and the figure of all methods."""
    wanted = [(section.study, section.figure, section.curves) for section in SECTIONS]
    for study, name, curves in [*wanted, (MAIN, TRADEOFF, {})]:
        study_table = Table(study, results)
        if name is not None and study_table.seeds:
            draw(study_table, folder / name, curves)


def publish(results: Results, root: Path = ROOT) -> list[Path]:
    """Write the results file, the figures and the pages; return the paths of the texts."""
    save_results(results, root / RESULTS)
    figures(results, root / RESULTS.parent)
    (root / PAGE).write_text(render(results), encoding="utf-8")
    readme = root / README
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), results))
    return [root / PAGE, readme, root / RESULTS]


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the page from the results."""
    parser = Parser(
        prog="python -m examples.shapes.report.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", type=Path, help="the file results.json of `python -m examples.shapes`"
    )
    args = parser.parse_args(arguments)
    try:
        results: Results = json.loads(args.results.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{args.results}: {error}") from error
    for path in publish(results):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
