"""The page of the shapes world: its text for made-up results."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes import results, run, studies
from examples.shapes.report import page
from examples.shapes.report.sections import FIGURE_2, SECTIONS
from examples.shapes.report.statements import _WIDTHS, Claim, Difference, Point, heights, judge
from examples.shapes.results import Table
from examples.shapes.settings import FULL
from examples.shapes.studies import STUDIES, Row, Study, plan
from tests.examples.page_text import joined, section_of

LISTS = ("seen_test", "development", "unseen")
LAMBDAS = ("0", "0.5", "0.8")


def made(rows: dict[Row, list[dict[str, list[float]]]]) -> results.Results:
    """Results in which each row has, for each seed, its accuracies by list along three lambdas."""
    seeds: dict[str, Any] = {}
    for row, by_seed in rows.items():
        lams = LAMBDAS if row.run.trained else ("1",)
        for seed, lists in enumerate(by_seed):
            entry = {
                "definition": row.run.definition(),
                "rows": {},
                "seconds": 3.0,
                "step_seconds": 0.5,
            }
            entry = seeds.setdefault(str(seed), {}).setdefault(row.run.name, entry)
            entry["rows"][row.end] = {
                name: dict(zip(lams, values, strict=True)) for name, values in lists.items()
            }
    clips = {"settings": run.recorded(FULL), "environments": [{"machine": "a machine", "runs": 9}]}
    return {**clips, "seeds": seeds}


def full_of_noise(seed: int = 0) -> results.Results:
    """All studies with all seeds, the numbers at random."""
    rng = np.random.default_rng(seed)
    entries: dict[str, Any] = {}
    for task in plan(STUDIES):
        lams = (f"{lam:g}" for lam in run.LAMBDAS) if task.run.trained else ("1",)
        points = list(lams)
        entries.setdefault(str(task.seed), {})[task.run.name] = {
            "definition": task.run.definition(),
            "rows": {
                end: {name: {lam: float(rng.random()) for lam in points} for name in LISTS}
                for end in task.ends
            },
            "seconds": 60.0,
            "step_seconds": 0.25 if task.run.trained else None,
        }
    settings_ = json.loads(json.dumps(run.recorded(FULL)))
    return {
        "settings": settings_,
        "environments": [{"machine": "a machine", "runs": 9}],
        "seeds": entries,
    }


# Differences


@pytest.mark.parametrize(
    ("points", "verdict", "text"),
    [
        ([3.0, 3.5, 4.0], "holds", "+3.5 ± 0.5"),  # 4.3 standard errors are 1.2
        ([-3.0, -3.5, -4.0], "opposite", "−3.5 ± 0.5"),
        ([1.0, 3.5, 6.0], "unclear", "+3.5 ± 2.5"),  # 6.2
        ([1.0, 3.5, 6.0, 1.0, 6.0], "holds", "+3.5 ± 2.5"),  # 3.1
        ([9.0], "unclear", "+9.0"),
        ([0.0, 0.0, 0.0], "unclear", "+0.0 ± 0.0"),
        ([-0.01, 0.0, 0.0], "unclear", "+0.0 ± 0.0"),
    ],
)
def test_a_difference_is_clear_beyond_its_interval(
    points: list[float], verdict: str, text: str
) -> None:
    difference = Difference(np.array(points) / 100)
    assert difference.verdict == verdict
    assert str(difference) == text


@pytest.mark.parametrize(("freedom", "width"), _WIDTHS.items())
def test_the_interval_holds_95_percent(freedom: int, width: float) -> None:
    """Student's density, integrated within the width by the trapezoidal rule."""
    x = np.linspace(-width, width, 200_001)
    gammas = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    density = gammas / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    area = float(((density[1:] + density[:-1]) / 2).sum() * (x[1] - x[0]))
    assert area == pytest.approx(0.95, abs=1e-4)


def test_differences_are_paired_by_seed() -> None:
    """Seed for seed 2 points apart, while the rows themselves vary by 20."""
    bases = (0.3, 0.5, 0.7)
    rows = {
        row: [{name: [base + shift] * 3 for name in LISTS} for base in bases]
        for row, shift in ((studies.ROW_OPEN_VCLIP, 0.02), (studies.ROW_FINE_TUNE, 0.0))
    }
    study_table = Table(studies.MAIN, made(rows))
    difference = judge(Claim("", Point("Open-VCLIP"), Point("FINE-TUNE")), study_table)
    assert difference is not None
    np.testing.assert_allclose(difference.values, 0.02)
    assert difference.verdict == "holds"


