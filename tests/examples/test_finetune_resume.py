"""Runs that are stopped and go on: bitwise the run that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import finetune
from openvclip.checkpoints import load_checkpoint
from openvclip.training.log import RunLog, Step
from openvclip.training.validation import Validation
from tests.examples.tiny_videos import command, write_shards, write_videos
from tests.forked import started
from tests.helpers import assert_same_state

FILES = ("finetuned", "averaged", "final")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos, also in four shards, and finished runs on both."""
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    write_shards(folder, 9, 4)
    finetune.main(command(folder, "files"))
    finetune.main(command(folder, "shards", *_shards(folder), files=False))
    return folder


def _shards(folder: Path) -> tuple[str, str]:
    return "--shards", str(folder / "part-{000..003}.tar")


def _assert_same_run(folder: Path, one: str, other: str) -> None:
    for name in FILES:
        a, b = (load_checkpoint(folder / run / f"{name}.safetensors") for run in (one, other))
        assert_same_state(a, b)
    lines = [_lines(folder / run) for run in (one, other)]
    assert lines[0] == lines[1]


def _lines(out: Path, having: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "lr", "alpha")
    return [{k: line[k] for k in names} for line in lines if having in line]


@contextmanager
def terminated_at(step: int) -> Iterator[None]:
    """A block in which SIGTERM comes to this process after a step."""
    log_step = RunLog.step

    def stop(log: RunLog, done: Step) -> None:
        log_step(log, done)
        if done.number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "step", stop)
        yield


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_ended_by_sigterm_twice_and_gone_on_with_other_workers(world: Path, kind: str) -> None:
    name, more = f"{kind}-again", _shards(world) if kind == "shards" else ()
    for step, workers in ((2, "0"), (4, "1")):
        with terminated_at(step), pytest.raises(SystemExit) as ended:
            finetune.main(
                command(world, name, *more, "--num-workers", workers, files=kind == "files")
            )
        assert ended.value.code == 143
        # The signal comes after the step has asked for it: the run saves after the next one.
        assert (world / name / f"checkpoint-{step + 1:08d}.pt").exists()
    finetune.main(command(world, name, *more, "--num-workers", "2", files=kind == "files"))
    _assert_same_run(world, kind, name)
    assert len(list((world / name).glob("checkpoint*"))) == 2


def test_each_epoch_is_validated_once_though_the_run_is_ended_at_its_end(world: Path) -> None:
    validated = ("--val-annotations", str(world / "train.csv"), "--val-videos", str(world))
    with terminated_at(1), pytest.raises(SystemExit):
        finetune.main(command(world, "validated", *validated))
    assert (world / "validated" / "checkpoint-00000002.pt").exists()
    assert _validated(world / "validated") == [2]
    finetune.main(command(world, "validated", *validated))
    assert _validated(world / "validated") == [2, 4, 6]
    assert _lines(world / "validated", "loss") == _lines(world / "files")


def test_an_epoch_whose_validation_was_cut_off_is_validated_afterwards(world: Path) -> None:
    arguments = command(world, "cut", "--val-annotations", str(world / "train.csv"))
    arguments += ["--val-videos", str(world)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "accuracy", _cut_off)
        with pytest.raises(_CutOffError):
            finetune.main(arguments)
    assert (world / "cut" / "checkpoint-00000002.pt").exists()
    assert _validated(world / "cut") == []
    finetune.main(arguments)
    assert _validated(world / "cut") == [2, 4, 6]
    assert _lines(world / "cut", "loss") == _lines(world / "files")
    finetune.main(arguments)
    assert _validated(world / "cut") == [2, 4, 6]


class _CutOffError(BaseException):
    """What ends a process, as far as the trainer can tell."""


def _cut_off(_: Validation) -> dict[str, float]:
    raise _CutOffError


def _validated(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "val_top1" in line]


def test_the_whole_job_ended_then_killed_and_gone_on_with(world: Path, tmp_path: Path) -> None:
    arguments = command(world, "killed", "--save-every", "2", "--num-workers", "2")
    assert _signalled_at(1, signal.SIGTERM, arguments, tmp_path / "log") == 143
    assert _signalled_at(5, signal.SIGKILL, arguments, tmp_path / "log") == -signal.SIGKILL
    names = sorted(path.name for path in (world / "killed").glob("*.pt"))
    assert names == ["checkpoint-00000002.pt", "checkpoint-00000004.pt"]
    finetune.main(arguments)
    _assert_same_run(world, "files", "killed")


def _signalled_at(step: int, number: int, arguments: list[str], log: Path) -> int | None:
    """Start the trainer, and send a signal to it and its workers after a step; its exit status.

    The signal is sent when the trainer has reported that it waits with its handler in place.
    """
    ready, waiting = multiprocessing.Pipe(duplex=False)
    with ready, waiting, started(_wait_after, step, arguments, waiting, log=log) as child:
        assert ready.poll(120), log.read_text()
        assert ready.recv() == "waits, SIGTERM is handled"
        os.killpg(child.pid or 0, number)
        child.join(120)
        assert "Traceback" not in log.read_text(), log.read_text()
        return child.exitcode


def _wait_after(step: int, arguments: list[str], waiting: Connection) -> None:
    """Run the trainer, and wait for a signal after a step."""
    log_step, arrived = RunLog.step, list[bool]()

    def wait(log: RunLog, done: Step) -> None:
        log_step(log, done)
        if done.number == step:
            handler: Any = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *args: (arrived.append(True), handler(*args)))
            assert handler.__name__ == "request_stop"
            waiting.send("waits, SIGTERM is handled")
            while not arrived:
                time.sleep(0.01)

    RunLog.step = wait  # type: ignore[method-assign]
    finetune.main(arguments)


def test_settings_of_another_run_are_shown(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main(command(world, "files", "--lr", "0.5", "--every", "2"))
    text = capsys.readouterr().err
    assert "holds checkpoints of a run with other settings:" in text
    assert "  lr: stored 0.001, now 0.5\n  every: stored 1, now 2\n" in text


def test_another_lambda_takes_the_last_step_alone(world: Path) -> None:
    before = (world / "files" / "checkpoint-00000006.pt").stat().st_mtime_ns
    finetune.main(command(world, "files", "--lam", "1"))
    assert (world / "files" / "checkpoint-00000006.pt").stat().st_mtime_ns == before
    final, average = (
        load_checkpoint(world / "files" / f"{name}.safetensors") for name in ("final", "averaged")
    )
    assert any(not torch.equal(final[name], average[name]) for name in final)
    finetune.main(command(world, "files"))  # as the other tests find it
