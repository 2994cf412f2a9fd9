"""The shapes world from end to end at its smallest size, and the files that it writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from multiprocessing import active_children
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from examples.shapes import clips, results, run, schedule
from examples.shapes.progress import PHASES, Advance, Phase, Progress
from examples.shapes.results import Table
from examples.shapes.studies import (
    AVERAGE,
    LAST,
    MAIN,
    OPEN_VCLIP,
    ROW_OPEN_VCLIP,
    Averaging,
    Task,
)
from examples.shapes.world import TEMPLATES
from openvclip.checkpoints import load_checkpoint, read_contract
from openvclip.models.labels import read_labels
from tests.forked import CONTEXT, run_module, started


def _made_results() -> results.Results:
    """Two seeds and three lambdas, with numbers for which each choice is known."""

    def row(shift: float) -> dict[str, dict[str, float]]:
        return {
            "seen_test": {"0": 0.6 + shift, "0.5": 0.5, "0.8": 0.3},
            "development": {"0": 0.3, "0.5": 0.5 + shift, "0.8": 0.4},
            "unseen": {"0": 0.9, "0.5": 0.4 + shift, "0.8": 0.2},
        }

    clip = {name: {"1": 0.25} for name in ("seen_test", "development", "unseen")}
    seeds = {
        str(seed): {
            "openvclip": {"rows": {"average": row(0.1 * seed)}},
            "finetune": {"rows": {"last": row(0.0)}},
            "clip": {"rows": {"last": clip}},
        }
        for seed in range(2)
    }
    return {"settings": {}, "environments": [], "seeds": seeds}


def test_lambda_is_chosen_on_development_shapes_alone() -> None:
    made = _made_results()
    assert Table(MAIN, made).chosen_lambda(ROW_OPEN_VCLIP) == 0.5  # unseen would say 0
    for seed in made["seeds"].values():
        seed["openvclip"]["rows"]["average"]["development"]["0.8"] = 1.0
    assert Table(MAIN, made).chosen_lambda(ROW_OPEN_VCLIP) == 0.8


def test_table_by_hand() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in results.table(_made_results()).splitlines()
    ]
    assert rows[2] == ["CLIP", "", "", "", "", "", "25.0 ± 0.0", "25.0 ± 0.0"]
    half = ["50.0 ± 0.0", "45.0 ± 7.1"]
    assert rows[4] == ["Open-VCLIP", "65.0 ± 7.1", "90.0 ± 0.0", *half, "0.5", *half]
    assert len(rows) == 5


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.save_results({"settings": {"a": 1}, "seeds": {}}, path)
    assert results.load_results(path, {"a": 1})["settings"] == {"a": 1}
    with pytest.raises(FileExistsError, match="other settings"):
        results.load_results(path, {"a": 2})


def test_results_say_how_many_runs_came_from_where(tmp_path: Path) -> None:
    saved = results.load_results(tmp_path / "results.json", {})
    abacus, loom = {"torch": "1", "machine": "abacus"}, {"torch": "2", "machine": "loom"}
    results.count_run(saved, abacus)
    assert results.origins(saved) == "abacus; torch 1"
    for environment in (loom, abacus, loom, loom):
        results.count_run(saved, environment)
    assert results.origins(saved) == "2 runs on abacus; torch 1. 3 runs on loom; torch 2"
    results.save_results(saved, tmp_path / "results.json")
    assert results.load_results(tmp_path / "results.json", {}) == saved


def test_results_of_a_run_that_was_another_are_not_mixed(tmp_path: Path) -> None:
    saved: results.Results = {"settings": {}, "seeds": {}}
    task = Task(OPEN_VCLIP, 0, (AVERAGE,))
    entry = {"definition": OPEN_VCLIP.definition(), "rows": {AVERAGE: {}}}
    results.enter(saved, task, entry)
    results.require_definitions(saved, [OPEN_VCLIP], tmp_path)
    entry["definition"]["boundary"] = "mask"
    with pytest.raises(FileExistsError, match=r"a run 'openvclip' of other settings.*'mask'"):
        results.require_definitions(saved, [OPEN_VCLIP], tmp_path)


def test_a_task_is_done_when_all_its_weights_are_there() -> None:
    saved: results.Results = {"seeds": {"0": {"openvclip": {"rows": {LAST: {}, AVERAGE: {}}}}}}
    assert results.holds(saved, Task(OPEN_VCLIP, 0, (AVERAGE,)))
    assert not results.holds(saved, Task(OPEN_VCLIP, 0, (AVERAGE, Averaging(1, 0.25))))
    assert not results.holds(saved, Task(OPEN_VCLIP, 1, (AVERAGE,)))


def test_other_weights_of_a_run_stay() -> None:
    saved: results.Results = {"seeds": {"0": {"openvclip": {"rows": {LAST: {"a": 1}}}}}}
    task = Task(OPEN_VCLIP, 0, (AVERAGE,))
    results.enter(saved, task, {"rows": {AVERAGE: {"b": 2}}, "seconds": 5.0})
    rows = {LAST: {"a": 1}, AVERAGE: {"b": 2}}
    assert saved["seeds"]["0"]["openvclip"] == {"rows": rows, "seconds": 5.0}


class Started(NamedTuple):
    """A run of the command in another process."""

    process: BaseProcess
    log: Path
    errors: Path
    open_end: Connection

    def wait_for(self, beginning: str) -> None:
        """Wait until the process has printed a line with this beginning."""
        while not re.search(f"^{beginning}.*\n", self.log.read_text(), re.MULTILINE):
            assert self.process.is_alive(), f"no {beginning!r}: {self.errors.read_text()}"
            time.sleep(0.02)

    def join(self) -> int | None:
        """Wait for the end of the process and of its workers; return its exit status."""
        assert self.open_end.poll(120)  # at the end of the file: all have closed the other end
        self.process.join(120)
        return self.process.exitcode


def _command(arguments: list[str], _: Connection) -> None:
    """``python -m examples.shapes.run``, whose workers are forks: this process has one thread.

    The process and its workers hold the connection until they end.
    """
    for module in (clips, schedule):
        vars(module)["get_context"] = lambda _: multiprocessing.get_context("fork")
    vars(run)["measure_speed"] = lambda _: None  # the fixture "finished" measures it
    run.main(arguments)


@contextmanager
def _started(out: Path, jobs: int) -> Iterator[Started]:
    """Start the command of the README at its smallest size."""
    number = sum(1 for _ in out.parent.glob("*.log"))
    log, errors = out.parent / f"{number}.log", out.parent / f"{number}.errors"
    log.touch()
    flags = ["--smoke", "--jobs", str(jobs), "--out", str(out)]
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with ours, started(_command, flags, theirs, log=log, errors=errors) as process:
        theirs.close()
        yield Started(process, log, errors, ours)


def _found(out: Path) -> dict[str, Any]:
    """Return the runs in a results file by name."""
    runs: dict[str, Any] = json.loads((out / "results.json").read_text())["seeds"]["0"]
    return runs


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that was killed before its last result, and its finished runs."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with _started(out, jobs=1) as command:
        command.wait_for("2 of 3")
        command.process.kill()
        command.join()
    return out, _found(out)


class Watched(Progress):
    """A progress bar that adds up what each phase gains, and keeps the sums at the end."""

    advanced: ClassVar[dict[Phase, float]] = {}
    done = total = 0.0

    def add(self, advance: Advance) -> None:
        before = self.estimator.done
        super().add(advance)
        gained = self.estimator.done - before
        Watched.advanced[advance.phase] = Watched.advanced.get(advance.phase, 0.0) + gained

    def __exit__(self, *error: object) -> None:
        Watched.done, Watched.total = self.estimator.done, self.estimator.total
        super().__exit__(*error)


def _begin_workers_quickly(patch: pytest.MonkeyPatch) -> None:
    """Workers as spawned processes are, with PyTorch imported; other tests spawn them."""
    for module in (clips, schedule):
        patch.setattr(module, "get_context", lambda _: CONTEXT)


@pytest.fixture(scope="module")
def finished(
    killed: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a complete run with two worker processes, and its output.

    The run draws some clips itself and finds the others.
    """
    out = tmp_path_factory.mktemp("finished") / "out"
    shutil.copytree(killed[0] / "clips", out / "clips")
    for path in sorted(out.rglob("train-*.mp4"))[:8]:
        path.unlink()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        _begin_workers_quickly(patch)
        patch.setattr(run, "Progress", Watched)
        run.main(["--smoke", "--jobs", "2", "--out", str(out)])
    return out, output.getvalue()