def test_the_best_of_several_rows_is_chosen_on_development_shapes() -> None:
    """The weight that is best on unseen shapes is another, and so is its lambda."""
    weak, strong = studies.PENALTY.rows[0], studies.PENALTY.rows[1]
    low = {"seen_test": [0.1] * 3, "development": [0.2, 0.3, 0.1], "unseen": [0.9] * 3}
    high = {"seen_test": [0.1] * 3, "development": [0.1, 0.2, 0.4], "unseen": [0.5, 0.6, 0.7]}
    ours = {"seen_test": [0.1] * 3, "development": [0.9, 0.1, 0.1], "unseen": [0.8, 0.1, 0.1]}
    results_ = made({weak: [low] * 2, strong: [high] * 2, studies.ROW_OPEN_VCLIP: [ours] * 2})
    study_table = Table(studies.PENALTY, results_)
    difference = judge(Claim("", Point("Open-VCLIP", None), Point("L2", None)), study_table)
    assert difference is not None
    np.testing.assert_allclose(difference.values, 0.8 - 0.7)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 512), min_size=12, max_size=12))
def test_height_of_curves(numbers: list[int]) -> None:
    """Against a slow walk along both curves, of whose steps none is larger than 1/400 in x or y."""
    values = np.array(numbers).reshape(2, 2, 3) / 512
    rows = {
        row: [{"seen_test": list(seen), "development": [0.0] * 3, "unseen": list(unseen)}]
        for row, (seen, unseen) in zip(
            (studies.ROW_FINE_TUNE, studies.ROW_OPEN_VCLIP), values, strict=True
        )
    }
    study_table = Table(studies.MAIN, made(rows))
    plain, ours = (study_table.row(label) for label in ("FINE-TUNE", "Open-VCLIP"))
    assert plain is not None
    assert ours is not None
    low = max(seen.min() for seen, _ in values)
    high = min(seen.max() for seen, _ in values)
    bounds = []
    for seen, unseen in values:
        walk = [
            (a * (1 - t) + b * t, c * (1 - t) + d * t)
            for a, b, c, d in zip(seen, seen[1:], unseen, unseen[1:], strict=False)
            for t in np.linspace(0, 1, 400)
        ]
        wanted = np.linspace(min(low, high), high, 101)
        bounds.append(
            [
                np.mean([max(y for x, y in walk if x >= least - slack) for least in wanted])
                for slack in (0.0, 1 / 400 + 1e-9)
            ]
        )
    for (height,), (least, most) in zip(heights(study_table, plain, ours), bounds, strict=True):
        assert least - 1e-9 <= height <= most + 1 / 400 + 1e-9


# The page


def test_sections_speak_of_rows_that_exist() -> None:
    """A misspelt label would make a claim vanish from the page."""
    noise = full_of_noise()
    for section in SECTIONS:
        labels = {row.label for row in section.study.rows}
        assert len(page.judged(section, noise)) == len(section.claims)
        assert section.default is None or section.default in labels
        assert set(section.curves) <= labels
        assert section.claims or section.default
    assert [section.study for section in SECTIONS] == list(STUDIES)


def test_a_claim_as_a_sentence() -> None:
    claim = FIGURE_2.claims[0]
    values = {"holds": [0.03, 0.035, 0.04], "the opposite holds": [-0.03, -0.035, -0.04]}
    values |= {"not clear": [-0.3, 0.035, 0.4], "not clear, one seed": [0.2]}
    for verdict, numbers in values.items():
        text = page.sentence(claim, Difference(np.array(numbers)))
        assert text.startswith("At λ = 0 VCLIP is better than fine-tuned CLIP on seen shapes: ")
        assert f": **{verdict}** (" in text


