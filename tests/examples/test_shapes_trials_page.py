"""The pages of the comparison, read by a reader that shares no code with their generator.

The reader takes the JSON and the Markdown. It looks for the complete cells, computes means,
deviations, p-values, Holm's correction and verdicts with the standard library, and compares each
cell of each table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest

from examples.shapes.trials import page as generator
from examples.shapes.trials import registry
from examples.shapes.trials.wording import wrapped_page
from tests.examples.trial_results import made_up
from tests.helpers import REPO

PUBLISHED = REPO / "docs" / "assets" / "shapes-trials.json"
COLUMNS = {
    "trained classes": "trained",
    "unseen shapes": "shapes",
    "unseen shapes and actions": "actions",
    "mean of the three": "mean",
    "stills": "stills",
}
ASKED = list(COLUMNS)[:4]
ON_PARTS = ("mean", "TSV-M", "Iso-C")
PARTS = ("share 1/2", "share 1/4", "share 1/8", "every 2", "every 4")
SHARED = (
    ("FINE-TUNE", "SWA", "EMA", "Gaussian average", "MonoSoup", "LiNeS"),
    ("IWR", "Open-VCLIP"),
)
# The methods that have the settings of the training of another method.
LIKE = dict.fromkeys((f"Open-VCLIP, {part}" for part in PARTS), "Open-VCLIP")
LIKE |= dict.fromkeys((f"{name} of runs on 3 actions" for name in ON_PARTS), "FINE-TUNE")
LIKE |= dict.fromkeys(("soup of 3 runs", "Model Stock"), "FINE-TUNE")
LIKE |= {f"FINE-TUNE, as far as {name}": name for name in ("MonoSoup", "LiNeS")}


README_METHODS = {
    *("CLIP", "FINE-TUNE", "L2", "SWA", "Open-VCLIP", "Open-VCLIP, share 1/4", "LoRA"),
    *("LoRA + IWR", "FROSTER", "FROSTER + IWR", "Lipsum-FT", "MonoSoup", "Model Stock"),
    *("ViFi-CLIP", "Vita-CLIP"),
}


def broken(results: dict[str, Any]) -> dict[str, Any]:
    """Results with cells 0 to 8, of which 0, 1, 2, 3 and 8 are complete."""
    cells = results["cells"]
    del cells["4"]["methods"]["LiNeS"]
    row = cells["5"]["methods"]["MonoSoup"]
    row["points"] = [{**point, "params": {"threshold": 0.123}} for point in row["points"]]
    cells["6"]["methods"]["L2"]["settings"] = {"lr": 0.7, "weight": 1.0}
    cells["7"]["methods"]["FINE-TUNE"]["points"].pop()
    cells["9"] = {"trainings": {}, "methods": {}}
    results["failures"] = {"cell-04: LiNeS": {"text": "no luck", "trace": "/home/me/x.py"}}
    return results


def whole(results: dict[str, Any]) -> dict[str, Any]:
    """The results with whole pairs of complete cells alone, by a reading of its own."""
    complete = []
    for number, cell in results["cells"].items():
        lacks = False
        for method, choice in results["chosen"].items():
            row = cell["methods"].get(method)
            if row is None or row["settings"] != choice["training"]:
                lacks = True
                continue
            lams = [p["lam"] for p in row["points"] if p["params"] == choice["params"]]
            is_drawn = method in ("FINE-TUNE", "Open-VCLIP")
            needed = [choice["lam"], *((0.0, 0.3, 0.6) if is_drawn else ())]
            lacks |= not set(needed) <= set(lams) or (is_drawn and "unlabelled" not in row)
        if not lacks:
            complete.append(int(number))
    even = [n for n in complete if n % 2 == 0 and n + 1 in complete]
    cells = {str(n): results["cells"][str(n)] for k in even for n in (k, k + 1)}
    return {**results, "cells": cells}


@pytest.fixture(scope="module", params=["made up", "published"])
def pages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str, str]:
    """The results of the complete cells, and the texts of both pages."""
    if request.param == "published":
        if not PUBLISHED.exists():
            pytest.skip("no results are published yet")
        docs = REPO / "docs"
    else:
        docs = tmp_path_factory.mktemp("docs")
        generator.publish(broken(made_up(cells=9)), docs)
    results = whole(json.loads((docs / "assets" / PUBLISHED.name).read_text()))
    return results, (docs / "shapes.md").read_text(), (docs / "which-method.md").read_text()


@pytest.fixture(scope="module")
def results_of_42_cells() -> dict[str, Any]:
    return made_up(cells=42)


def test_the_lines_of_the_pages_have_120_columns(pages: Any) -> None:
    for page in pages[1:]:
        prose = [line for line in page.splitlines() if not line.startswith("|")]
        assert max(map(len, prose)) <= 120
        assert not [line for line in prose if re.match(r" *[+*%] ", line)]  # an item, in Markdown
    # All words are there, in their order, and code has its lines.
    text = (
        "# A head\n\nLoRA + IWR "
        + "a b* % " * 50
        + "\n\n- one\n- two\n  words\n\n```bash\n x\n\n y\n```\n"
    )
    assert wrapped_page(text).split() == text.split()
    assert "\n- one\n- two words\n\n```bash\n x\n\n y\n```\n" in wrapped_page(text)


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
    asked = ("trained", "shapes", "actions") if column == "mean" else (column,)
    return {
        number: 100 * sum(point["accuracy"][name] for name in asked) / len(asked)
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
    if x == 1.0:  # a mean of 0, or nearly so
        return 0.5
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
    if len(differences) < 3:
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
    """The claims of both tables, with the differences of the results."""
    found = []
    for name, asked in (("means", ASKED[3:]), ("claims", ASKED[:3])):
        for row in table(text, name):
            sides = []
            for head in ("method", "compared with"):
                method, _, lam = row[head][0].strip(")").partition(" (λ = ")
                sides.append((method, lam or "chosen"))
            assert len(row) == 3 + len(asked)  # all p have one head
            for head, p in zip(asked, row["p"], strict=True):
                first, second = (
                    values(
                        results,
                        method,
                        results["chosen"][method]["lam"] if lam == "chosen" else float(lam),
                        COLUMNS[head],
                    )
                    for method, lam in sides
                )
                claim = {"pair": sides, "question": head, "shown": row[head][0], "p": p}
                found.append({**claim, "differences": [first[n] - second[n] for n in first]})
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
    against: dict[str, set[str]] = {}
    for claim in claims(results, text):
        if claim["pair"][1] == ("FINE-TUNE", "chosen"):
            against.setdefault(claim["pair"][0][0], set()).add(claim["question"])
    assert set(against) == set(results["chosen"]) - {"CLIP", "FINE-TUNE"}
    assert all("mean of the three" in asked for asked in against.values())
    assert against["Open-VCLIP"] == set(ASKED)


def test_the_advice_has_its_claims(pages: Any) -> None:
    """λ and fine-tuning alone on each question; parts of the second pass at equal cost."""
    results, text, _ = pages
    pairs = {}
    for claim in claims(results, text):
        pairs.setdefault(tuple(claim["pair"]), set()).add(claim["question"])
    tuned, plain, clip = ("FINE-TUNE", "chosen"), ("FINE-TUNE", "0"), ("CLIP", "chosen")
    is_zero = results["chosen"]["FINE-TUNE"]["lam"] == 0  # then both rows are one row
    assert pairs[plain, clip] == set(ASKED[:3])
    for pair in ((tuned, clip), (tuned, plain)):
        assert pairs.get(pair) == (None if is_zero else set(ASKED[:3]))
    for number in (2, 4):
        pair = [
            (f"Open-VCLIP, {word}", "chosen") for word in (f"share 1/{number}", f"every {number}")
        ]
        assert pairs[tuple(pair)] == {"mean of the three"}
    for part in PARTS:
        assert ((f"Open-VCLIP, {part}", "chosen"), ("Open-VCLIP", "chosen")) in pairs
    for method in ("MonoSoup", "LiNeS"):
        assert pairs[(method, "chosen"), (f"FINE-TUNE, as far as {method}", "chosen")] == set(ASKED)


def seconds(results: dict[str, Any], needs: list[str], settings: dict[str, Any]) -> float:
    """The median over the cells of the seconds of some trainings together."""
    words = " ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return median(
        sum(cell["trainings"][f"{need} {words}"]["seconds"] for need in needs)
        for cell in results["cells"].values()
    )


def test_the_training_times_are_those_of_whole_trainings(pages: Any) -> None:
    results, text, advice = pages
    orders = ["plain", "plain, order 1", "plain, order 2"]
    needs = {"FINE-TUNE": ["plain"], "Open-VCLIP": ["iwr"], "soup of 3 runs": orders}
    needs |= {f"Open-VCLIP, {part}": [f"iwr, {part}"] for part in PARTS}
    unit = seconds(results, ["plain"], results["chosen"]["FINE-TUNE"]["training"])
    for name, page in (("trials", text), ("overview", advice), ("share", text)):
        for row in table(page, name):
            method = row["method"][0].strip("[").split("](")[0]
            if method in needs:
                own = seconds(results, needs[method], results["chosen"][method]["training"])
                assert close(row["training time"][0], own / unit, 2), (name, method)
    assert table(text, "trials")[0]["training time"] == [""]  # CLIP


def test_the_parts_of_the_second_pass_are_those_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    rows = {row["method"][0]: row for row in table(text, "share")}
    assert set(rows) == {"Open-VCLIP", "FINE-TUNE", *(f"Open-VCLIP, {part}" for part in PARTS)}
    shares = (0.5, 0.25, 0.125, 0.5, 0.25)
    passes = {f"Open-VCLIP, {part}": share for part, share in zip(PARTS, shares, strict=True)}
    passes |= {"Open-VCLIP": 1.0, "FINE-TUNE": 0.0}
    shown = {
        (c["pair"][0][0], c["pair"][1][0]): [c["shown"], c["p"]]
        for c in claims(results, text)
        if c["question"] == "mean of the three"
    }
    for method, row in rows.items():
        assert float(row["second passes in a step"][0]) == passes[method]
        lam = results["chosen"][method]["lam"]
        for head in ASKED:
            assert close(row[head][0], fmean(values(results, method, lam, COLUMNS[head]).values()))
        for place, other in enumerate(("Open-VCLIP", "FINE-TUNE")):
            cells = [row[f"mean − {other}"][0], row["p"][place]]
            assert cells == shown.get((method, other), ["", ""]), (method, other)
    words = " ".join(text.split()).split("In the mean of the three questions: ")[1]
    for part in PARTS:
        mean, p = shown[f"Open-VCLIP, {part}", "Open-VCLIP"]
        kind = (
            "No clear difference from"
            if "**" not in mean
            else ("Clearly above" if "+" in mean else "Clearly below")
        )
        sentence = words.split(f"{kind} Open-VCLIP: ")[1].split(". ")[0]
        assert f"{part} ({mean.strip('*').split(' ± ')[0]})" in sentence, (part, p)


def test_what_is_left_of_clip_is_that_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "left")
    assert rows[-1]["λ"] == ["1 (CLIP)"]
    clip = fmean(values(results, "CLIP", 1.0, "stills").values())
    assert close(rows[-1]["FINE-TUNE"][0].partition(" ± ")[0], clip)
    assert {0.0, 0.3, 0.6} <= {float(row["λ"][0]) for row in rows[:-1]}
    for row in rows[:-1]:
        both = [
            values(results, n, float(row["λ"][0]), "stills") for n in ("FINE-TUNE", "Open-VCLIP")
        ]
        for name, found in zip(("FINE-TUNE", "Open-VCLIP"), both, strict=True):
            mean, _, deviation = row[name][0].partition(" ± ")
            assert bool(mean) == bool(found)
            assert not mean or close(mean, fmean(found.values()))
            assert not mean or close(deviation, stdev(found.values()))
        if all(both):
            apart = [both[1][cell] - both[0][cell] for cell in both[0]]
            mean, _, deviation = row["Open-VCLIP − FINE-TUNE"][0].partition(" ± ")
            assert close(mean, fmean(apart))
            assert close(deviation, stdev(apart))
    left = {
        method: fmean(values(results, method, choice["lam"], "stills").values())
        for method, choice in results["chosen"].items()
        if method != "CLIP"
    }
    words = " ".join(text.split())
    for start, pick in (("most is left with ", max), ("Least is left with ", min)):
        method = pick(left, key=lambda name: left[name])
        assert f"{start}{method} {left[method]:.1f} %" in words


def test_the_luck_of_the_tuning_is_that_of_its_clips(pages: Any) -> None:
    results, text, _ = pages
    errors = []
    for method, choice in results["chosen"].items():
        for entry in results["tuning"]["methods"][method].values():
            for point in entry["points"]:
                found = (entry["settings"], point["params"], point["lam"])
                if found == (choice["training"], choice["params"], choice["lam"]):
                    shares = [point["accuracy"][q] for q in ("trained", "shapes", "actions")]
                    errors.append(math.sqrt(sum(p * (1 - p) for p in shares) / 512) / 3)
    words = " ".join(text.split())
    assert f"a standard error of up to {100 * max(errors):.1f} points" in words


def test_settings_at_an_edge_are_named(pages: Any) -> None:
    results, text, advice = pages
    words = text.split("## How the settings were chosen")[1].split("\n## ")[0]
    named = dict(re.findall(r"^- ([^:\n]+): ((?:[^\n]|\n  )+)$", words, re.M))
    for method, choice in results["chosen"].items():
        entries = results["tuning"]["methods"][method].values()
        if method in LIKE:  # the settings of the training were not chosen for this method
            entries = [{**entry, "settings": {}} for entry in entries]
        tried: dict[str, set[float]] = {}
        for entry in entries:
            for point in entry["points"]:
                numbers = {**entry["settings"], **point["params"], "λ": point["lam"]}
                for name, value in numbers.items():
                    tried.setdefault(name, set()).add(value)
        chosen = {**choice["training"], **choice["params"], "λ": choice["lam"]}
        expected = set()
        for name, value in chosen.items():
            some = sorted(tried.get(name, ()))
            if len(some) > 1 and value and value in (some[0], some[-1]):
                expected.add(f"{name} {value:g} ({'smallest' if value == some[0] else 'largest'})")
        shown = " ".join(named.pop(method, "").split())
        assert {part for part in shown.split(", ") if part} == expected, method
        section = advice.split(f"\n## {method}\n")[1].split("\n## ")[0]
        assert ("**At an edge:**" in section) == bool(expected), method
    assert not named


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
        shown = [(row["accuracy at the chosen λ"][0], list(chosen.values()))]
        for rule in ("dawin", "information"):
            assert close(row[f"mean λ of {rule}"][0], fmean(c[rule]["lam"] for c in of_cells), 2)
            found = [100 * c[rule]["accuracy"] for c in of_cells]
            shown.append((row[f"accuracy at λ of {rule}"][0], found))
        for text_of, numbers in shown:
            mean, _, deviation = text_of.partition(" ± ")
            assert close(mean, fmean(numbers))
            assert close(deviation, stdev(numbers))


def test_the_costs_are_those_of_the_results(pages: Any) -> None:
    results, text, _ = pages
    rows = table(text, "costs")
    assert {row["method"][0] for row in rows} == set(results["chosen"])
    times = {row["method"][0]: row["training time"] for row in table(text, "trials")}
    first = {"SWA": "plain", "FROSTER": "froster", "LoRA": "lora", "Vita-CLIP": "vita"}
    for row in rows:
        method = row["method"][0]
        assert row["training time"] == times[method]
        if method in first:
            counts = {
                training["parameters"]
                for cell in results["cells"].values()
                for name, training in cell["trainings"].items()
                if name.startswith(f"{first[method]} lr=")
            }
            assert {int(row["trained parameters"][0].replace(",", ""))} == counts
        elif method == "CLIP":
            assert row["trained parameters"] == ["0"]


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
        choice = results["chosen"][method]
        sharing = next((names for names in SHARED if method in names), ())
        training = results["chosen"].get(LIKE.get(method, ""), {}).get("training")
        if sharing:
            tops: dict[str, list[float]] = {}
            for name in sharing:
                for entry in tuned[name].values():
                    key = json.dumps(entry["settings"], sort_keys=True)
                    scores = [
                        fmean(p["accuracy"][q] for q in ("trained", "shapes", "actions"))
                        for p in entry["points"]
                    ]
                    tops.setdefault(key, []).append(max(scores))
            training = json.loads(max(tops, key=lambda key: fmean(tops[key])))
        best = max(
            score for score, entry, _ in points if training is None or entry["settings"] == training
        )
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


def quantile(numbers: list[float], share: float) -> float:
    ranked = sorted(numbers)
    place = share * (len(ranked) - 1)
    low = int(place)
    above = ranked[min(low + 1, len(ranked) - 1)]
    return ranked[low] + (place - low) * (above - ranked[low])


def test_the_power_is_that_of_a_simulation(pages: Any) -> None:
    """100,000 tests of differences with the measured deviations."""
    import numpy as np

    results, text, _ = pages
    cells, all_claims = len(results["cells"]), claims(results, text)
    level = 0.05 / len(all_claims)
    low, high = 0.0, 1e4
    for _ in range(60):
        critical = (low + high) / 2
        high, low = (
            (critical, low) if 2 * student_tail(critical, cells - 1) < level else (high, critical)
        )
    normal = np.random.default_rng(0).normal(0, 1, (100_000, cells))
    rows = table(text, "power")
    assert len(rows) == 4
    for row in rows:
        kind, _, which = row["deviation of the differences"][0].partition(", ")
        deviations = [
            stdev(claim["differences"])
            for claim in all_claims
            if (claim["question"] == "mean of the three") == (kind == "mean of the three questions")
            and claim["pair"][1][0] != "CLIP"
            and claim["pair"][0][0] != "FINE-TUNE"
        ]
        deviation = quantile(deviations, {"median": 0.5, "9 of 10 claims": 0.9}[which])
        assert close(row["points"][0], deviation, 2)

        def power(difference: float, deviation: float = deviation) -> float:
            draws = difference + deviation * normal
            t = draws.mean(1) / draws.std(1, ddof=1) * math.sqrt(cells)
            return float((t > critical).mean())

        shown = float(row["1.5 points are called clear"][0].strip("% ")) / 100
        assert abs(shown - power(1.5)) < 0.01
        smallest = row["clear nine times in ten"][0]
        words = " ".join(text.split("```bash")[0].split())
        if smallest == "more than 100":
            assert power(100) < 0.91
            few = "With so few cells, hardly any difference can be called clear."
            assert (few in words) or which != "median" or kind == "one question"
            continue
        assert power(float(smallest) - 0.06) < 0.91
        assert power(float(smallest) + 0.06) > 0.89
        if which == "median":
            place = (
                "in the mean of the three questions"
                if kind.startswith("mean")
                else "on one question"
            )
            percent = row["1.5 points are called clear"][0].strip()
            assert re.search(rf"in {percent}( of all cases)? {place}", words)


def kind_of(claim: dict[str, Any]) -> str:
    if not claim["shown"].startswith("**"):
        return "no clear difference"
    return "clearly higher" if fmean(claim["differences"]) > 0 else "clearly lower"


def place_of(claim: dict[str, Any]) -> str:
    question: str = claim["question"]
    return "the mean of the three questions" if question == "mean of the three" else question


def test_the_advice_says_what_the_claims_say(pages: Any) -> None:
    results, text, advice = pages
    all_claims = claims(results, text)
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", advice, re.M | re.S))
    assert set(sections) - {"In short", "All methods in one table"} == set(results["chosen"])
    for method in results["chosen"]:
        lines = [" ".join(line.split()) for line in f"\n{sections[method].strip()}".split("\n- ")]
        parts = {head: line for line in lines for head in re.findall(r"^\*\*([^*]+)\*\*", line)}
        assert {"Costs:", "Take it", "Don't take it"} <= set(parts), method
        stills = fmean(values(results, method, results["chosen"][method]["lam"], "stills").values())
        shown = re.search(r"(\d+) % of the held-out stills", parts["CLIP's own knowledge:"])
        assert shown is not None
        assert close(shown[1], stills, 0)
        for claim in all_claims:  # each claim of the method is in a line of its section
            (first, lam), (other, other_lam) = claim["pair"]
            if first != method:
                continue
            head = "Result here:" if other == "FINE-TUNE" else f"Beside {other}:"
            if method == "FINE-TUNE":
                own = f"{results['chosen'][method]['lam']:g}" if lam == "chosen" else lam
                head = f"λ = {own} beside {'λ = 0' if other_lam == '0' else other}:"
            if (method, other) == ("Open-VCLIP", "CLIP"):
                assert head in parts
            texts = parts[head].split(":** ")[1].split("; ")
            part = next(text for text in texts if text.startswith(kind_of(claim)))
            mean = claim["shown"].strip("*").partition(" ± ")[0]
            assert f"{place_of(claim)} ({mean})" in part, (method, claim["question"])
        own_claims = [
            c for c in all_claims if c["pair"] == [(method, "chosen"), ("FINE-TUNE", "chosen")]
        ]
        above, below = (
            {c["question"] for c in own_claims if kind_of(c) == f"clearly {word}"}
            for word in ("higher", "lower")
        )
        take, leave = parts["Take it"], parts["Don't take it"]
        if method in ("CLIP", "FINE-TUNE"):
            continue
        assert ("it is clearly above FINE-TUNE" in take) == bool(above), method
        assert ("it is clearly below FINE-TUNE" in leave) == bool(below), method
        is_silent = not above and "mean of the three" not in below
        assert ("a gain over FINE-TUNE was not shown" in take) == is_silent, method


def test_the_advice_on_interpolation_and_on_clip_follows_from_the_claims(pages: Any) -> None:
    results, text, advice = pages
    lam = f"λ = {results['chosen']['FINE-TUNE']['lam']:g}"
    tuned, plain, clip = ("FINE-TUNE", "chosen"), ("FINE-TUNE", "0"), ("CLIP", "chosen")
    best = plain if lam == "λ = 0" else tuned

    def listed(pair: list[tuple[str, str]], kind: str) -> str:
        found = [c for c in claims(results, text) if c["pair"] == pair and kind_of(c) == kind]
        names = [place_of(claim) for claim in found]
        return "all three questions" if len(names) == 3 else ", and on ".join(names)

    for method, pair, sentences in (
        (
            "FINE-TUNE",
            [tuned, plain],
            (f"Interpolate: {lam} is clearly above λ = 0 on", f"{lam} is clearly below λ = 0 on"),
        ),
        (
            "CLIP",
            [best, clip],
            (
                f"FINE-TUNE at {lam} is clearly above CLIP on",
                f"CLIP is clearly above FINE-TUNE at {lam} on",
            ),
        ),
    ):
        words = " ".join(advice.split(f"\n## {method}\n")[1].split("\n## ")[0].split())
        for kind, sentence in zip(("clearly higher", "clearly lower"), sentences, strict=True):
            places = listed(pair, kind)
            assert (sentence in words) == bool(places), (method, kind)
            assert not places or f"{sentence} {places}." in words
    short = " ".join(advice.split("## In short\n")[1].split("\n## ")[0].split())
    for claim in claims(results, text):
        if claim["pair"] in ([tuned, plain], [plain, clip]):
            mean = claim["shown"].strip("*").partition(" ± ")[0]
            head = f"{lam} beside λ = 0: " if claim["pair"][0] == tuned else "(λ = 0) beside CLIP: "
            parts = short.split(head)[1].split(". ")[0].split("; ")
            part = next(part for part in parts if part.startswith(kind_of(claim)))
            assert f"{claim['question']} ({mean})" in part


def test_the_table_of_the_advice_has_the_claims_and_marks(pages: Any) -> None:
    results, text, advice = pages
    shown = {
        (c["pair"][0][0], place_of(c)): c
        for c in claims(results, text)
        if c["pair"][1] == ("FINE-TUNE", "chosen")
    }
    rows = table(advice, "overview")
    assert len(rows) == len(results["chosen"])
    for row in rows:
        method = row["method"][0].strip("[").split("](")[0]
        lam = results["chosen"][method]["lam"]
        assert float(row["λ"][0]) == lam
        assert close(row["stills"][0], fmean(values(results, method, lam, "stills").values()), 0)
        for head in ("mean", *ASKED[:3]):
            place = "the mean of the three questions" if head == "mean" else head
            claim = shown.get((method, place))
            if claim is None:
                assert row[head][0] == ""
                continue
            mark = {"clearly higher": "▲\xa0", "clearly lower": "▼\xa0"}.get(kind_of(claim), "")
            assert row[head][0] == mark + claim["shown"].strip("*").partition(" ± ")[0]


def test_the_short_advice_lists_the_clear_differences(pages: Any) -> None:
    results, text, advice = pages
    short = advice.split("## In short\n")[1].split("\n## ")[0]
    lines = [" ".join(line.split()) for line in short.strip().split("\n- ")]
    for claim in claims(results, text):
        if claim["pair"][1] != ("FINE-TUNE", "chosen") or "**" not in claim["shown"]:
            continue
        method, place = claim["pair"][0][0], place_of(claim)
        word = "above" if kind_of(claim) == "clearly higher" else "below"
        mean = claim["shown"].strip("*").partition(" ± ")[0]
        listed = [
            line.split(f"clearly {word} FINE-TUNE: ")[1].split("; ")[0]
            for line in lines
            if f" {place}" in line.split(": ")[0] and f"clearly {word}" in line
        ]
        assert any(f"{method} ({mean})" in names for names in listed), (method, place)
    ratios = {
        row["method"][0].strip("[").split("](")[0]: float(row["training time"][0] or 0)
        for row in table(advice, "overview")
    }
    for line in lines:
        group = re.match(r"-? ?\*\*For (at most 1.15|1.15 to 2.2|more than 2.2) times", line)
        if group:
            low, high = {"a": (0, 1.16), "1": (1.14, 2.21), "m": (2.19, 99)}[group[1][0]]
            ends = re.search(
                r"for (\d+) methods, from (\S+) \(([^)]+)\) to (\S+) \(([^)]+)\)", line
            )
            if ends:  # of the methods without a clear difference, the lowest and the highest
                means = {
                    c["pair"][0][0]: c["shown"].split(" ± ")[0]
                    for c in claims(results, text)
                    if c["pair"][1] == ("FINE-TUNE", "chosen")
                    and place_of(c) == "the mean of the three questions"
                    and kind_of(c) == "no clear difference"
                    and low < ratios[c["pair"][0][0]] < high
                }
                assert len(means) == int(ends[1])
                assert (means[ends[3]], means[ends[5]]) == (ends[2], ends[4])
                assert number(ends[2]) == min(map(number, means.values()))
                assert number(ends[4]) == max(map(number, means.values()))
                line = line.replace(ends[0], "")
            names = line.replace("difference for ", "difference: ")
            for method in re.findall(r"([^:;,]+(?:, (?:share|every|as far)[^(]*)?) \([+−]", names):
                assert low < ratios[method.strip()] < high, method


def test_an_incomplete_page_says_so() -> None:
    text = " ".join(generator.page(broken(made_up(cells=9))).split())
    assert "The numbers come from 4 of 24 cells so far, and the other cells can change" in text
    assert "- cell-04: LiNeS: no luck" in text
    assert "/home/me" not in text
    results = made_up(cells=2)
    for cell in results["cells"].values():
        del cell["methods"]["Vita-CLIP"]
    text = " ".join(generator.page(results).split())
    assert "The numbers come from 2 of 24 cells so far" in text
    assert "Methods without results: Vita-CLIP." in text


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ([0], "The numbers come from 1 of 24 cells so far, and the other cells can change them."),
        (
            range(20),
            "The numbers come from 20 of 24 cells so far: each division of the actions once.",
        ),
        (
            range(2, 22),
            "The numbers come from 20 of 24 cells so far: each division of the actions once.",
        ),
        (
            [*range(18), 20, 21],
            "The numbers come from 20 of 24 cells so far, and the other cells can",
        ),
        (range(24), "The numbers come from all 24 cells."),
    ],
)
def test_the_pages_say_from_how_many_cells_they_are(
    numbers: Sequence[int],
    sentence: str,
    results_of_42_cells: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = {str(number): results_of_42_cells["cells"][str(number)] for number in numbers}
    monkeypatch.setattr(generator, "draw", lambda *_: None)
    (tmp_path / "README.md").write_text("<!-- table: trials -->\n")
    generator.publish({**results_of_42_cells, "cells": cells}, tmp_path / "docs")
    for name in ("README.md", "docs/shapes.md", "docs/which-method.md"):
        assert sentence in " ".join((tmp_path / name).read_text().split()), name


def test_a_method_of_the_readers_own_has_its_rows_and_claims(tmp_path: Path) -> None:
    """The command that writes the page does not know the method, only its results."""
    results = made_up(cells=2)
    for entry in (results["chosen"], *(c["methods"] for c in results["cells"].values())):
        entry["my loss"] = entry["L2"]
    results["tuning"]["methods"]["my loss"] = results["tuning"]["methods"]["L2"]
    generator.publish(results, tmp_path)
    text, advice = ((tmp_path / f"{name}.md").read_text() for name in ("shapes", "which-method"))
    for name, page in (("trials", text), ("means", text), ("claims", text), ("overview", advice)):
        assert [row["method"][0] for row in table(page, name)].count("my loss") == 1, name


def test_the_command_knows_a_method_of_the_readers_own_from_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = made_up(cells=2)
    for entry in (results["chosen"], *(c["methods"] for c in results["cells"].values())):
        entry["of the reader"] = entry["MonoSoup"]
    results["tuning"]["methods"]["of the reader"] = results["tuning"]["methods"]["MonoSoup"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "of_the_reader.py").write_text(
        "from examples.shapes.trials.registry import Method, register\n"
        "register(Method('of the reader', ('plain',), lams=(0.0,), beside=('SWA',)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [str(tmp_path / "results.json"), "--docs", str(tmp_path)]
    try:
        generator.main([*arguments, "--methods", "of_the_reader"])
    finally:
        registry.METHODS.pop("of the reader", None)
    advice = (tmp_path / "which-method.md").read_text()
    assert "**Beside SWA:**" in advice.split("\n## of the reader\n")[1]
    with pytest.raises(SystemExit, match=r"--methods no\.such: No module named 'no'"):
        generator.main([*arguments, "--methods", "no.such"])


def test_pages_elsewhere_leave_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n<!-- table: trials -->\n\nafter\n")
    before = readme.read_text()
    paths = generator.publish(made_up(cells=2), tmp_path / "own-docs")
    assert readme.read_text() == before
    assert readme not in paths


def test_claims_on_the_mean_alone_have_no_sentence_on_power() -> None:
    results = made_up(cells=4)
    for table_of in (
        results["chosen"],
        results["tuning"]["methods"],
        *(cell["methods"] for cell in results["cells"].values()),
    ):
        for name in [n for n in table_of if n not in ("CLIP", "FINE-TUNE", "Model Stock")]:
            del table_of[name]
    assert "is called clear in" not in generator.page(results).split("```bash")[0]


def test_the_advice_says_if_lambda_0_was_chosen(tmp_path: Path) -> None:
    results = made_up(cells=2)
    results["chosen"]["FINE-TUNE"]["lam"] = 0.0
    generator.publish(results, tmp_path)
    advice = " ".join((tmp_path / "which-method.md").read_text().split())
    assert "no λ above 0 was better for FINE-TUNE" in advice
    gains = {}
    for entry in results["tuning"]["methods"]["FINE-TUNE"].values():
        by_lam = {
            point["lam"]: 100
            * fmean(point["accuracy"][q] for q in ("trained", "shapes", "actions"))
            for point in entry["points"]
        }
        gains[max(by_lam.values()) - by_lam[0.0]] = entry["settings"], by_lam
    settings, by_lam = gains[max(gains)]
    lam = max(by_lam, key=lambda each: by_lam[each])
    assert (
        f"With lr = {settings['lr']:g}, λ = {lam:g} was: {by_lam[lam]:.1f} % in place of "
        f"{by_lam[0.0]:.1f} %" in advice
    )
    text = (tmp_path / "shapes.md").read_text()
    assert [row["method"][0] for row in table(text, "trials")].count("FINE-TUNE") == 1
    assert "FINE-TUNE (λ = 0)" in text.split("<!-- table: claims -->")[1]  # beside CLIP
    pairs = [(row["method"][0], row["compared with"][0]) for row in table(text, "claims")]
    assert [pair for pair in pairs if pair[0].startswith("FINE-TUNE") and pair[1] == "CLIP"] == [
        ("FINE-TUNE (λ = 0)", "CLIP")
    ]
    assert advice.count("**λ = 0 beside CLIP:**") == 1


def test_a_page_of_one_cell_has_no_verdicts() -> None:
    text = " ".join(generator.page(made_up(cells=1)).split())
    assert "With one cell there are no verdicts." in text


def test_the_command_writes_the_pages_and_refuses_files_without_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content, message in (
        ("{", "results.json: Expecting"),
        ('{"cells": {}}', "no cell has"),
        ('{"chosen": {"CLIP": {"lam": 1}}, "cells": {"0": {}}}', "no cell has"),
    ):
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
    page, readme = (REPO / "docs" / "shapes.md").read_text(), (REPO / "README.md").read_text()
    rows = [row for row in table(page, "trials") if row["method"][0] in README_METHODS]
    assert table(readme, "trials") == rows
    assert {row["method"][0] for row in rows} == README_METHODS
    sentence = re.search(r"^The numbers come from [^.]*\.$", page, re.M)
    assert sentence is not None
    assert f"\n_{sentence[0]}_\n" in readme


def test_a_new_table_of_the_readme_replaces_the_old_table(tmp_path: Path) -> None:
    docs, readme = tmp_path / "docs", tmp_path / "README.md"
    readme.write_text("before\n\n<!-- table: trials -->\n\nafter\n")
    generator.publish(made_up(cells=2), docs)
    first = readme.read_text()
    assert re.search(r"\n_The numbers come from 2 of 24 .*_\n\nafter", first)
    generator.publish(made_up(cells=4), docs)
    second = readme.read_text()
    assert second.startswith("before\n\n<!-- table: trials -->\n| method")
    assert "from 2 of" not in second
    assert re.search(r"\n_The numbers come from 4 of 24 .*_\n\nafter", second)
    assert len(second.splitlines()) == len(first.splitlines())


def test_the_time_of_everything_follows_from_the_complete_cells() -> None:
    results = made_up(cells=2)
    hours = []
    for entry in (*results["cells"].values(), results["tuning"]):
        rows = [[row] if "points" in row else [*row.values()] for row in entry["methods"].values()]
        items = [*(item for row in rows for item in row), *entry["trainings"].values()]
        hours.append(sum(item["seconds"] for item in items) / 3600)
    words = " ".join(generator.page(results).split())
    assert f"took {sum(hours):.1f} hours of one core" in words
    drawing = 0.0103 * (512 + 3 * 2048) / 3600
    everything = (hours[2] + 12 * (hours[0] + hours[1]) + 24 * drawing) / 2
    assert f"24 cells take {everything:.1f} hours of 2 cores. This includes 10 ms for each" in words
