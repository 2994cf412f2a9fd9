"""The pages of the comparison, read by a reader that shares no code with their generator.

The reader takes the JSON and the Markdown. It computes means, deviations, p-values, Holm's
correction and verdicts with the standard library, and compares each cell of each table.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from examples.shapes.trials import page as generator
from tests.examples.trial_results import made_up
from tests.helpers import REPO

PUBLISHED = REPO / "docs" / "assets" / "shapes-trials.json"
COLUMNS = {
    "trained classes": "trained",
    "unseen shapes": "shapes",
    "unseen shapes and actions": "actions",
    "stills": "stills",
}
ASKED = list(COLUMNS)[:3]


@pytest.fixture(scope="module", params=["made up", "published"])
def pages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, str]:
    """The results, and the texts of both pages."""
    if request.param == "published":
        if not PUBLISHED.exists():
            pytest.skip("no results are published yet")
        docs = REPO / "docs"
    else:
        docs = tmp_path_factory.mktemp("docs")
        generator.publish(made_up(), docs)
    results = json.loads((docs / "assets" / PUBLISHED.name).read_text())
    return results, (docs / "shapes.md").read_text(), (docs / "which-method.md").read_text()


def table(text: str, name: str) -> list[dict[str, list[str]]]:
    """The rows of the table below a marker: the cells of each head, which may occur twice."""
    lines = text.split(f"<!-- table: {name} -->\n")[1].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = []
    for row in rows:
        assert len(row) == len(head)
        cells: dict[str, list[str]] = {}
        for title, cell in zip(head, row, strict=True):
            cells.setdefault(title, []).append(cell)
        found.append(cells)
    return found


def values(results: dict[str, Any], method: str, lam: float, column: str) -> dict[str, float]:
    """The accuracies in % by cell."""
    return {
        number: 100 * point["accuracy"][column]
        for number, cell in results["cells"].items()
        if method in cell["methods"]
        for point in cell["methods"][method]["points"]
        if point["lam"] == lam
    }


def number(text: str) -> float:
    return float(text.replace("−", "-").strip("* "))


def close(shown: str, expected: float, digits: int = 1) -> bool:
    return abs(number(shown) - expected) <= 0.5 * 10**-digits + 1e-9


def test_the_main_table_has_the_means_and_deviations(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "trials")
    assert {row["method"][0] for row in rows} == set(results["chosen"])
    for row in rows:
        method, lam = row["method"][0], float(row["λ"][0])
        is_plain = method == "FINE-TUNE" and lam == 0
        assert lam == results["chosen"][method]["lam"] or is_plain
        for head, column in COLUMNS.items():
            of_cells = list(values(results, method, lam, column).values())
            mean, _, deviation = row[head][0].partition(" ± ")
            assert close(mean, fmean(of_cells)), (method, head)
            if len(of_cells) > 1:
                assert close(deviation, stdev(of_cells)), (method, head)


@cache
def student_tail(t: float, df: int) -> float:
    """P(T > t) by the incomplete beta function, as a continued fraction (Lentz)."""
    x, a, b = df / (df + t * t), df / 2, 0.5
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x > (a + 1) / (a + b + 2):  # the fraction of the complement converges
        return 0.5 * (1 - front * _fraction(1 - x, b, a) / b)
    return 0.5 * front * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 500):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + factor * d), 1 + factor / c
            result *= c * d
    return result


def p_of(differences: list[float]) -> float:
    if len(differences) < 2:
        return 1.0
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if fmean(differences) == 0 else 0.0
    return 2 * student_tail(abs(fmean(differences)) / error, len(differences) - 1)


def holm_by_definition(ps: list[float]) -> list[float]:
    """For each p-value the smallest level at which Holm's procedure rejects its hypothesis."""
    ranked = sorted(ps)
    return [min(1.0, max((len(ps) - k) * q for k, q in enumerate(ranked) if q <= p)) for p in ps]


