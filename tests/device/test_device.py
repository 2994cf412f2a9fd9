"""The script for a device: all of it with tiny models, and what it does when checks go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device import jobs, report, run, suite
from tests.device.checks import CORRECTNESS, GROUPS, RATIOS, Check, Checks, Figure, Group, Setup
from tests.device.targets import ROWS
from tests.helpers import REPO

TOY = Group("toy", CORRECTNESS, 3.0, "checks that fail", module="tests.device.toy_checks")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], list[list[str]]]:
    """Return the exit status, the results and the calls of pytest of ``--cpu``."""
    out = tmp_path_factory.mktemp("out")
    calls: list[list[str]] = []

    def pytest_of_one_test(
        arguments: list[str], outcomes: Path, limit: float | None = None
    ) -> None:
        calls.append(arguments)
        outcomes.write_text(json.dumps(["a test", "passed", ""]) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "start_pytest", pytest_of_one_test)
        status = run.main(["--cpu", "--out", str(out)])
    return status, json.loads((out / run.RESULTS).read_text()), calls


def test_every_group_reports_with_tiny_models(small: Any) -> None:
    status, results, _ = small
    assert report.failures(results) == []
    assert status == 0
    assert results["complete"]
    known = [group.name for group in GROUPS if not group.name.startswith("compile_")]
    ran = {group["group"]: group["checks"] for group in results["groups"]}
    assert list(ran) == [group.name for group in GROUPS]
    assert [name for name in known if not ran[name]] == []
    assert results["machine"]["torch"]
    assert results["machine"]["libraries"]["numpy"] != "not installed"


def test_every_row_has_a_figure(small: Any) -> None:
    _, results, _ = small
    found = report.figures(results)
    skipped = {c["check"] for _, c in report.checks_of(results) if c["outcome"] == "skipped"}
    optional: set[str] = set()
    if any(name.startswith("views_over_copies") for name in skipped):
        optional |= {"views_time", "views_memory"}
    assert {key for key in ROWS if not found[key]} <= optional
    assert {f["met"] for row in found.values() for f in row.values()} == {None}  # tiny models


def test_the_core_tests_are_those_of_the_suite(small: Any) -> None:
    calls = small[2]
    assert len(calls) == 3
    files = [Path(argument) for call in calls for argument in call if argument.endswith(".py")]
    assert len(files) > 30
    assert [file for file in files if not file.is_file()] == []


# --- processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("toy")
    job = jobs.Job(TOY, Setup("cpu", folder), {})
    ended: list[jobs.Job] = []
    jobs.side_by_side([job], lambda: 100.0, ended.append)
    assert ended == [job]
    return job.results(), folder


def test_a_check_that_fails_stops_no_other_check(toy: Any) -> None:
    results, folder = toy
    outcomes = {check["check"]: check["outcome"] for check in results["checks"]}
    assert outcomes == {
        "passes": "passed",
        "is_skipped": "skipped",
        "fails": "failed",
        "leaves_the_device_unusable": "failed",
        "ends_its_process": "failed",
        "passes_after_all_that[first]": "passed",
        "passes_after_all_that[second]": "passed",
        "hangs": "failed",
    }
    assert not (folder / "reached").exists()
    first, second = ((folder / f"{name}.pid").read_text() for name in ("first", "second"))
    log = (folder / "toy.log").read_text()
    assert first == second
    assert f"process {first}" not in log  # the check before them ran in another process


def test_reasons_and_figures(toy: Any) -> None:
    results, _ = toy
    checks = {check["check"]: check for check in results["checks"]}
    assert [figure["value"] for figure in checks["passes"]["figures"]] == [1.07, 1.2]
    assert [figure["row"] for figure in checks["fails"]["figures"]] == ["memory"]
    assert checks["is_skipped"]["reason"] == "there is no decoder"
    assert checks["fails"]["reason"] == "AssertionError: 1 is not 2"
    assert "status 9" in checks["ends_its_process"]["reason"]
    assert "the last words" in checks["ends_its_process"]["reason"]
    assert "time limit" in checks["hangs"]["reason"]
    assert "time limit" in results["note"]


def test_a_check_that_hangs_ends_alone_if_checks_have_a_limit(tmp_path: Path) -> None:
    group = Group("toy", CORRECTNESS, 60, "", "tests.device.toy_checks", check_seconds=3.0)
    job = jobs.Job(group, Setup("cpu", tmp_path), {})
    jobs.side_by_side([job], lambda: 100.0, lambda job: None)
    checks = {check["check"]: check for check in job.results()["checks"]}
    assert checks["hangs"]["outcome"] == "failed"
    assert "a check took more than 3 s" in checks["hangs"]["reason"]
    assert checks["is_not_reached"]["outcome"] == "passed"
    assert job.note == ""


def test_groups_in_turn_stop_when_the_time_is_over(tmp_path: Path) -> None:
    made = [
        jobs.Job(Group(name, RATIOS, 20, "", module="tests.device.toy_checks"), setup, {})
        for name in ("one", "two")
        for setup in [Setup("cpu", tmp_path)]
    ]
    left = iter([0.3, 0.3, -1.0])
    ended: list[jobs.Job] = []
    jobs.in_turn(made, lambda: next(left, -1.0), ended.append)
    assert ended == made
    assert "time limit" in made[0].note
    assert made[1].note == "not run: no time left"
    assert made[1].results()["checks"] == []


def test_a_group_that_can_not_be_imported(tmp_path: Path) -> None:
    job = jobs.Job(Group("gone", RATIOS, 20, ""), Setup("cpu", tmp_path), {})
    jobs.in_turn([job], lambda: 100.0, lambda job: None)
    assert "No module named 'tests.device.gone'" in job.note
    (check,) = job.results()["checks"]
    assert (check["check"], check["outcome"]) == ("start", "failed")


# --- the command -------------------------------------------------------------------------------


def one_group(monkeypatch: pytest.MonkeyPatch, *checks: Check, kind: str = CORRECTNESS) -> None:
    """Let the script have one group with these checks."""
    module = type("Module", (), {"CHECKS": Checks(list(checks))})
    monkeypatch.setitem(__import__("sys").modules, "tests.device.made", module)
    monkeypatch.setattr(run, "GROUPS", (Group("made", kind, 10, "made for a test"),))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    assert run.main([]) == 2
    assert "finds no GPU on this machine" in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        group.name for group in GROUPS
    ]
    assert sum(group.seconds for group in GROUPS if group.kind == RATIOS) < run.SECONDS


def test_a_failure_gives_exit_status_1_and_the_table_is_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(setup: Setup) -> None:
        raise AssertionError("two\nlines")

    one_group(monkeypatch, Check("right", lambda setup: None), Check("wrong", wrong))
    assert run.main(["--cpu", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "1 passed, 1 failed, 0 skipped" in output
    assert "FAILED made/wrong: AssertionError: two lines" in output
    assert output.splitlines()[-3].startswith("| loader, clips a second and process")
    results = json.loads((tmp_path / run.RESULTS).read_text())
    assert results["complete"]
    assert results["targets"]["forward"] == "<= 1.08"


def test_without_a_gpu_too_the_run_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def check(name: str, seconds: float = 0.0) -> Check:
        def body(setup: Setup) -> Iterator[Figure]:
            ran.append(name)
            time.sleep(seconds)
            yield from ()

        return Check(name, body)

    module = type("Module", (), {"CHECKS": Checks([check("one", 0.3), check("two")])})
    monkeypatch.setitem(__import__("sys").modules, "tests.device.made", module)
    groups = [Group(name, RATIOS, 10, "", module="tests.device.made") for name in ("a", "b")]
    monkeypatch.setattr(run, "GROUPS", groups)
    for limit, expected in (("0.2", ["one"]), ("0", []), ("60", ["one", "two"] * 2)):
        ran.clear()
        run.main(["--cpu", "--seconds", limit, "--out", str(tmp_path)])
        assert ran == expected
        results = json.loads((tmp_path / run.RESULTS).read_text())
        notes = [group["note"] for group in results["groups"]]
        first = {"0.2": "cut: no time left for 1 of 2 checks", "60": ""}.get(limit, jobs.NOT_RUN)
        assert notes == [first, "" if limit == "60" else jobs.NOT_RUN]
    assert "s left)" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(setup: Setup) -> None:
        raise KeyboardInterrupt

    one_group(monkeypatch, Check("interrupted", interrupted))
    with pytest.raises(KeyboardInterrupt):
        run.main(["--cpu", "--out", str(tmp_path)])
    assert not json.loads((tmp_path / run.RESULTS).read_text())["complete"]


def results_of_a_gpu(toy: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    group = json.loads(json.dumps(toy[0]))
    for check in group["checks"]:
        check["figures"] = [report.judged(figure, small=False) for figure in check["figures"]]
    machine = {"card": "A card", "torch": "2.11", "cuda": "13", "driver": "580", "small": False}
    about = {"date": "2026-01-02", "seconds": 300.0, "machine": machine}
    return {**about, "groups": [group]}


def test_the_section_of_the_page(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.json"
    file.write_text(json.dumps(results_of_a_gpu(toy)))
    assert run.main(["--page", str(file)]) == 0
    page = capsys.readouterr().out
    assert page.startswith("### A card\n\nA card, torch 2.11, CUDA 13, driver 580, on 2026-01-02.")
    assert "3 passed, 4 failed and 1 were skipped" in page
    assert "| expanded / plain, forward | ViT-B/16: 1.07 | <= 1.08 | met |" in page
    assert "| ViT-B/16: 1.20 (16 clips) | <= 1.10 | missed |" in page
    assert page.count("not measured yet") == len(ROWS) - 3


def test_the_page_has_the_table() -> None:
    """Without a measured machine, the page says so."""
    text = (REPO / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = text.partition("\n## On a GPU\n")[2].partition("\n## ")[0]
    assert "python -m tests.device" in section
    assert "\n### " in section or report.page(None) in section
