"""The page about evaluations in a real browser: the slider moves tables, figures and clips."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vl_convert")
from openvclip.evaluation.report import ReportSettings, write_report
from openvclip.video.protocols import Split
from tests.browser import Sight, browser, colour, needs_browser, sight
from tests.evaluation.small_results import NASTY, result_of, splits_of, write_results
from tests.evaluation.test_report import slow_reading

pytestmark = needs_browser
__all__ = ["browser", "sight"]

LAMS = [0.0, 0.25, 0.5, 1.0]
ODD_LAMS = [-0.5, 0.1, 3 * 0.1, 0.4, 0.5, 0.6, 0.7]


@dataclass
class Pages:
    """Pages of random results.

    Attributes:
        tuned: the folder of a sweep on a test of two splits.
        clip: the folder of the original CLIP on the same test.
        two: a page of both, and of the sweep on a second test.
        single: a page of one model without λ, of an old version.
        many: a page of 400 classes.
        odd: a page without the original CLIP, of names from right to left, and of λ below 0.
    """

    tuned: Path
    clip: Path
    two: Path
    single: Path
    many: Path
    odd: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("pages")
    splits = splits_of(6, 60, several=True)
    tuned = write_results(folder / "tuned", result_of(LAMS, splits, model=NASTY, broken=[1]))
    other = write_results(folder / "other", result_of(LAMS, splits_of(), seed=3, model=NASTY))
    plain = {"tuned": None, "expand": None, "model": NASTY}
    clip = write_results(folder / "clip", result_of([None], splits, seed=4, **plain))
    write_report(folder / "two.html", [tuned, other, clip], settings=ReportSettings(clips=20))
    old = write_results(folder / "old", result_of([None], splits_of()), predictions=False)
    write_report(folder / "single.html", [old])
    many = write_results(folder / "many", result_of([0.0, 1.0], splits_of(400, 1200)))
    write_report(folder / "many.html", [many])
    odd = write_results(folder / "odd", result_of(ODD_LAMS, odd_splits()))
    write_report(folder / "odd.html", [odd])
    names = ("two", "single", "many", "odd")
    return Pages(tuned, clip, *(folder / f"{name}.html" for name in names))


def odd_splits() -> list[Split]:
    """16 clips, so that percentages end with .25 and .75; 2 of each class."""
    names = ["سباحة (1)", "\u202eevil", "🏊 swim", 'a"b', "x" * 60, "</b>", "line\nbreak", "שחייה"]
    return [Split("all", names, [(f"v{i}.mp4", i % 8) for i in range(16)])]


# The name of a landmark.
NAME = """e => e.getAttribute("aria-label") ||
  document.getElementById(e.getAttribute("aria-labelledby")).textContent"""


# Where the digits of the score after a name are, from the first to the last, for each answer.
DIGITS = r"""elements => elements.map(e => e.lastChild)
  .filter(text => /\.\d{3}$/.test(text.textContent))
  .map(text => [3, 2, 1].map(n => {
    const range = document.createRange(), end = text.textContent.length - n;
    range.setStart(text, end); range.setEnd(text, end + 1);
    return range.getBoundingClientRect().left; }))"""
# The chosen λ.
LAM = """Number(document.querySelector("#all tr[aria-current]").children[2].textContent)"""


def rows_of(seen: Sight, table: str) -> list[list[str]]:
    rows: list[list[str]] = seen.page.eval_on_selector_all(
        f"#{table} tbody tr", "rows => rows.map(r => [...r.children].map(c => c.textContent))"
    )
    return rows


def drawn(seen: Sight, figure: str = "curve-figure") -> None:
    seen.page.wait_for_selector(f"#{figure} svg")


def set_lam(seen: Sight, place: int) -> None:
    """Move the slider with the keyboard."""
    slider = seen.page.get_by_label("λ, the weight of the original CLIP")
    slider.press("Home")
    for _ in range(place):
        slider.press("ArrowRight")
    text = f"λ = {LAMS[place]:g}"
    assert slider.get_attribute("aria-valuetext") == text
    seen.page.wait_for_function(
        "text => document.getElementById('now').textContent.includes('at ' + text)", arg=text
    )


def test_the_slider_moves_everything(pages: Pages, sight: Any) -> None:
    seen = sight(pages.two.as_uri())
    page = seen.page
    drawn(seen)
    expected, clip = slow_reading(pages.tuned), slow_reading(pages.clip)[None]
    stated = json.loads((pages.tuned / "results.json").read_text())["results"]
    rings = set()
    for place, lam in enumerate(LAMS):
        set_lam(seen, place)
        one, entry = expected[lam], stated[place]
        # the accuracies
        now = rows_of(seen, "now")
        assert now[0][0] == "twice"
        mean, std = 100 * entry["top1"]["mean"], 100 * entry["top1"]["std"]
        assert now[0][1] == f"{mean:.1f} ± {std:.1f}"
        for part, split in zip(now[1:3], entry["splits"], strict=True):
            assert part[:2] == [split["name"], f"{100 * split['top1']:.1f}"]
        assert f"top-1 {mean:.1f} %" in page.inner_text("#say")
        # the classes, the greatest loss first
        classes, changes = rows_of(seen, "classes"), []
        for name, clips, before, value, by in classes:
            n = one["clips"][name]
            assert clips == str(n)
            assert float(before) == pytest.approx(100 * clip["right"][name] / n, abs=0.051)
            assert float(value) == pytest.approx(100 * one["right"][name] / n, abs=0.051)
            changes.append(float(by.replace("−", "-")))
            exact = 100 * (one["right"][name] - clip["right"][name]) / n
            assert changes[-1] == pytest.approx(exact, abs=0.051)
        assert changes == sorted(changes)
        assert {row[0] for row in classes} == set(one["clips"])
        # the confusions
        off = {pair: n for pair, n in one["cells"].items() if pair[0] != pair[1]}
        assert {(t, p): int(n) for t, p, n, _ in rows_of(seen, "pairs")} == off
        heads = page.locator("#matrix thead th").all_text_contents()[1:]
        for name, *numbers in rows_of(seen, "matrix"):
            assert [int(n) for n in numbers] == [one["cells"][name, other] for other in heads]
        # the clips
        note = page.inner_text("#wrong-note")
        assert note.startswith(f"{len(one['wrong'])} clips have a wrong answer")
        assert page.locator("#clips li").count() == min(12, len(one["wrong"]))
        current = page.locator('#all tr[aria-current="true"]')
        assert current.locator("td").nth(1).inner_text() == f"{lam:g}"
        # the ring of the figure is at another place
        page.wait_for_timeout(20)
        rings.add(page.locator("#curve-figure svg").inner_html())
    assert len(rings) == len(LAMS)
    assert page.locator("img").count() == 0
    seen.shot("report-light")


def test_choices(pages: Pages, sight: Any) -> None:
    seen = sight(pages.two.as_uri())
    page = seen.page
    drawn(seen)
    names = rows_of(seen, "classes")
    page.get_by_label("Order").select_option("name")
    assert [row[0] for row in rows_of(seen, "classes")] == sorted(row[0] for row in names)
    page.get_by_label("Order").select_option("high")
    values = [float(row[3]) for row in rows_of(seen, "classes")]
    assert values == sorted(values, reverse=True)
    page.get_by_label("Show", exact=True).select_option("lost")
    shown = page.locator("#clips li").all_inner_texts()
    assert shown
    assert all(re.search(r"CLIP\s+right", text) for text in shown)
    page.get_by_label("Show", exact=True).select_option("all")
    page.get_by_role("button", name=re.compile("Show .* more")).press("Enter")
    assert page.locator("#clips li").count() == 20
    assert page.evaluate("document.activeElement.parentNode.id") == "clips"
    set_lam(seen, 1)
    page.get_by_label("Test", exact=True).select_option(label="list.csv")  # keeps λ
    assert page.inner_text("#lam-value") == "λ = 0.25"
    assert "on list.csv" in page.inner_text("#say")
    assert page.get_by_label("Horizontal axis").input_value() != "lam"
    page.get_by_label("Horizontal axis").select_option("lam")
    assert page.inner_text("#curve-title") == "Accuracy along λ"
    page.get_by_label("Model", exact=True).select_option(label=f"{NASTY}, original CLIP")
    assert not page.locator("#lam").is_visible()
    assert "This model is the original CLIP." in page.inner_text("#by-class")


def test_clip_with_other_settings_is_told_beside_its_accuracy(tmp_path: Path, sight: Any) -> None:
    """Also if the results of the original CLIP have no answers and no accuracy of each class."""
    splits = splits_of(6, 60)
    tuned = write_results(tmp_path / "tuned", result_of(LAMS[:2], splits, views=1))
    plain = {"tuned": None, "expand": None, "views": 3}
    clip = write_results(
        tmp_path / "clip", result_of([None], splits, seed=4, **plain), predictions=False
    )
    write_report(tmp_path / "page.html", [tuned, clip])
    seen = sight((tmp_path / "page.html").as_uri())
    drawn(seen)
    note = "CLIP was evaluated with other settings on list.csv (views)"
    assert seen.page.inner_text("#now-note").startswith(note)
    seen.page.get_by_label("Model", exact=True).select_option(label="tiny, original CLIP")
    assert seen.page.inner_text("#now-note") == ""


def test_every_part_has_a_name_and_every_figure_a_table(pages: Pages, sight: Any) -> None:
    seen = sight(pages.two.as_uri(), dark=True, width=360, height=780)
    page = seen.page
    drawn(seen)
    drawn(seen, "matrix-figure")
    seen.shot("report-dark-narrow")
    assert max(colour(page)) < 64
    assert seen.width() == 360
    for table in page.locator("table").all():
        assert table.locator("caption").text_content()
        assert table.locator("thead th:not([scope=col])").count() == 0
        assert table.locator("tbody tr > :first-child:not(th[scope=row])").count() == 0
    figures = page.get_by_role("img").all()
    assert len(figures) == 2
    for figure in figures:
        assert re.search("table .* has the same numbers", figure.get_attribute("aria-label"))
    # a reader of the screen does not meet the marks of a figure beside its label
    assert page.locator("[role=img] [aria-hidden=true] svg").count() == 2
    parts = page.get_by_role("region").all()
    names = [part.evaluate(NAME) for part in parts]
    assert all(names)
    assert len(set(names)) == len(names) == 10
    # the change against CLIP is in sight on a telephone
    for one in ("now", "classes"):
        hidden = "e => e.parentNode.scrollWidth - e.parentNode.clientWidth"
        assert page.locator(f"#{one}").evaluate(hidden) == 0, one
    # the cells of a matrix of few classes are high enough to read
    cells = page.locator("#matrix-figure .mark-rect.role-mark path").all()
    assert min(cell.bounding_box()["height"] for cell in cells) > 20
    for control in page.locator("select, input").all():
        assert page.locator(f"label[for={control.get_attribute('id')}]").inner_text()
    # texts have a contrast of at least 4.5 with what is behind them
    ratio = """element => {
      const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * c[0] + .7152 * c[1] + .0722 * c[2]; };
      let back = element;
      while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentNode;
      const [a, b] = [light(getComputedStyle(element).color),
        light(getComputedStyle(back).backgroundColor)].sort((x, y) => y - x);
      return (a + .05) / (b + .05); }"""
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        for element in ("h1", ".note", "caption", "td", "tr[aria-current] td", "#say", "footer dd",
                        "summary", ".path", "label"):  # fmt: skip
            assert page.locator(element).first.evaluate(ratio) >= 4.5, (scheme, element)
    drawn(seen)
    labels = page.locator("#curve-figure svg text").first.get_attribute("fill")
    assert labels == page.evaluate(
        "getComputedStyle(document.documentElement).getPropertyValue('--ov-soft').trim()"
    )


def test_four_hundred_classes_stay_readable(pages: Pages, sight: Any) -> None:
    seen = sight(pages.many.as_uri())
    page = seen.page
    drawn(seen, "matrix-figure")
    assert "The figure shows 24 of 400 classes" in page.inner_text("#confused-note")
    # what the figure shows is also there as a table
    cells = slow_reading(pages.many.parent / "many")[page.evaluate(LAM)]["cells"]
    heads = page.locator("#matrix thead th").all_text_contents()[1:]
    assert len(heads) == 24
    for name, *counts in rows_of(seen, "matrix"):
        assert [int(n) for n in counts] == [cells[name, other] for other in heads]
    page.get_by_text("The confusion matrix as a table").press("Enter")
    assert page.locator("#matrix").is_visible()
    pairs = rows_of(seen, "pairs")
    numbers = [int(row[2]) for row in pairs]
    assert len(pairs) == 100
    assert numbers == sorted(numbers, reverse=True)
    assert len(rows_of(seen, "classes")) == 400
    assert seen.width() == 1200
    assert page.locator("#matrix-figure").bounding_box()["height"] < 900


def test_names_weights_and_rounding_of_any_kind(pages: Pages, sight: Any) -> None:
    seen = sight(pages.odd.as_uri())
    page = seen.page
    drawn(seen)
    # one line through all λ, also through λ below 0
    line = page.locator("#curve-figure .mark-line path").get_attribute("d")
    assert line.count("L") == len(ODD_LAMS) - 1
    # the order that is shown is the order of the rows; without CLIP there is no change
    assert page.get_by_label("Order").input_value() == "low"
    values = [float(row[2]) for row in rows_of(seen, "classes")]
    assert values == sorted(values)
    assert page.locator("#order option:disabled").count() == 2
    odd = 0
    page.evaluate("""() => {
      const embed = window.vegaEmbed; window.alive = 0;
      window.vegaEmbed = (...all) => embed(...all).then(made => { window.alive += 1;
        const end = made.finalize; made.finalize = () => { window.alive -= 1; end(); };
        return made; }); }""")
    slider = page.get_by_label("λ, the weight of the original CLIP")
    slider.press("Home")
    for lam in ODD_LAMS:
        text = f"λ = {lam:g}"
        page.wait_for_function(
            "text => document.getElementById('here-title').textContent === 'At ' + text", arg=text
        )
        assert page.inner_text("#lam-value") == text
        # the tables with and without a script round alike
        current = page.locator('#all tr[aria-current="true"] td').all_inner_texts()
        assert current[1:] == [f"{lam:g}", *rows_of(seen, "now")[0][1:]]
        odd += current[2][-1] == "2"
        # a name from right to left does not turn the digits of the score beside it
        scores = page.eval_on_selector_all("#clips dd", DIGITS)
        assert len(scores) >= 3
        assert all(places == sorted(places) for places in scores)
        slider.press("ArrowRight")
    assert odd  # k.25, of which toFixed makes k.3
    page.wait_for_timeout(50)
    assert page.evaluate("window.alive") == 1  # of all drawings of the matrix, the last


def test_many_models_and_a_test_without_errors(sight: Any, tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(41)]
    split = Split("all", names, [(f"v{i}.mp4", i) for i in range(41)])
    result = result_of([0.0, 0.5], [split], tuned="t0")
    for (one,) in result.scores.values():
        for part, right in (
            (one.evaluation.ranks, 0),
            (one.evaluation.predictions, one.evaluation.targets),
            (one.answers.labels[:, 0], one.evaluation.targets),
        ):
            part[:] = right
    folders = [write_results(tmp_path / "m0", result)]
    for i in range(1, 8):
        other = result_of([0.0, 0.5], [split], tuned=f"t{i}")
        (tied,) = other.scores[0.5]  # the true class is the first of two equal classes, and wrong
        tied.answers.labels[tied.evaluation.ranks == 1, 0] = 7
        tied.evaluation.targets[tied.evaluation.ranks == 1] = 7
        folders.append(write_results(tmp_path / f"m{i}", other))
    write_report(tmp_path / "p.html", folders)
    seen = sight((tmp_path / "p.html").as_uri())
    drawn(seen)
    page = seen.page
    assert page.inner_text("#confused-note") == "No clip has the answer of another class."
    assert not page.locator("#matrix-figure").is_visible()
    assert not page.locator("#pairs").is_visible()
    assert page.inner_text("#wrong-note") == "No clip has a wrong answer."
    marks = page.eval_on_selector_all(
        "#curve-figure .mark-symbol.role-legend-symbol path",
        "paths => paths.map(p => p.getAttribute('fill') + p.getAttribute('d'))",
    )
    assert len(set(marks)) == len(marks) == 8
    page.get_by_label("Model", exact=True).select_option("1")  # a model with errors
    drawn(seen, "matrix-figure")
    assert page.locator("#pairs").is_visible()
    page.locator("#more").press("Enter")
    tied = page.get_by_text("true class in place 2: another class has the same score")
    assert tied.count() > 0


def test_a_test_of_which_nothing_could_be_read(sight: Any, tmp_path: Path) -> None:
    split = splits_of()[0]._replace(samples=[])
    folder = write_results(tmp_path / "r", result_of([0.0, 1.0], [split]))
    write_report(tmp_path / "p.html", [folder])
    seen = sight((tmp_path / "p.html").as_uri())
    assert seen.page.inner_text("#say") == "At λ = 0: no video of list.csv was counted."
    assert [row[1:] for row in rows_of(seen, "classes")] == [["0", "–", "–", "–"]] * 4
    assert not seen.page.locator(".figure").first.is_visible()


def test_one_model_without_details(pages: Pages, sight: Any, browser: Any) -> None:
    seen = sight(pages.single.as_uri())
    for part in ("by-class", "confused", "wrong"):
        assert "Run the same 'openvclip evaluate' command again" in seen.page.inner_text(f"#{part}")
    assert not seen.page.locator("#curve").is_visible()
    assert not seen.page.locator("#controls").is_visible()
    assert rows_of(seen, "now")[0][0] == "list.csv"
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages.two.as_uri())
    assert page.locator("#all tbody tr").count() == 2 * len(LAMS) + 1
    assert page.get_by_text("need a script").is_visible()
    context.close()
