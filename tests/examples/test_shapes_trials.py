"""The comparison: cells, clips, the loop, the table of methods, tuning, the run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from examples.shapes import run
from examples.shapes.results import Results, only_run
from examples.shapes.trials import command, gpu, runner
from examples.shapes.trials.cells import (
    DEVELOPMENT_ACTIONS,
    DIVISIONS,
    QUESTIONS,
    REPORTED_ACTIONS,
    TUNING,
    cell,
)
from examples.shapes.trials.clips import Clips, load_list
from examples.shapes.trials.registry import (
    METHODS,
    POINTS,
    RUNS,
    TRAININGS,
    Method,
    Training,
    register,
)
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.runner import Runner
from examples.shapes.trials.tasks import Place, Task, do
from examples.shapes.trials.tuning import best, cell_tasks, choose, has_result, tuning_tasks
from examples.shapes.trials.workshop import Workshop
from examples.shapes.world import ACTIONS, DEVELOPMENT, SEEN, UNSEEN
from openvclip.training.methods import choose_trained
from tests.examples.trial_results import SMALL as SIZES
from tests.examples.trial_results import tables_as_before
from tests.forked import started

ROWS = ("CLIP", "FINE-TUNE")


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The tables of methods as they were, after each test."""
    with tables_as_before():
        yield


# Cells


def test_all_divisions_occur_once_and_complements_follow_each_other() -> None:
    assert len(set(DIVISIONS)) == len(DIVISIONS) == 20
    for number in range(0, 20, 2):
        first, second = cell(number), cell(number + 1)
        assert set(first.trained_actions) == set(second.new_actions)
        assert set(second.trained_actions) == set(first.new_actions)
    trained = Counter(action for division in DIVISIONS for action in division)
    assert trained == dict.fromkeys(REPORTED_ACTIONS, 10)


@pytest.mark.parametrize("number", [0, 7, 25])
def test_the_splits_of_a_cell_are_disjoint(number: int) -> None:
    each = cell(number)
    lists = {name: set(each.pairs(name)) for name in ("trained", "shapes", "actions")}
    assert set(each.pairs("train")) == lists["trained"]
    assert [len(pairs) for pairs in lists.values()] == [24, 24, 24]
    assert not lists["trained"] & lists["shapes"]
    assert {shape for shape, _ in lists["trained"]} == set(SEEN)
    assert {shape for name in ("shapes", "actions") for shape, _ in lists[name]} == set(UNSEEN)
    actions = {action for _, action in lists["actions"]}
    assert not actions & {action for _, action in lists["trained"]}
    assert actions | set(each.trained_actions) | set(DEVELOPMENT_ACTIONS) == set(ACTIONS)


def test_settings_are_chosen_on_shapes_and_actions_that_no_result_uses() -> None:
    results = {pair for n in range(20) for name in QUESTIONS for pair in cell(n).pairs(name)}
    chosen_on = {pair for name in ("shapes", "actions") for pair in TUNING.pairs(name)}
    assert not results & chosen_on
    assert {shape for shape, _ in chosen_on} == set(DEVELOPMENT)
    assert set(TUNING.new_actions) == set(DEVELOPMENT_ACTIONS)


def test_a_cell_has_a_number_below_that_of_the_tuning() -> None:
    for number in (-1, TUNING.number):
        with pytest.raises(ValueError, match="expected a number from 0"):
            cell(number)


# Clips


def test_a_list_is_the_same_if_it_is_made_again_and_differs_between_cells(tmp_path: Path) -> None:
    made = [load_list(cell(0), "actions", 3, tmp_path / name) for name in ("a", "b", "a")]
    assert all(np.array_equal(made[0].pixels, other.pixels) for other in made[1:])
    assert made[0].labels.tolist() == [0, 1, 2]
    other = load_list(cell(1), "actions", 3, tmp_path / "a")
    assert not np.array_equal(made[0].pixels, other.pixels)
    (video, label), *rest = made[0]
    assert (video.shape, label.shape, rest) == ((3, 4, 3, 32, 32), (3,), [])


def test_clips_of_some_classes_get_new_indices() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1, 1)
    clips = Clips(pixels, torch.tensor([0, 1, 2, 0, 1, 2])).of_classes([2, 0])
    assert clips.labels.tolist() == [1, 0, 1, 0]
    assert clips.pixels.flatten().tolist() == [0, 2, 3, 5]