def claims(results: dict[str, Any], text: str) -> list[dict[str, Any]]:
    found = []
    for row in table(text, "claims"):
        sides = [
            (row[name][0], row[head][0])
            for name, head in (("method", "λ"), ("compared with", "its λ"))
        ]
        lams = [
            results["chosen"][method]["lam"] if lam == "chosen" else float(lam)
            for method, lam in sides
        ]
        for head, p in zip(ASKED, row["p"], strict=True):
            first, second = (
                values(results, method, lam, COLUMNS[head])
                for (method, _), lam in zip(sides, lams, strict=True)
            )
            differences = [first[n] - second[n] for n in first if n in second]
            found.append(
                {
                    "pair": sides,
                    "question": head,
                    "shown": row[head][0],
                    "p": p,
                    "differences": differences,
                }
            )
    return found


def test_the_differences_their_p_values_and_verdicts_are_those_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    all_claims = claims(results, text)
    corrected = holm_by_definition([p_of(claim["differences"]) for claim in all_claims])
    for claim, p in zip(all_claims, corrected, strict=True):
        mean, _, deviation = claim["shown"].strip("*").partition(" ± ")
        assert close(mean, fmean(claim["differences"])), claim
        if len(claim["differences"]) > 1:
            assert close(deviation, stdev(claim["differences"])), claim
        assert claim["shown"].startswith("**") == (p < 0.05), claim
        shown = claim["p"]
        assert p < 0.001 + 1e-6 if shown == "< 0.001" else close(shown, p, 3), claim
    counts = [
        sum(
            p < 0.05 and fmean(c["differences"]) > 0
            for c, p in zip(all_claims, corrected, strict=True)
        ),
        sum(
            p < 0.05 and fmean(c["differences"]) < 0
            for c, p in zip(all_claims, corrected, strict=True)
        ),
    ]
    words = " ".join(text.split())
    sentence = (
        rf"The page judges {len(all_claims)} claims. In {counts[0]} of them the first method is "
        rf"clearly higher, in {counts[1]} it is clearly lower, and "
        rf"{len(all_claims) - sum(counts)} are not clear."
    )
    assert sentence in words


def test_every_method_is_compared_with_plain_fine_tuning(pages: Any) -> None:
    results, text, _ = pages
    against = {
        claim["pair"][0][0]
        for claim in claims(results, text)
        if claim["pair"][1] == ("FINE-TUNE", "chosen")
    }
    assert against == set(results["chosen"]) - {"CLIP", "FINE-TUNE"}


def test_the_curves_are_those_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "curves")
    assert rows
    for row in rows:
        method, lam = row["method"][0], float(row["λ"][0].strip("*"))
        assert row["λ"][0].endswith("*") == (lam == results["chosen"][method]["lam"])
        for head, column in COLUMNS.items():
            assert close(row[head][0], fmean(values(results, method, lam, column).values()))


def test_lambda_without_labels_is_that_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "unlabelled")
    assert len(rows) == 6
    for row in rows:
        method, column = row["method"][0], COLUMNS[row["clips without labels"][0]]
        of_cells = [
            cell["methods"][method]["unlabelled"][column]
            for cell in results["cells"].values()
            if method in cell["methods"]
        ]
        chosen = values(results, method, results["chosen"][method]["lam"], column)
        assert close(row["chosen λ"][0].partition(" ± ")[0], fmean(chosen.values()))
        for rule in ("dawin", "information"):
            assert close(row[f"λ of {rule}"][0], fmean(c[rule]["lam"] for c in of_cells), 2)
            shown = row[f"with λ of {rule}"][0].partition(" ± ")[0]
            assert close(shown, 100 * fmean(c[rule]["accuracy"] for c in of_cells))


def test_the_chosen_settings_are_the_best_on_the_development_lists(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "grid")
    tuned = results["tuning"]["methods"]
    assert {row["method"][0].strip(" *") for row in rows} == set(tuned)
    for method, entries in tuned.items():
        points = [
            (fmean(point["accuracy"][q] for q in ("trained", "shapes", "actions")), entry, point)
            for entry in entries.values()
            for point in entry["points"]
        ]
        best = max(score for score, _, _ in points)
        choice = results["chosen"][method]
        chosen = [
            score
            for score, entry, point in points
            if (entry["settings"], point["params"], point["lam"])
            == (choice["training"], choice["params"], choice["lam"])
        ]
        assert chosen == [best], method
        assert len(entries) <= 4, method
        assert len(points) <= 24, method
        own = [row for row in rows if row["method"][0].strip(" *") == method]
        assert sum(int(row["λ tried"][0]) for row in own) == len(points)
        marked = [row for row in own if row["method"][0].endswith("*")]
        assert len(marked) == 1, method
        assert close(marked[0]["mean"][0], 100 * best)