def test_the_bar_advances_in_every_phase_of_a_run(finished: tuple[Path, str]) -> None:
    assert set(Watched.advanced) == set(PHASES)
    assert all(gained > 0 for gained in Watched.advanced.values())
    # The reports alone make nearly the whole run: what finished tasks add is little.
    assert Watched.done == pytest.approx(Watched.total)
    assert sum(Watched.advanced.values()) > 0.9 * Watched.total
    last_run = r"^3 of 3: openvclip, seed 0, \d+ s; about 0 s to go$"
    assert re.search(last_run, finished[1], re.MULTILINE)


def test_the_run_leaves_what_it_names(finished: tuple[Path, str]) -> None:
    out, text = finished
    for name in ("tradeoff.png", "results.json", "openvclip-shapes.safetensors"):
        assert (out / name).is_file()
        assert name in text
    assert (out / "table.md").read_text() in text
    assert set(_found(out)) == {"clip", "finetune", "openvclip"}
    assert not list(out.rglob("*.tmp"))


def test_ctrl_c_keeps_what_is_done(killed: tuple[Path, dict[str, Any]]) -> None:
    out, before = killed
    with _started(out, jobs=2) as command:
        command.wait_for("1 of 3 runs to do")
        os.kill(command.process.pid or 0, signal.SIGINT)
        assert command.join() == 1
    assert (
        command.errors.read_text()
        == "\nStopped. Finished runs are kept. Run the same command again to continue.\n"
    )
    assert _found(out) == before