# The loop


@pytest.fixture(scope="module")
def clips() -> Clips:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 2, 32, 32, 3), dtype=np.uint8)
    return Clips(pixels, torch.arange(24))


def test_the_loop_is_a_plain_loop_with_the_same_steps(clips: Clips) -> None:
    """Against a loop that is written out here, with float64 sums of the average."""
    workshop = Workshop(cell(0), clips, steps=4, batch_size=4)
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    result = workshop.fit(model, classifier, lr=1e-3)
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in parameters.values() if (p.ndim >= 2) == wide], "weight_decay": decay}
        for wide, decay in ((True, 0.01), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    batches, sums = workshop.batches(), dict[str, Tensor]()
    for step in range(4):
        rate = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * step / 3))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        video, label = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(classifier(video), label).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        if step >= 2:
            for name, p in parameters.items():
                sums[name] = sums.get(name, torch.zeros(())) + p.detach().double()
    for name, p in parameters.items():
        torch.testing.assert_close(result.ends["last"][name], p.detach(), rtol=1e-4, atol=1e-6)
        mean = (sums[name] / 2).float()
        torch.testing.assert_close(result.ends["swa"][name], mean, rtol=1e-4, atol=1e-6)
    assert result.parameters == sum(p.numel() for p in parameters.values())
    assert result.report()["steps"] == 4


def test_every_training_of_a_cell_has_the_same_batches_unless_it_has_another_order(
    clips: Clips,
) -> None:
    labels = {}
    for name, order in (("a", 0), ("b", 0), ("c", 1)):
        batches = Workshop(cell(0), clips, 9, 5, order).batches()
        labels[name] = [next(batches)[1].tolist() for _ in range(9)]
    assert labels["a"] == labels["b"] != labels["c"]
    assert Counter(label for batch in labels["a"][:4] for label in batch).most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", ["plain", "lora", "lora + iwr", "vita"])
def test_a_training_changes_everything_that_it_calls_trained(clips: Clips, name: str) -> None:
    frames = np.repeat(clips.pixels, 2, axis=1)  # the prompts of Vita-CLIP are for 4 frames
    workshop = Workshop(cell(0), replace(clips, pixels=frames), steps=2, batch_size=4)
    result = TRAININGS[name](workshop, TRAININGS[name].grid[0])
    changed = {
        entry
        for entry, value in result.ends["last"].items()
        if entry not in workshop.clip or not torch.equal(value, workshop.clip[entry])
    }
    layers = {entry for entry in workshop.clip if entry.startswith("visual.transformer")}
    if name == "plain":
        assert changed == {n for n in workshop.clip if n.startswith("visual.")} | {"logit_scale"}
    elif name == "vita":
        assert changed
        assert not changed & set(workshop.clip)
    else:  # all matrices of the layers, and nothing else
        assert changed == {entry for entry in layers if workshop.clip[entry].ndim == 2}


def test_a_part_has_the_clips_of_an_action_and_its_share_of_the_steps(clips: Clips) -> None:
    workshop = Workshop(cell(0), clips, steps=200, batch_size=16)
    parts = [workshop.part([action]) for action in workshop.cell.trained_actions]
    assert sum(len(part.clips) for part in parts) == len(clips)
    assert [part.steps for part in parts] == [67, 67, 67]
    for part in parts:
        (action,) = part.cell.trained_actions
        whole = workshop.names()
        for place, label in enumerate(part.clips.labels.tolist()):
            index = next(
                i
                for i, row in enumerate(clips.pixels)
                if np.array_equal(row, part.clips.pixels[place])
            )
            assert part.names()[label] == whole[index]
            assert part.names()[label].endswith(action)


# The table


