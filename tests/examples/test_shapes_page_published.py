"""The published page of the shapes world, against the published results."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from examples.shapes import results, run
from examples.shapes.report import page
from examples.shapes.report.sections import SECTIONS
from examples.shapes.results import Table
from examples.shapes.settings import FULL
from examples.shapes.studies import STUDIES, plan
from tests.examples.page_text import joined, section_of
from tests.helpers import REPO


@pytest.fixture(scope="module")
def published() -> results.Results:
    content: results.Results = json.loads((REPO / page.RESULTS).read_text())
    return content


def test_the_published_page_is_that_of_the_published_results(published: results.Results) -> None:
    assert (REPO / page.PAGE).read_text() == page.render(published)
    for section in SECTIONS:
        if section.figure and Table(section.study, published).seeds:
            assert (REPO / page.RESULTS.parent / section.figure).is_file()


def test_the_readme_has_the_table_of_the_published_results(published: results.Results) -> None:
    text = (REPO / "README.md").read_text()
    assert page.with_table(text, published) == text
    below = text.split("<!-- table: shapes -->\n")[1].split("\n\n")[0]
    assert below in (REPO / "docs" / "shapes.md").read_text()


# The published page against the results file, read without the code that writes the page

PUBLISHED_ROWS = {
    "The methods": {
        "CLIP": ("clip", "last"),
        "FINE-TUNE": ("finetune", "last"),
        "L2": ("l2 0.01", "last"),
        "IWR": ("openvclip", "last"),
        "SWA": ("finetune", "average"),
        "Open-VCLIP": ("openvclip", "average"),
    },
    "Attention over frames and interpolation (Figure 2)": {
        "CLIP": ("clip", "last"),
        "CLIP, fine-tuned": ("frames alone", "last"),
        "FINE-TUNE": ("finetune", "last"),
        "Open-VCLIP": ("openvclip", "average"),
    },
    "Three sizes of backbone (Table 4)": {
        f"{label}, {size}": (run_ if size == "small" else f"{run_} {size}", end)
        for size in ("tiny", "small", "wider")
        for label, run_, end in (
            ("CLIP", "clip", "last"),
            ("FINE-TUNE", "finetune", "last"),
            ("Open-VCLIP", "openvclip", "average"),
        )
    },
    "L2 regularisation (Table 5)": {
        **{f"L2, {weight}": (f"l2 {weight}", "last") for weight in ("0.001", "0.01", "0.1")},
        "Open-VCLIP": ("openvclip", "average"),
    },
    "The weight C of the regulariser": {
        "C = 0.25": ("openvclip C 0.25", "average"),
        "C = 0.5": ("openvclip", "average"),
        "C = 1": ("openvclip C 1", "average"),
    },
}


def _accuracies(
    published: results.Results, run_: str, end: str, name: str, seeds: int
) -> dict[str, Any]:
    """Accuracies in % by lambda, ``[seeds]`` each."""
    entries = [published["seeds"][str(seed)][run_]["rows"][end][name] for seed in range(seeds)]
    return {lam: 100 * np.array([entry[lam] for entry in entries]) for lam in entries[0]}


def _cell(values: Any) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


@pytest.mark.parametrize("title", PUBLISHED_ROWS)
def test_a_published_table_has_the_means_of_the_results_file(
    title: str, published: results.Results
) -> None:
    body = section_of((REPO / "docs" / "shapes.md").read_text(), title)
    lines = [line for line in body.splitlines() if line.startswith("|")][2:]
    table = {}
    for line in lines:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        table[label] = cells
    assert list(table) == list(PUBLISHED_ROWS[title])
    seeds = int(body.split(" seeds.")[0].split()[-1])
    for label, (run_, end) in PUBLISHED_ROWS[title].items():
        seen, development, unseen = (
            _accuracies(published, run_, end, name, seeds)
            for name in ("seen_test", "development", "unseen")
        )
        chosen = max(development, key=lambda lam: development[lam].mean())
        last = [_cell(seen[chosen]), _cell(unseen[chosen])]
        if run_.startswith("clip"):
            assert table[label] == ["", "", "", "", "", *last]
            continue
        first = [_cell(column[lam]) for lam in ("0", "0.5") for column in (seen, unseen)]
        assert table[label][:7] == [*first, chosen, *last]


def test_published_verdicts_follow_from_the_results_file(published: results.Results) -> None:
    """Of the claims about the methods; 2.776 standard errors are the interval of five seeds."""
    text = joined((REPO / "docs" / "shapes.md").read_text())
    unseen = [
        _accuracies(published, run_, end, "unseen", 5)
        for run_, end in (("openvclip", "average"), ("clip", "last"), ("finetune", "last"))
    ]
    seen = [
        _accuracies(published, run_, end, "seen_test", 5)["0.5"]
        for run_, end in (("openvclip", "average"), ("finetune", "last"))
    ]
    claims = {
        "Open-VCLIP (λ = 0.5) is better than CLIP on unseen shapes": unseen[0]["0.5"]
        - unseen[1]["1"],
        "Open-VCLIP (λ = 0.5) is better than fine-tuning (λ = 0) on unseen shapes": unseen[0]["0.5"]
        - unseen[2]["0"],
        "Open-VCLIP is better than fine-tuning on unseen shapes, both at λ = 0.5": unseen[0]["0.5"]
        - unseen[2]["0.5"],
        "Open-VCLIP is better than fine-tuning on seen shapes, both at λ = 0.5": seen[0] - seen[1],
    }
    for claim, difference in claims.items():
        half = 2.776 * difference.std(ddof=1) / math.sqrt(5)
        verdict = "not clear" if abs(difference.mean()) <= half else "holds"
        points = f"{difference.mean():+.1f} ± {difference.std(ddof=1):.1f}"
        assert f"{claim}: **{verdict}** ({points} points)." in text
    judged = {verdict: text.count(f": **{verdict}** (") for verdict in ("holds", "not clear")}
    assert f"This page judges {sum(judged.values())} claims".lower() in text.lower()
    assert f"{judged['holds']} hold here, {judged['not clear']} are not clear" in text
    assert ": **the opposite holds** (" not in text


def test_published_results_are_of_the_present_settings(published: results.Results) -> None:
    assert published["settings"] == json.loads(json.dumps(run.recorded(FULL)))
    runs = {task.run.name: task.run for task in plan(STUDIES)}
    for entries in published["seeds"].values():
        for name, entry in entries.items():
            assert entry["definition"] == json.loads(json.dumps(runs[name].definition()))