def test_the_power_is_that_of_a_simulation(pages: Any) -> None:
    """100,000 tests of differences with the deviation that the page names."""
    import numpy as np

    results, text, _ = pages
    cells, all_claims = len(results["cells"]), claims(results, text)
    level = 0.05 / len(all_claims)
    critical = next(
        t / 100 for t in range(1, 10**5) if 2 * student_tail(t / 100, cells - 1) < level
    )
    for row in table(text, "power"):
        deviation = float(row["points"][0])
        draws = np.random.default_rng(0).normal(1.5, deviation, (100_000, cells))
        t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(cells)
        shown = float(row["1.5 points are called clear"][0].strip("% ")) / 100
        assert abs(shown - (t > critical).mean()) < 0.08  # the deviation is rounded


def test_the_advice_says_what_the_claims_say(pages: Any) -> None:
    results, text, advice = pages
    all_claims = claims(results, text)
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", advice, re.M | re.S))
    assert set(sections) == set(results["chosen"])
    for method, section in sections.items():
        words = " ".join(section.split())
        for head in ("**Costs:**", "**Take it**", "**Don't take it**"):
            assert head in words, (method, head)
        stills = fmean(values(results, method, results["chosen"][method]["lam"], "stills").values())
        shown = re.search(r"(\d+) % of the held-out stills", words)
        assert shown is not None
        assert close(shown[1], stills, 0)
        own = [c for c in all_claims if c["pair"] == [(method, "chosen"), ("FINE-TUNE", "chosen")]]
        result = re.search(r"\*\*Result here:\*\* (.*?)\. - \*\*", words)
        assert bool(own) == (result is not None), method
        for claim in own:
            assert result is not None
            kind = "no clear difference"
            if claim["shown"].startswith("**"):
                above = fmean(claim["differences"]) > 0
                kind = "clearly higher" if above else "clearly lower"
            part = next(part for part in result[1].split("; ") if part.startswith(kind))
            mean = claim["shown"].strip("*").partition(" ± ")[0]
            assert f"{claim['question']} ({mean})" in part, (method, claim["question"])
        gained = any(c["shown"].startswith("**+") for c in own)
        assert ("a gain over FINE-TUNE was not shown" in words or "only if" in words) == (
            bool(own) and not gained
        ), method


def test_an_incomplete_page_says_so() -> None:
    results = made_up(cells=3)
    del results["cells"]["2"]["methods"]["LiNeS"]
    del results["chosen"]["Vita-CLIP"]
    text = " ".join(generator.page(results).split())
    assert "there are results of 3 of 40 cells so far" in text
    assert "Rows with fewer cells: LiNeS (2)." in text
    assert "Methods without results: Vita-CLIP." in text
    assert "so far" not in generator.page(made_up(cells=40))


def test_the_command_writes_the_pages_and_refuses_files_without_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content, message in (("{", "results.json: Expecting"), ('{"cells": {}}', "no cell has")):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            generator.main([str(path), "--docs", str(tmp_path)])
    path.write_text(json.dumps(made_up(cells=2)))
    generator.main([str(path), "--docs", str(tmp_path)])
    for name in (
        "shapes.md",
        "which-method.md",
        "assets/shapes-trials.json",
        "assets/shapes-trials.png",
    ):
        assert (tmp_path / name).is_file()


def test_the_readme_has_the_main_table() -> None:
    if not PUBLISHED.exists():
        pytest.skip("no results are published yet")
    page = (REPO / "docs" / "shapes.md").read_text()
    assert table((REPO / "README.md").read_text(), "trials") == table(page, "trials")
