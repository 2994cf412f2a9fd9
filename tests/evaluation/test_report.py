"""The page about evaluations: its numbers against an independent reading of the results."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from openvclip import cli
from openvclip.errors import UsageError
from openvclip.evaluation import (
    ProtocolEvaluation,
    SplitScore,
    Timing,
    save_results,
)
from openvclip.evaluation.report import ReportSettings, write_report, writing
from openvclip.video.protocols import Split
from tests.evaluation.small_results import NASTY, result_of, splits_of, write_results

LAMS = [0.0, 0.5, 1.0]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes seconds to bundle; the browser tests use it."""
    monkeypatch.setattr(writing, "vega_script", lambda: "window.vegaEmbed = null;")


class Page(HTMLParser):
    """The numbers and the table of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text("utf-8")
        self.tags: Counter[str] = Counter()
        self.rows: list[list[str]] = []
        self._inside: list[str] = []
        self.feed(self.text)
        (block,) = re.findall(r'id="numbers">(.*?)</script>', self.text, re.DOTALL)
        self.numbers: dict[str, Any] = json.loads(block)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td") and self.rows:
            self.rows[-1].append("")
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self._inside):
            self.rows[-1][-1] += data


def slow_reading(folder: Path) -> dict[float | None, dict[str, Any]]:
    """What the page should say, counted clip by clip from the file of predictions."""
    with safe_open(folder / "predictions.safetensors", framework="np") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    result: dict[float | None, dict[str, Any]] = {}
    for i, lam in enumerate(about["lams"]):
        right, clips = Counter[str](), Counter[str]()
        cells, wrong = Counter[tuple[str, str]](), set()
        for number, split in enumerate(about["splits"]):
            names = split["class_names"]
            for n, target in enumerate(tensors[f"{number}.targets"]):
                true = names[target]
                clips[true] += 1
                label = int(tensors[f"{number}.labels"][i, n, 0])
                if label >= 0:
                    cells[true, names[label]] += 1
                if label == target:
                    right[true] += 1
                else:
                    path = about["paths"][tensors[f"{number}.videos"][n]]
                    wrong.add((split["name"], path))
        result[lam] = {"right": right, "clips": clips, "cells": cells, "wrong": wrong}
    return result


@pytest.mark.parametrize("several", [False, True])
def test_the_numbers_equal_a_slow_reading(tmp_path: Path, several: bool) -> None:
    splits = splits_of(5, several=several)
    lams = [1.0, 0.0, 0.5]  # the page sorts them
    folder = write_results(tmp_path / "r", result_of(lams, splits, broken=[2]))
    summary = write_report(tmp_path / "p.html", [folder], settings=ReportSettings(clips=1000))
    page = Page(tmp_path / "p.html")
    (run,) = page.numbers["runs"]
    details, expected = run["details"], slow_reading(folder)
    assert (summary.tests, run["lams"]) == (["twice" if several else "list.csv"], LAMS)
    stated = json.loads((folder / "results.json").read_text())["results"]
    for i, lam in enumerate(run["lams"]):
        one = expected[lam]
        entry = next(entry for entry in stated if entry["lam"] == lam)
        assert (run["top1"][i], run["top5"][i]) == (entry["top1"]["mean"], entry["top5"]["mean"])
        for k, name in enumerate(details["classes"]):
            assert details["counts"][k] == one["clips"][name]
            accuracy = one["right"][name] / one["clips"][name]
            assert details["accuracy"][i][k] == pytest.approx(accuracy, abs=1e-5)
            accuracy = expected[1.0]["right"][name] / one["clips"][name]
            assert details["clip"][k] == pytest.approx(accuracy, abs=1e-5)
        flat = details["cells"][i]
        triples = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
        names = details["classes"]
        assert {(names[t], names[p]): n for t, p, n in triples} == dict(one["cells"])
        assert [n for _, _, n in triples] == sorted((n for _, _, n in triples), reverse=True)
        wrong = details["wrong"][i]
        found = {(clip["split"], clip["path"]) for clip in wrong["shown"]}
        assert found == one["wrong"]
        assert wrong["total"] == len(wrong["shown"]) == len(one["wrong"])
        right = {key for key in one["wrong"] if key not in expected[1.0]["wrong"]}
        assert wrong["lost"] == len(right)
        flags = [clip["clip"] for clip in wrong["shown"]]
        assert flags == sorted(flags, reverse=True)
        assert {(c["split"], c["path"]) for c in wrong["shown"] if c["clip"]} == right
    assert run["unreadable"] == 1
    # the table without a script has the same numbers, in the order of λ
    rows = [row for row in page.rows if row and row[0] == "tiny"]
    assert [row[2] for row in rows] == ["0", "0.5", "1"]
    assert [row[3].split(" ")[0] for row in rows] == [f"{100 * x:.1f}" for x in run["top1"]]


def test_the_original_clip_of_another_folder_is_the_reference(tmp_path: Path) -> None:
    splits = splits_of()
    write_results(tmp_path / "all" / "a", result_of(LAMS, splits))
    clip = {"tuned": None, "expand": None}
    write_results(tmp_path / "all" / "b", result_of([None], splits, seed=5, **clip))
    # other original weights, and another list: not the reference
    write_results(
        tmp_path / "all" / "c", result_of([None], splits, seed=6, **{**clip, "weights": "x"})
    )
    write_results(tmp_path / "all" / "d", result_of([None], splits, seed=7, **clip, list="m"))
    write_report(tmp_path / "p.html", [tmp_path / "all"])
    numbers = Page(tmp_path / "p.html").numbers
    tuned, plain, other, _ = numbers["runs"]
    expected = {"name": "the original CLIP", "top1": plain["top1"][0], "model": 1, "differs": []}
    assert tuned["baseline"] == expected
    assert tuned["details"]["clip"] == plain["details"]["accuracy"][0]
    wrong = {clip["path"] for clip in plain["details"]["wrong"][0]["shown"]}
    for one in tuned["details"]["wrong"]:
        assert all(clip["clip"] == (clip["path"] not in wrong) for clip in one["shown"])
    assert plain["baseline"] is other["baseline"] is None
    assert [run.get("clip", False) for run in numbers["runs"]] == [False, True, False, True]
    assert numbers["models"] == ["tiny (a)", "tiny, original CLIP", "tiny (c)"]
    assert numbers["tests"] == ["list.csv (a)", "list.csv (d)"]


def test_the_original_clip_as_the_only_weight_of_a_sweep(tmp_path: Path) -> None:
    splits, use = splits_of(), {"views": 1, "sampler": "uniform"}
    write_results(tmp_path / "all" / "a", result_of(LAMS, splits, **use))
    other = {"tuned": None, "expand": None, "views": 3, "sampler": "released"}
    write_results(tmp_path / "all" / "b", result_of([None], splits, seed=1, **other))
    write_report(tmp_path / "p.html", [tmp_path / "all"])
    tuned, _ = Page(tmp_path / "p.html").numbers["runs"]
    assert tuned["baseline"]["model"] == 1
    assert tuned["baseline"]["differs"] == ["views", "sampler"]
    # the same settings and λ = 1: a better reference
    write_results(tmp_path / "all" / "c", result_of([1.0], splits, seed=2, expand=None, **use))
    write_report(tmp_path / "p.html", [tmp_path / "all"])
    numbers = Page(tmp_path / "p.html").numbers
    tuned, _, same = numbers["runs"]
    assert tuned["baseline"]["model"] == same["model"] == 2
    assert tuned["baseline"]["differs"] == []
    assert tuned["details"]["clip"] == same["details"]["accuracy"][0]
    assert (same["lams"], same["clip"], same["baseline"]) == ([None], True, None)
    assert numbers["models"][1:] == ["tiny, original CLIP (b)", "tiny, original CLIP (c)"]
    # the user names another reference
    settings = ReportSettings(original=tmp_path / "all" / "b")
    write_report(tmp_path / "p.html", [tmp_path / "all" / "a"], settings=settings)
    tuned, plain = Page(tmp_path / "p.html").numbers["runs"]
    assert tuned["baseline"]["model"] == plain["model"] == 1
    final = write_results(
        tmp_path / "final", result_of([None], splits, seed=3, tuned=None, weights="f")
    )
    write_report(tmp_path / "p.html", [final, tmp_path / "all"])
    assert Page(tmp_path / "p.html").numbers["runs"][0]["baseline"] is None
    flags = ["--original", str(tmp_path / "all" / "b"), "-o", str(tmp_path / "p.html")]
    assert cli.main(["report", str(final), str(tmp_path / "all"), *flags, "--overwrite"]) == 0
    numbers = Page(tmp_path / "p.html").numbers
    assert [run["baseline"] and run["baseline"]["model"] for run in numbers["runs"]] == [
        2, 2, None, None,
    ]  # fmt: skip
    # without a hash of the original weights, the name of the model tells
    for name, model in (("d", "big"), ("e", "small"), ("f", "big")):
        lams = [1.0] if name == "d" else [0.0]
        result = result_of(lams, splits, weights=None, model=model, tuned=name)
        write_results(tmp_path / "own" / name, result)
    write_report(tmp_path / "p.html", [tmp_path / "own"])
    big, small, other = Page(tmp_path / "p.html").numbers["runs"]
    assert big["clip"]
    assert small["baseline"] is None
    assert other["baseline"]["top1"] == big["top1"][0]


def test_a_test_without_readable_clips(tmp_path: Path) -> None:
    result = result_of([0.0, 1.0], [splits_of()[0]._replace(samples=[])])
    folder = write_results(tmp_path / "r", result)
    write_report(tmp_path / "p.html", [folder])
    (run,) = Page(tmp_path / "p.html").numbers["runs"]
    assert run["top1"] == [None, None]
    assert run["details"]["accuracy"] == [[None] * 4] * 2
    assert run["details"]["wrong"] == [{"total": 0, "lost": 0, "shown": []}] * 2


def test_names_of_several_models(tmp_path: Path) -> None:
    for name, tuned in (("a", "t"), ("b", "u")):
        write_results(tmp_path / name, result_of(LAMS, splits_of(), tuned=tuned))
    folders = [tmp_path / "a", tmp_path / "b"]
    assert write_report(tmp_path / "p.html", folders).models == ["tiny (a)", "tiny (b)"]
    # the same evaluation once more, such as on another device, is a model of its own
    again = write_results(tmp_path / "c", result_of(LAMS, splits_of(), seed=1))
    summary = write_report(tmp_path / "p.html", [*folders, again])
    assert (summary.models, summary.tests) == (["tiny (a)", "tiny (b)", "tiny (c)"], ["list.csv"])
    summary = write_report(tmp_path / "p.html", [*folders, folders[0]], names=["A", "<B>"])
    assert summary.models == ["A", "<B>"]
    assert "<title>Evaluation of A, &lt;B&gt;</title>" in (tmp_path / "p.html").read_text()
    for names in (["A"], ["A", "A"]):
        with pytest.raises(UsageError, match="a different name for each model"):
            write_report(tmp_path / "p.html", folders, names=names)


def test_names_make_no_elements_and_nothing_is_fetched(tmp_path: Path) -> None:
    title = f"{{{{table}}}} {NASTY}"
    pages = []
    for name in (NASTY.replace("/", ""), "plain"):
        result = result_of(LAMS, splits_of(), model=name, protocol=name, videos="/secret")
        folder = write_results(tmp_path / name[:3], result)
        heading = "" if name == "plain" else title
        write_report(tmp_path / f"{name[:3]}.html", [folder], title=heading)
        pages.append(Page(tmp_path / f"{name[:3]}.html"))
    assert pages[0].tags == pages[1].tags
    assert pages[0].tags["table"] == 5
    assert NASTY in pages[0].numbers["runs"][0]["details"]["classes"]
    for page in pages:
        assert "/secret" not in page.text
        assert re.search(r"content=\"default-src 'none'; img-src data:;", page.text)
        assert not re.findall(r'(?:src|href)=["\']?(?:https?:)?//', page.text)
        assert "connect-src" not in page.text


def test_equal_weights_are_found_and_shown_without_rounding_errors(tmp_path: Path) -> None:
    lams = [n * 0.1 for n in range(11)]  # 0.30000000000000004
    folder = write_results(tmp_path / "r", result_of(lams, splits_of()))
    write_report(tmp_path / "p.html", [folder])
    page = Page(tmp_path / "p.html")
    assert page.numbers["runs"][0]["lams"] == [n / 10 for n in range(11)]
    assert page.numbers["runs"][0]["baseline"]["name"] == "CLIP at λ = 1"
    assert [row[2] for row in page.rows if row[0] == "tiny"] == [f"{n / 10:g}" for n in range(11)]


def test_the_same_videos_with_other_classes_are_another_test(tmp_path: Path) -> None:
    splits = splits_of()
    write_results(tmp_path / "all" / "a", result_of(LAMS, splits))
    words = [Split("all", [f"a person {n}" for n in splits[0].class_names], splits[0].samples)]
    write_results(tmp_path / "all" / "b", result_of([None], words, tuned=None))
    clip = {"tuned": None, "expand": None}
    write_results(tmp_path / "all" / "c", result_of([None], splits, **clip), predictions=False)
    more = [Split("all", splits[0].class_names, splits[0].samples * 2)]
    write_results(tmp_path / "all" / "d", result_of([None], more, **clip))
    write_report(tmp_path / "p.html", [tmp_path / "all"])
    numbers = Page(tmp_path / "p.html").numbers
    assert [run["test"] for run in numbers["runs"]] == [0, 1, 0, 2]
    assert len(set(numbers["tests"])) == 3
    # The results of "c" name no classes: there is a change of the accuracy, but not of a class.
    tuned, _, old, _ = numbers["runs"]
    assert tuned["baseline"]["top1"] == old["top1"][0]
    assert tuned["details"]["clip"] is None


def test_unreadable_videos_of_several_protocols(tmp_path: Path) -> None:
    splits = [split._replace(protocol=name) for name in "ab" for split in splits_of()]
    folder = write_results(tmp_path / "r", result_of([None], splits, broken=[2]))
    write_report(tmp_path / "p.html", [folder])
    page = Page(tmp_path / "p.html")
    assert page.numbers["tests"] == ["a", "b"]
    text = "1 unreadable video in the tests of the folder, counted as wrong"
    assert page.text.count(text) == 2


def test_scores_without_end_and_settings_of_any_kind(tmp_path: Path) -> None:
    result = result_of(LAMS, splits_of(), model={"name": "x"}, text=["own"], weights=["w"])
    for (score,) in result.scores.values():
        assert score.answers is not None
        score.answers.scores[::2] *= 1e30  # infinite in float16
    folder = write_results(tmp_path / "r", result)
    write_report(tmp_path / "p.html", [folder])
    (run,) = Page(tmp_path / "p.html").numbers["runs"]
    scores = [s for one in run["details"]["wrong"] for c in one["shown"] for s in c["scores"]]
    assert None in scores
    assert any(score is not None for score in scores)


def test_old_results_give_what_they_hold(tmp_path: Path, capsys: Captured) -> None:
    splits = splits_of(5, several=True)
    result = result_of(LAMS, splits)
    whole = write_results(tmp_path / "whole", result)
    write_report(tmp_path / "p.html", [whole])
    (expected,) = Page(tmp_path / "p.html").numbers["runs"]
    for name, parts in (
        ("none", {}),
        ("classes", {"per_class": True}),
        ("both", {"per_class": True, "confusion": True}),
    ):
        folder = write_results(tmp_path / name, result, predictions=False, **parts)
        out = tmp_path / f"{name}.html"
        assert cli.main(["report", str(folder), "-o", str(out)]) == 0
        printed = capsys.readouterr()
        assert f"{folder} has no answers for each clip" in printed.err
        (run,) = Page(out).numbers["runs"]
        assert run["top1"] == expected["top1"]
        if not parts:
            assert run["details"] is None
            continue
        details = run["details"]
        assert details["classes"] == expected["details"]["classes"]
        assert details["wrong"] is None
        assert run["resumable"]
        assert (details["cells"] is None) == (name == "classes")
        if details["cells"]:

            def cells(flat: list[int]) -> set[tuple[int, ...]]:
                return set(zip(flat[::3], flat[1::3], flat[2::3], strict=True))

            for mine, theirs in zip(details["cells"], expected["details"]["cells"], strict=True):
                assert cells(mine) == cells(theirs)


def test_a_sweep_over_a_loader(tmp_path: Path) -> None:
    whole = result_of(LAMS, splits_of())
    scores = {
        lam: [SplitScore("test", list(one.class_names), one.evaluation)]
        for lam, (one,) in whole.scores.items()
    }
    write_results(tmp_path / "r", whole)  # an older file of predictions goes
    (tmp_path / "r" / "settings.json").unlink()
    result = ProtocolEvaluation(scores, [], Timing(), whole.settings)
    save_results(tmp_path / "r", result, per_class=True, confusion=True)
    write_report(tmp_path / "p.html", [tmp_path / "r"])
    (run,) = Page(tmp_path / "p.html").numbers["runs"]
    assert run["details"]["wrong"] is None
    assert not run["resumable"]
    assert run["details"]["clip"] == run["details"]["accuracy"][2]
    for i, (lam, (one,)) in enumerate(scores.items()):
        flat = run["details"]["cells"][i]
        for t, p, n in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            assert one.confusion()[t, p] == n, lam
        assert sum(flat[2::3]) == 30


def test_pictures(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("av")
    pytest.importorskip("PIL")
    from tests.search.films import write_film

    splits = splits_of()
    result = result_of([0.0, 1.0], splits, videos=str(tmp_path / "videos"))
    folder = write_results(tmp_path / "r", result)
    settings = ReportSettings(clips=1000, posters=True)
    (tmp_path / "videos").mkdir()
    wrong = {
        path
        for score in result.scores.values()
        for (path, _), rank in zip(splits[0].samples, score[0].evaluation.ranks, strict=True)
        if rank != 0
    }
    present = sorted(wrong)[:2]
    for path in present:
        (tmp_path / "videos" / path).parent.mkdir(exist_ok=True)
        write_film(tmp_path / "videos" / path, 1)
    text = tmp_path / "videos" / sorted(wrong)[2]
    text.parent.mkdir(exist_ok=True)
    text.write_text("no video")
    summary = write_report(tmp_path / "p.html", [folder], settings=settings)
    assert summary.posters == 2
    assert set(summary.failed) == {str(tmp_path / "videos" / path) for path in wrong - {*present}}
    numbers = Page(tmp_path / "p.html").numbers
    shown = [c for one in numbers["runs"][0]["details"]["wrong"] for c in one["shown"]]
    assert {clip["path"] for clip in shown if clip["picture"] is not None} == {*present}
    notes = {clip["path"]: clip["note"] for clip in shown}
    assert notes.pop(sorted(wrong)[2]) == "The video can't be read."
    assert {notes[path] for path in notes if path not in present} == {"The video file is missing."}
    for picture in numbers["pictures"]:
        assert base64.b64decode(picture.partition(",")[2])[:3] == b"\xff\xd8\xff"
    small = ReportSettings(posters=True, megabytes=1e-6)
    assert write_report(tmp_path / "p.html", [folder], settings=small).too_large == 2
    # the command: another folder of videos, in which none is
    arguments = ["report", str(folder), "-o", str(tmp_path / "q.html"), "--posters"]
    assert cli.main([*arguments, "--videos", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "shown without a picture" in printed.err
    missing = [*arguments, "--overwrite", "--videos", str(tmp_path / "vidoes")]
    assert cli.main(missing) == 2
    assert f"did you mean {tmp_path / 'videos'}?" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "-o", "x.html", "--videos", "v"]) == 2
    assert "--videos has no effect without --posters" in capsys.readouterr().err