def _of_c(shifts: dict[str, list[float]]) -> results.Results:
    """Of the study of C: the other rows' distance to C = 0.5 on unseen shapes, by seed."""
    base = {"seen_test": [0.5] * 3, "development": [0.5] * 3}
    return made(
        {
            row: [
                {**base, "unseen": [0.4 + shift] * 3} for shift in shifts.get(row.label, [0, 0, 0])
            ]
            for row in studies.WEIGHT.rows
        }
    )


def test_settings_are_judged_by_what_is_better_than_they_are() -> None:
    clear, not_clear, worse = [0.03, 0.035, 0.04], [-0.1, 0.1, 0.3], [-0.03, -0.035, -0.04]
    text = joined(page.render(_of_c({"C = 0.25": not_clear, "C = 1": worse})))
    assert (
        "*C = 0.25* compared with the paper's C = 0.5, at λ = 0.5: +10.0 ± 20.0 points (not clear) "
        "on unseen and +0.0 ± 0.0 points (not clear) on seen shapes."
    ) in text
    drop = "*C = 1* compared with the paper's C = 0.5, at λ = 0.5: −3.5 ± 0.5 points (worse)"
    assert drop in text
    best = (
        "Rows that are clearly better than the paper's C = 0.5: **{}** on unseen shapes, **none** "
        "on seen shapes."
    )
    assert best.format("none") in text
    text = joined(page.render(_of_c({"C = 0.25": not_clear, "C = 1": clear})))
    assert best.format("C = 1") in text


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_page_is_right_for_any_part_of_the_results(data: st.DataObject) -> None:
    """Each section of incomplete results says how many seeds it has, or that it has none."""
    whole = full_of_noise()
    pairs = [(seed, name) for seed, runs in whole["seeds"].items() for name in runs]
    part = copy.deepcopy(whole)
    for seed, name in data.draw(st.lists(st.sampled_from(pairs), unique=True)):
        del part["seeds"][seed][name]
    text = page.render(part)
    for section in SECTIONS:
        body = section_of(text, section.title).replace("\n", " ")
        seeds_of = {
            row.label: {
                seed
                for seed, runs in part["seeds"].items()
                if row.run.name in runs and int(seed) < section.study.seeds
            }
            for row in section.study.rows
        }
        common = set(map(str, range(5))).intersection(*filter(None, seeds_of.values()))
        if "There are no results yet." in body:
            continue
        n = len(common)
        assert n > 0
        stated = "One seed" if n == 1 else f"{n} seeds"
        assert f" {stated}" in body
        assert (" so far" in body) == (n < section.study.seeds)
        for label, seeds in seeds_of.items():
            if not seeds:
                assert label in body.split("without results yet: ")[1]


def test_a_page_without_results_says_so() -> None:
    nothing = {**full_of_noise(), "seeds": {}}
    text = page.render(nothing)
    assert text.count("There are no results yet.") == len(SECTIONS) + 1


def test_the_table_goes_where_its_marker_is() -> None:
    before = "Text.\n\n<!-- table: shapes -->\n| old |\n| --- |\n| 1 |\n\nMore | text.\n"
    noise = full_of_noise()
    table = results.table(noise)
    assert page.with_table(before, noise) == (
        f"Text.\n\n<!-- table: shapes -->\n{table}\n\nMore | text.\n"
    )
    with pytest.raises(ValueError, match="table: shapes"):
        page.with_table("no marker", noise)


def test_publishing_writes_all_that_shows_the_results(tmp_path: Any) -> None:
    (tmp_path / "README.md").write_text("<!-- table: shapes -->\n| a |\n\nend\n")
    noise = full_of_noise()
    page.publish(noise, tmp_path)
    assets = tmp_path / "docs" / "assets"
    assert json.loads((assets / "shapes-results.json").read_text()) == noise
    assert (tmp_path / "docs" / "shapes.md").read_text() == page.render(noise)
    named = {section.figure for section in SECTIONS if section.figure} | {page.TRADEOFF}
    assert {path.name for path in assets.glob("*.png")} == named


def test_the_study_table_has_the_seconds_of_a_step() -> None:
    study = Study("every", studies.EVERY.rows[:1], 1)
    rows = {study.rows[0]: [{name: [0.5] * 3 for name in LISTS}]}
    text = results.table(made(rows), study, seconds=True)
    assert [line.split("|")[-2].strip() for line in text.splitlines()] == [
        "step, s",
        "------:",
        "0.50",
    ]