def test_every_method_has_the_same_budget_and_words_for_the_page() -> None:
    for name in PUBLISHED:
        method = METHODS[name]
        grid = TRAININGS[method.needs[0]].grid if method.needs and method.like is None else ({},)
        assert len(grid) <= RUNS
        assert len(grid) * len(method.params) * len(method.lams) <= POINTS
        assert all((method.does, method.cost, method.when, method.beware)), name
    trained = [n for n in PUBLISHED if METHODS[n].needs and METHODS[n].like is None]
    assert {len(TRAININGS[METHODS[name].needs[0]].grid) for name in trained} == {RUNS}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Method("CLIP"), "'CLIP' is registered already"),
        (Method("new", ("nothing",)), "needs the training 'nothing', which is not registered"),
        (Method("new", ("plain",), like="nobody"), "is like 'nobody', which is not registered"),
        (Method("new", ("plain",), params=({}, {})), "has 48 points to try"),
        (Training("new", lambda _: None, ({},) * 5), "has 5 settings to try"),  # type: ignore[arg-type, return-value]
    ],
)
def test_a_wrong_entry_is_refused(entry: Method | Training, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register(entry)


# Tuning


def _point(value: float, lam: float = 0.0) -> dict[str, Any]:
    return {"params": {}, "lam": lam, "accuracy": dict.fromkeys(QUESTIONS, value)}


def test_the_point_with_the_best_mean_is_chosen_for_each_method() -> None:
    mixed = {"params": {}, "lam": 0.3, "accuracy": {"trained": 0.9, "shapes": 0.1, "actions": 0.4}}
    assert best([_point(0.4), mixed, _point(0.46)]) is mixed
    tuned = {
        "a": {"settings": {"lr": 1}, "points": [_point(0.5, 0.2), _point(0.3)]},
        "b": {"settings": {"lr": 2}, "points": [_point(0.6, 0.4)]},
    }
    results: Results = {"tuning": {"methods": {"FINE-TUNE": tuned}}}
    chosen = choose(results, ["FINE-TUNE", "SWA"])
    assert chosen == {"FINE-TUNE": {"training": {"lr": 2}, "params": {}, "lam": 0.4}}


def test_a_run_of_one_row_has_the_settings_that_it_shares_with_rows_of_earlier_runs() -> None:
    def tuned(*values: float) -> dict[str, Any]:
        return {
            f"lr={rate}": {"settings": {"lr": rate}, "points": [_point(value)]}
            for rate, value in enumerate(values)
        }

    methods = {"FINE-TUNE": tuned(0.5, 0.6), "SWA": tuned(0.9, 0.5)}
    for names in (["FINE-TUNE"], ["FINE-TUNE", "SWA"]):
        chosen = choose({"tuning": {"methods": methods}}, names)
        assert {name: choice["training"]["lr"] for name, choice in chosen.items()} == dict.fromkeys(
            names, 0
        )


def test_failures_of_other_methods_stay_in_the_results(tmp_path: Path) -> None:
    Runner(Place(tmp_path, SIZES), ("CLIP",), choices={}).run()
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    failure = {"text": "no luck", "trace": ""}
    results["failures"] = dict.fromkeys(
        ("cell-00: LoRA + IWR lr=0.1", "cell-00: LoRA lr=0.1", "cell-07: LoRA lr=0.1"), failure
    )
    path.write_text(json.dumps(results))
    again = Runner(Place(tmp_path, SIZES), ("LoRA",), choices={})
    assert set(again.run()["failures"]) == {"cell-00: LoRA + IWR lr=0.1", "cell-07: LoRA lr=0.1"}
    assert again.report() == ""


def test_a_method_that_is_like_another_waits_for_its_settings() -> None:
    def trainings(chosen: dict[str, Any]) -> set[str]:
        tasks = tuning_tasks(["Model Stock"], chosen)
        return {task.key for task in tasks if task.kind == "training"}

    assert trainings({}) == set()
    orders = {f"plain{order} lr=0.5" for order in ("", ", order 1", ", order 2")}
    assert trainings({"FINE-TUNE": {"training": {"lr": 0.5}}}) == orders


def test_points_of_an_earlier_choice_are_not_taken_for_those_of_the_present() -> None:
    """A method like another has the present settings of the other; old points stay in the file."""
    plain = {"a": {"settings": {"lr": 1}, "points": [_point(0.5, 0.2)]}}
    soup = {
        "old": {"settings": {"lr": 9}, "points": [_point(0.8, 0.2)]},
        "new": {"settings": {"lr": 1}, "points": [_point(0.6, 0.5)]},
    }
    results: Results = {"tuning": {"methods": {"FINE-TUNE": plain, "soup of 3 runs": soup}}}
    chosen = choose(results, ["FINE-TUNE", "soup of 3 runs"])
    assert chosen["soup of 3 runs"] == {"training": {"lr": 1}, "params": {}, "lam": 0.5}


def test_only_a_row_with_the_same_settings_numbers_and_lambdas_is_a_result() -> None:
    choice = {"training": {"lr": 0.5}, "params": {"alpha": 0.1}, "lam": 0.0}
    *_, task = cell_tasks(cell(3), ["LiNeS"], {"LiNeS": choice})
    row = {
        "settings": {"lr": 0.5},
        "points": [{"params": {"alpha": 0.1}, "lam": 0.0, "accuracy": {}}],
    }
    results: Results = {"tuning": {}, "cells": {"3": {"methods": {"LiNeS": row}, "trainings": {}}}}
    assert has_result(results, task)
    for other in (
        replace(task, settings=(("lr", 0.25),)),
        replace(task, params=((("alpha", 0.2),),)),
        replace(task, lams=(0.0, 0.3)),
        replace(task, cell=cell(4)),
        replace(task, cell=TUNING),
    ):
        assert not has_result(results, other)
    assert set(results["cells"]) == {"3"}  # a question changes nothing
    assert results["tuning"] == {}
    tuned = {"LiNeS lr=0.5": row}
    results = {"tuning": {"methods": {"LiNeS": tuned}}, "cells": {}}
    assert has_result(results, replace(task, cell=TUNING))
    assert not has_result(results, replace(task, cell=TUNING, lams=(0.2,)))


def test_rows_of_a_cell_share_their_trainings() -> None:
    choice = {"training": {"lr": 0.5}, "params": {}, "lam": 0.2}
    tasks = cell_tasks(cell(3), ["FINE-TUNE", "SWA", "EMA"], dict.fromkeys(METHODS, choice))
    assert [task.key for task in tasks if task.kind == "training"] == ["plain lr=0.5"]
    rows = {task.name: task.lams for task in tasks if task.kind == "method"}
    assert rows == {"FINE-TUNE": (0.0, 0.2, 0.3, 0.6), "SWA": (0.2,), "EMA": (0.2,)}


# The run


def _plain(results: Results) -> Any:
    """Results without what depends on the clock."""
    if isinstance(results, dict):
        hidden = ("seconds", "step_seconds", "environments")
        return {key: _plain(value) for key, value in results.items() if key not in hidden}
    return [_plain(value) for value in results] if isinstance(results, list) else results


def small_run(out: str) -> None:
    """The comparison with few methods and tiny lists."""
    TRAININGS["plain"] = replace(TRAININGS["plain"], grid=({"lr": 1e-3},))
    METHODS["FINE-TUNE"] = replace(METHODS["FINE-TUNE"], lams=(0.0, 0.5), unlabelled=False)
    Runner(Place(Path(out), SIZES), ROWS).run()


def test_a_killed_run_goes_on_and_comes_to_the_same_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "killed", tmp_path / "killed" / "results.json"
    with started(small_run, str(out), log=tmp_path / "log") as process:
        while process.is_alive() and not (path.exists() and "plain lr" in path.read_text()):
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    small_run(str(out))
    first = capsys.readouterr().out
    assert "to go)" in first
    small_run(str(tmp_path / "whole"))
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")
    ]
    assert _plain(results[0]) == _plain(results[1])
    assert set(results[0]["cells"]["0"]["methods"]) == set(ROWS)
    assert not (out / "clips" / "cell-00").exists()  # the cell is finished
    capsys.readouterr()
    left = out / "clips" / "cell-00" / "trained-6.npy"  # as after a kill at the end of the cell
    left.parent.mkdir()
    left.touch()
    small_run(str(out))
    assert capsys.readouterr().out == ""  # nothing is left to do
    assert not left.parent.exists()