def test_a_killed_run_goes_on_and_gives_the_same_as_two_processes_undisturbed(
    killed: tuple[Path, dict[str, Any]], finished: tuple[Path, str]
) -> None:
    out, before = killed
    with _started(out, jobs=1) as command:
        assert command.join() == 0, command.errors.read_text()
    assert "1 of 3 runs to do, 1 at a time" in command.log.read_text()
    after = _found(out)
    assert set(before) == {"clip", "finetune"}
    assert {name: after[name] for name in before} == before
    other = _found(finished[0])
    assert set(after) == set(other)
    for name, entry in after.items():
        assert entry["rows"] == other[name]["rows"]
    same = load_checkpoint(finished[0] / run.AVERAGED)
    for name, value in load_checkpoint(out / run.AVERAGED).items():
        assert torch.equal(value, same[name])


def test_an_error_in_a_worker_is_one_clear_message(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin_workers_quickly(monkeypatch)
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "clips", out / "clips")
    broken = next((out / "clips").rglob("train-*.mp4"))
    broken.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"seed 0 failed: RuntimeError: Some clips cannot be read"):
        run.main(["--smoke", "--jobs", "1", "--out", str(out)])
    assert not active_children()


def test_final_weights_lie_between_clip_and_the_average(finished: tuple[Path, str]) -> None:
    from examples.shapes.model import create_model

    out, _ = finished
    saved = Table(MAIN, json.loads((out / "results.json").read_text()))
    lam = saved.chosen_lambda(ROW_OPEN_VCLIP)
    final = load_checkpoint(out / "openvclip-shapes.safetensors")
    contracts = [
        read_contract(out / name) for name in ("openvclip-shapes.safetensors", run.AVERAGED)
    ]
    of_final, of_average = (contract for contract in contracts if contract is not None)
    assert (of_final.lam, of_average.lam) == (lam, 0.0)
    assert of_average.difference(of_final) is None
    average, clip = load_checkpoint(out / run.AVERAGED), create_model()[0].state_dict()
    for name, value in final.items():
        expected = lam * clip[name] + (1 - lam) * average[name]
        torch.testing.assert_close(value.float(), expected, rtol=1e-3, atol=1e-4)


def test_the_last_line_can_be_pasted(finished: tuple[Path, str], tmp_path: Path) -> None:
    line = finished[1].strip().splitlines()[-1]
    command = shlex.split(line)
    assert command[:2] == ["openvclip", "predict"]
    log, errors = tmp_path / "log", tmp_path / "errors"
    with started(run_module, command[0], command[1:], log=log, errors=errors) as process:
        process.join(120)
    assert process.exitcode == 0, errors.read_text()
    assert len(re.findall(r"^ *\d+\.\d%  \w+ \w+$", log.read_text(), re.MULTILINE)) == 5


def test_a_finished_run_is_not_repeated(finished: tuple[Path, str]) -> None:
    out, text = finished
    before = (out / "results.json").stat().st_mtime_ns
    run.main(["--smoke", "--out", str(out)])
    assert (out / "results.json").stat().st_mtime_ns == before
    assert (out / "table.md").read_text() in text


def test_the_folder_is_a_model_that_knows_how_it_is_used(finished: tuple[Path, str]) -> None:
    out, _ = finished
    contract = read_contract(out)
    assert contract is not None
    assert contract.weights == "openvclip-shapes.safetensors"
    assert read_contract(out / "openvclip-shapes.safetensors") == contract.with_(weights=None)
    assert (contract.frames.sampler, contract.templates) == ("uniform", tuple(TEMPLATES))
    assert contract.lam == Table(
        MAIN, json.loads((out / "results.json").read_text())
    ).chosen_lambda(ROW_OPEN_VCLIP)
    assert len(read_labels(out / "classes.txt")) == 192


def test_nothing_to_do_is_refused() -> None:
    for flag in ("--seeds", "--jobs"):
        with pytest.raises(SystemExit, match=f"{flag} 0: expected at least 1"):
            run.main([flag, "0"])


def test_figure_is_drawn_from_results(tmp_path: Path) -> None:
    results.draw(Table(MAIN, _made_results()), tmp_path / "t.png")
    from matplotlib.image import imread

    assert np.asarray(imread(tmp_path / "t.png")).std() > 0.05
