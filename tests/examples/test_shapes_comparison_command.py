"""The command of the comparison: its results, a kill, tuning, refusals, its page."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.shapes import comparison, comparison_methods
from examples.shapes.clips import make_clips
from examples.shapes.comparison_methods import Run
from examples.shapes.comparison_settings import (
    CANDIDATES,
    METHODS,
    RATES,
    SMOKE,
)
from examples.shapes.experiment import clips_folder
from examples.shapes.model import create_model
from examples.shapes.report import comparison_page
from examples.shapes.report.comparison_table import ROWS
from examples.shapes.results import Results, save_results
from tests.examples.comparison_results import TIMING, cells, made_result, tuning_results
from tests.forked import started


@pytest.fixture(scope="module", autouse=True)
def cheap_models() -> Iterator[None]:
    """Copies of one model in place of half a second for each."""
    model, tokenizer = create_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_methods, "create_model", lambda: (deepcopy(model), tokenizer))
        yield


def _plain(results: Results) -> dict[str, Any]:
    """The seeds' part of results without what depends on the clock."""
    seeds: dict[str, Any] = deepcopy(results["seeds"])
    for groups in seeds.values():
        for runs in groups.values():
            for run in runs.values():
                del run["seconds"]
    return seeds


COMMAND = ["--smoke", "--seeds", "1", "--out"]
SMALL = replace(SMOKE, clips=replace(SMOKE.clips, test=24))  # 16 clips of base classes, 8 of novel


def command(out: str) -> None:
    """``python -m examples.shapes.comparison`` with fewer clips for its tests."""
    comparison.SMOKE = SMALL
    comparison.main([*COMMAND, out])


@pytest.fixture(scope="module", autouse=True)
def few_clips() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "SMOKE", SMALL)
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The comparison at its smallest: killed after the first results, and then continued.

    Returns its folder, and the results as the killed process left them.
    """
    out = tmp_path_factory.mktemp("comparison") / "out"
    make_clips(clips_folder(out, 0), replace(SMALL.clips, seed=0), num_workers=1, progress=False)
    path = out / "results.json"
    with started(command, str(out), log=out.parent / "log") as process:
        while process.is_alive() and not path.exists():
            time.sleep(0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    before = json.loads(path.read_text())
    threads = torch.get_num_threads()
    try:
        comparison.main([*COMMAND, str(out)])
    finally:
        torch.set_num_threads(threads)
    return out, before


def test_every_run_leaves_its_result(killed: tuple[Path, Results]) -> None:
    results = json.loads((killed[0] / "results.json").read_text())
    assert list(results["seeds"]["0"]) == ["closed-set and zero-shot", "base-to-novel", "1 shots"]
    for setting, runs in results["seeds"]["0"].items():
        assert list(runs) == list(SMOKE.methods)
        tests = set(SMOKE.settings[setting].tests)
        assert set(runs["CLIP"]["accuracy"]) == tests
        assert set(runs["Open-VCLIP"]["accuracy"]) == tests | {"development"}
        assert list(runs["Open-VCLIP"]["accuracy"]["development"]) == ["0", "0.3", "0.5", "0.7"]
    assert not list(killed[0].glob("*.tmp"))


def test_a_killed_comparison_goes_on_and_repeats_nothing(killed: tuple[Path, Results]) -> None:
    out, before = killed
    after = json.loads((out / "results.json").read_text())
    finished = [(s, m) for s, runs in before["seeds"]["0"].items() for m in runs]
    assert 0 < len(finished) < 12
    for setting, method in finished:  # with the time that it took
        assert after["seeds"]["0"][setting][method] == before["seeds"]["0"][setting][method]


def test_a_run_is_the_same_in_any_process(killed: tuple[Path, Results]) -> None:
    """So it does not matter what was run before it, or where the work was cut off."""
    out, _ = killed
    after = json.loads((out / "results.json").read_text())["seeds"]["0"]
    job = comparison.Job(0, "base-to-novel", "Vita-CLIP", "base-to-novel", "Vita-CLIP")
    again = comparison.run_job(job, SMALL, out)
    expected = after["base-to-novel"]["Vita-CLIP"]
    assert again["loss"] == expected["loss"]
    assert again["accuracy"] == expected["accuracy"]


def test_tuning_tries_each_rate_with_the_best_of_the_families_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, dict[str, float]]] = []

    def run_job(job: comparison.Job, *_: Any) -> dict[str, Any]:
        rates = dict(job.rates)
        tried.append((job.method, rates))
        return made_result({"seen": {"0": rates[job.group]}, "development": {"0": 0.0}})

    monkeypatch.setattr(comparison, "run_job", run_job)
    comparison.main(["--smoke", "--tune", "--out", str(tmp_path)])
    best = {family: max(rates) for family, rates in CANDIDATES.items()}
    assert comparison.best_rates(json.loads((tmp_path / "tuning.json").read_text())) == best
    assert len(tried) == sum(map(len, CANDIDATES.values()))
    assert [rates["vifi"] for method, rates in tried if method == "bridge and prompt"] == [
        best["vifi"]
    ] * len(CANDIDATES["vifi-prompts"])
    comparison.main(["--smoke", "--tune", "--out", str(tmp_path)])
    assert len(tried) == sum(map(len, CANDIDATES.values()))  # nothing was repeated


def test_results_of_other_settings_are_refused(
    killed: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RATES, "vita", 1.0)
    with pytest.raises(SystemExit, match="results of other settings"):
        comparison.main([*COMMAND, str(killed[0])])


@pytest.mark.parametrize("option", ["--seeds", "--jobs"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        comparison.main([option, "0"])
    assert f"{option} 0: expected at least 1" in capsys.readouterr().err


def test_the_page_is_made_from_a_run(killed: tuple[Path, Results], tmp_path: Path) -> None:
    save_results(tuning_results(), killed[0] / "tuning.json")
    save_results(TIMING, killed[0] / "timing.json")
    comparison_page.main([str(killed[0] / "results.json"), "--docs", str(tmp_path)])
    text = (tmp_path / "comparison.md").read_text()
    assert "**Not complete" not in text
    for name in (*comparison_page.FILES.values(), comparison_page.FIGURE):
        assert (tmp_path / "assets" / name).is_file()
        assert f"assets/{name}" in text
    rows = {row.label for row in ROWS if row.method in SMOKE.methods}
    assert rows <= set(cells(text))


def test_the_methods_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def learn(run: Run) -> None:
        order.append(run.method)
        run.seconds = [0.0, 2.0 + len(order), 99.0]

    monkeypatch.setattr(Run, "learn", learn)
    comparison.main(["--time", "--out", str(tmp_path)])
    timing = json.loads((tmp_path / "timing.json").read_text())
    learning = [name for name, method in METHODS.items() if method.family is not None]
    assert order == [METHODS[name] for name in learning] * 3
    assert list(timing["seconds"]) == learning
    assert timing["seconds"]["FINE-TUNE"] == [3.0, 3.0 + len(learning), 3.0 + 2 * len(learning)]