def test_an_error_in_one_method_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def work(place: Place, task: Task, _: object = None) -> Any:
        done.append(str(task))
        if task.kind == "clips":
            path = (
                place.clips
                / task.cell.name
                / f"{task.name}-{place.count(task.cell, task.name)}.npy"
            )  # type: ignore[arg-type]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            return {}
        if task.kind == "training":
            if task.name == "l2":
                return do(place, replace(task, settings=(("lr", "wrong"), ("weight", 1.0))))
            place.store.path(task.cell, task.key).parent.mkdir(parents=True, exist_ok=True)
            place.store.path(task.cell, task.key).touch()
            return {"step_seconds": 1.0, "steps": 1, "loss": 1.0, "parameters": 1, "seconds": 1.0}
        accuracy = dict.fromkeys((*QUESTIONS, "stills"), 0.5)
        points = [{"params": {}, "lam": lam, "accuracy": accuracy} for lam in task.lams]
        return {"points": points, "seconds": 1.0}

    monkeypatch.setattr(runner, "do", work)
    run = Runner(Place(tmp_path, SIZES), ("FINE-TUNE", "L2"))
    results = run.run()
    assert set(results["cells"]["0"]["methods"]) == {"FINE-TUNE"}
    assert len(results["failures"]) == 4  # of the settings of L2 that were tried
    assert "4 tasks failed" in run.report()
    assert len(done) == len(set(done))
    before = len(done)
    Runner(Place(tmp_path, SIZES), ("FINE-TUNE", "L2")).run()
    assert all("l2" in task for task in done[before:] if "clips" not in task)


