"""The page of the comparison: its text for made-up results, and the published page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.shapes import comparison
from examples.shapes.comparison_settings import (
    CANDIDATES,
    FULL,
    RATES,
)
from examples.shapes.report import comparison_page
from examples.shapes.report.comparison_table import Comparison, harmonic_mean, step_ratio
from examples.shapes.results import Results
from tests.examples.comparison_results import TIMING, cells, made_up, tuning_results
from tests.helpers import REPO

ASSETS = REPO / "docs" / "assets"


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.4, 0.4) == pytest.approx(0.4)
    assert harmonic_mean(0.0, 0.9) == 0.0


def test_lambda_is_chosen_on_development_shapes() -> None:
    results = made_up()
    setting = "closed-set and zero-shot"
    assert Comparison(results).chosen_lambda("FINE-TUNE", setting) == 0.3  # unseen would say 0.5
    for groups in results["seeds"].values():
        groups[setting]["FINE-TUNE"]["accuracy"]["development"]["0.7"] = 1.0
    assert Comparison(results).chosen_lambda("FINE-TUNE", setting) == 0.7


def test_tables_by_hand() -> None:
    numbers = Comparison(made_up())
    table = cells(comparison_page.accuracy_table(numbers, numbers.quantities))
    assert table["method"] == ["closed set", "zero-shot", "base", "novel", "harmonic mean"]
    halves = ["50.0 ± 0.0", "25.0 ± 0.0", "33.3 ± 0.0"]
    assert table["CLIP"] == ["20.0 ± 0.0", "31.0 ± 1.4", *halves]
    assert table["FINE-TUNE"] == ["61.0 ± 1.4", "20.0 ± 0.0", "", "", ""]
    assert table["FINE-TUNE, interpolated"][:2] == ["50.0 ± 0.0", "30.0 ± 0.0"]
    assert table["Open-VCLIP"][:2] == ["72.0 ± 2.8", "30.0 ± 0.0"]
    assert "ViFi-CLIP" not in table
    lambdas = comparison_page.lambda_table(numbers).splitlines()
    assert [line.split("|")[3].strip() for line in lambdas[2:6]] == [
        "61.0",
        "50.0*",
        "40.0",
        "30.0",
    ]
    assert step_ratio(TIMING, "Open-VCLIP") == 2.0  # of 2, 1.5 and 3
    assert step_ratio(TIMING, "CLIP") is None


def test_sentences_by_hand() -> None:
    numbers = Comparison(made_up())
    lines = " ".join(comparison_page.differences(numbers).split())
    # +50 and +54: the interval of two seeds is 12.7 standard errors of 2 points to each side
    assert (
        "*Open-VCLIP* compared with *CLIP*. Clearly higher: closed set +52.0. "
        "Not clear: zero-shot −1.0." in lines
    )
    assert (
        "*Open-VCLIP* compared with *FINE-TUNE, interpolated*. "
        "Not clear: closed set +22.0, zero-shot +0.0." in lines
    )
    best = comparison_page.best_rows(numbers)
    assert "**closed set**: *Open-VCLIP* has the highest mean, 72.0" in best
    assert "**base**: *CLIP* has the highest mean, 50.0" in best


def test_partial_results_say_what_is_missing() -> None:
    results = made_up()
    del results["seeds"]["1"]["closed-set and zero-shot"]["FINE-TUNE"]
    numbers = Comparison(results)
    table = cells(comparison_page.accuracy_table(numbers, numbers.quantities[:2]))
    assert table["FINE-TUNE"] == ["60.0 (1)", "20.0 (1)"]
    assert table["Open-VCLIP"] == ["72.0 ± 2.8", "30.0 ± 0.0"]
    text = comparison_page.page(results, tuning_results(), TIMING)
    assert "**Not complete:** 7 of 12 runs of 2 seeds" in text


def test_the_best_learning_rate_has_the_highest_mean_of_both() -> None:
    assert comparison.best_rates(tuning_results()) == {"vita": 0.01}  # 0.01 + 1 against 0.3 + 0.03
    tuning = tuning_results()
    tuning["seeds"]["100"]["vita"]["0.01"]["accuracy"]["development"]["0"] = 0.0
    assert comparison.best_rates(tuning) == {"vita": 0.3}


def _published(name: str) -> Results:
    content: Results = json.loads((ASSETS / comparison_page.FILES[name]).read_text())
    return content


def test_published_page_is_that_of_the_published_results() -> None:
    page = comparison_page.page(*(_published(name) for name in comparison_page.FILES))
    assert (REPO / "docs" / "comparison.md").read_text() == page
    assert set(_published("results")["seeds"]) == {"0", "1", "2"}
    assert "Not complete" not in page


# The published page against the results files, read without the code that writes the page


def _table_below(heading: str) -> dict[str, list[str]]:
    text = (REPO / "docs" / "comparison.md").read_text().split(f"## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return cells("\n".join(lines[:1] + lines[2:]))


def _runs(setting: str, method: str) -> list[dict[str, Any]]:
    seeds = _published("results")["seeds"]
    return [seeds[seed][setting][method] for seed in sorted(seeds)]


def _at(runs: list[dict[str, Any]], test: str, lam: str | None) -> NDArray[np.float64]:
    """Accuracies in %, ``[seeds]``; those of the last weights without a lambda."""
    lists = [run["accuracy"][test] for run in runs]
    return 100 * np.array([next(iter(v.values())) if lam is None else v[lam] for v in lists])


def _text(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


@pytest.mark.parametrize(
    ("row", "method", "interpolated"),
    [
        ("CLIP", "CLIP", False),
        ("FINE-TUNE", "FINE-TUNE", False),
        ("ViFi-CLIP", "ViFi-CLIP", False),
        ("ViFi-CLIP, interpolated", "ViFi-CLIP", True),
        ("Open-VCLIP", "Open-VCLIP", True),
        ("ViFi-CLIP + IWR + SWA", "ViFi-CLIP + IWR + SWA", True),
        ("Vita-CLIP", "Vita-CLIP", False),
    ],
)
def test_published_tables_have_the_means_of_the_results_file(
    row: str, method: str, interpolated: bool
) -> None:
    def accuracies(setting: str, test: str) -> NDArray[np.float64]:
        runs, lam = _runs(setting, method), None
        if interpolated:
            lams = runs[0]["accuracy"]["development"]
            lam = max(lams, key=lambda value: round(_at(runs, "development", value).mean(), 9))
        return _at(runs, test, lam)

    closed, zero = (accuracies("closed-set and zero-shot", test) for test in ("seen", "unseen"))
    base, novel = (accuracies("base-to-novel", test) for test in ("base", "novel"))
    columns = (closed, zero, base, novel, 2 * base * novel / (base + novel))
    table = _table_below("Closed set, zero-shot, base to novel")
    assert table[row] == [_text(column) for column in columns]
    shots = [accuracies(f"{count} shots", "seen") for count in (2, 4, 8, 16)]
    assert _table_below("Few shots")[row] == [_text(column) for column in shots]


def test_the_published_cost_of_a_method_is_that_of_the_files() -> None:
    seconds = _published("timing")["seconds"]
    table = _table_below("What each method learns")
    for method in ("FINE-TUNE", "Open-VCLIP", "Vita-CLIP"):
        ratio = np.median(np.divide(seconds[method], seconds["FINE-TUNE"]))
        (trained,) = _runs("closed-set and zero-shot", method)[0]["trained"]
        assert table[method][1:] == [f"{trained:,}", f"{ratio:.2f}"]


def test_published_results_are_of_the_present_settings() -> None:
    assert _published("results")["settings"] == comparison.recorded(FULL, rates=RATES)
    assert _published("tuning")["settings"] == comparison.recorded(FULL)


def test_the_learning_rates_are_the_best_of_those_that_were_tried() -> None:
    tuning = _published("tuning")
    assert comparison.best_rates(tuning) == RATES
    tried = {family: list(runs) for family, runs in tuning["seeds"]["100"].items()}
    assert tried == {family: [f"{r:g}" for r in rates] for family, rates in CANDIDATES.items()}