def test_results_of_other_sizes_are_refused(tmp_path: Path) -> None:
    Runner(Place(tmp_path, SIZES), ("CLIP",), choices={}).run()
    with pytest.raises(FileExistsError, match="results of other settings"):
        Runner(Place(tmp_path, replace(SIZES, steps=3)), ("CLIP",), choices={})


@pytest.mark.parametrize("main", [command.main, run.main])
def test_a_second_command_on_the_same_folder_is_refused(
    tmp_path: Path, main: Callable[[list[str]], None]
) -> None:
    with only_run(tmp_path), pytest.raises(SystemExit, match=rf"another process \({os.getpid()}\)"):
        main(["--smoke", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    with only_run(tmp_path):  # the lock ended
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "0"], "--cells 0: expected at least 1"),
        (["--only", "nobody"], "--only 'nobody': expected one of CLIP"),
        (["--list", "--full"], "--full"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_quick_mode_has_the_published_settings_or_those_of_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PUBLISHED", tmp_path / "results.json")
    choices = command.quick_choices(command.QUICK_METHODS)
    assert set(choices) == set(command.QUICK_METHODS)
    assert choices["Open-VCLIP"]["lam"] == 0.5
    (tmp_path / "results.json").write_text('{"chosen": {"SWA": {"lam": 0.2}}}')
    assert command.quick_choices(["SWA"]) == {"SWA": {"lam": 0.2}}


def test_the_script_for_a_gpu_stops_in_time_and_tables_complete_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock of its own: each method takes 10 seconds, and drawing takes no time."""
    now = [0.0]
    methods = gpu.GPU_METHODS

    def run_cell(*_: object) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in methods:
            now[0] += 10
            accuracy = dict.fromkeys((*QUESTIONS, "stills"), 0.5)
            yield name, {"points": [{"params": {}, "lam": 0.0, "accuracy": accuracy}]}

    def pretrained(*, batches: Iterator[Any], **_: object) -> None:
        list(batches)

    class Now:
        """A future with a result."""

        def result(self, timeout: float | None = None) -> None:
            now[0] += 0.0

    class Pool:
        """A pool that does nothing."""

        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> Now:
            now[0] += 1
            return Now()

        def shutdown(self, **_: object) -> None: ...

    for name, value in (
        ("_now", lambda: now[0]),
        ("_run_cell", run_cell),
        ("pretrain", pretrained),
        ("ProcessPoolExecutor", Pool),
        ("use_original", lambda *_: None),
    ):
        monkeypatch.setattr(gpu, name, value)
    arguments = ["--cpu", "--smoke", "--out", str(tmp_path), "--workers", "1", "--seconds"]
    gpu.main([*arguments, "35"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cells"]["0"]["methods"]) == 3  # begun at 6, 16 and 26 seconds
    assert "0 complete cells," in capsys.readouterr().out
    gpu.main([*arguments, "1000"])
    assert "1 complete cell," in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did 0 of 2 steps in 1 seconds"):
        gpu.main([*arguments, "1"])
