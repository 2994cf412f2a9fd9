"""Two processes: the same training as one, and the end of both when one of them dies.

The checks of the training loop are in ``tests/examples/finetune_checks.py``; one pair of processes
runs them all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from examples import finetune
from openvclip.checkpoints import load_checkpoint
from tests.examples import dying_process, finetune_checks
from tests.examples.tiny_videos import command, write_videos
from tests.forked import together
from tests.helpers import REPO, assert_same_state

LIMIT = 300.0  # seconds after which processes that wait for each other are stopped
Launch = Callable[[Path, list[str]], tuple[int, str, str]]


def torchrun(logs: Path, arguments: list[str]) -> tuple[int, str, str]:
    """Start two processes of ``dying_process.py``; return status, output and errors of all."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(Path("tests/examples/dying_process.py")), *arguments],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        timeout=LIMIT,
        check=False,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def as_torchrun(logs: Path, arguments: list[str]) -> tuple[int, str, str]:
    """The same with two processes that are forks. SIGTERM ends the process that still runs."""
    with together(dying_process.main, arguments, logs=logs) as processes:
        while all(process.is_alive() for process in processes):
            time.sleep(0.1)  # as torchrun looks at its processes
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGTERM)
            process.join(LIMIT)
    status = min(abs(process.exitcode or 0) for process in processes)
    texts = [(logs / f"{rank}.log").read_text() for rank in range(2)]
    return status, "".join(texts), "".join(texts)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with together(finetune_checks.main, [str(tmp_path)], logs=tmp_path) as processes:
        for process in processes:
            process.join(LIMIT)
    for rank in range(2):
        file = tmp_path / f"{rank}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        failed = {name: text for name, text in results.items() if text != "passed"}
        assert not failed, f"process {rank}:\n" + "\n".join(failed.values())
        assert len(results) == 16, (tmp_path / f"{rank}.log").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos, and in ``alone`` what one process leaves that trains on them."""
    folder = tmp_path_factory.mktemp("world")
    write_videos(folder, 9)
    finetune.main(validated(folder, "alone"))
    return folder


def validated(folder: Path, out: str, *more: str) -> list[str]:
    """Arguments of a run with a validation after each epoch; two processes share nine videos."""
    lists = ["--val-annotations", str(folder / "train.csv"), "--val-videos", str(folder)]
    return command(folder, out, "--per-device-batch", "1", *lists, *more)


def lines_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(first: Path, second: Path) -> None:
    for file in ("finetuned", "averaged", "final"):
        actual, expected = (load_checkpoint(out / f"{file}.safetensors") for out in (first, second))
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_the_last_weights_are_those_of_the_last_checkpoint(world: Path) -> None:
    last = load_checkpoint(world / "alone" / "finetuned.safetensors")
    saved = torch.load(world / "alone" / "checkpoint-00000006.pt", weights_only=True)["model"]
    assert last.keys() == saved.keys()
    assert_same_state(last, {name: saved[name] for name in last})


@pytest.mark.parametrize("flags", ["", "--fsdp", "--compile aot_eager"])
def test_two_processes_leave_what_one_leaves(world: Path, tmp_path: Path, flags: str) -> None:
    """From the command line to the model card, validation on the way."""
    out, expected = tmp_path / "run", world / "alone"
    arguments = validated(world, str(out), *flags.split())
    with together(finetune.main, arguments, logs=tmp_path) as processes:
        for process in processes:
            process.join(LIMIT)
    outputs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(outputs)
    assert "4 videos a step (2 processes, 1 at a time, 2 accumulation steps)" in outputs[0]
    assert [text.count("Wrote") for text in outputs] == [1, 0]
    assert_same_weights(out, expected)
    measured = [line for line in lines_of(out) if "val_top1" in line]
    assert measured == [line for line in lines_of(expected) if "val_top1" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert len({line["val_top1"] for line in measured}) > 1  # accuracies that training changes
    cards = [(o / "README.md").read_text().replace(str(o), "OUT") for o in (out, expected)]
    assert cards[0].replace("| fsdp | True |", "| fsdp | False |") == cards[1]
    assert "| top1, final weights |" in cards[0]


@pytest.mark.parametrize(
    ("launch", "rank", "where", "saved"),
    [(torchrun, "0", "training", [2]), (as_torchrun, "1", "validation", [2, 4])],
)
def test_a_process_that_dies_ends_all_with_one_message_and_the_run_goes_on(
    world: Path, tmp_path: Path, launch: Launch, rank: str, where: str, saved: list[int]
) -> None:
    out, moment = tmp_path / "run", tmp_path / "moment"
    # With workers, which torchrun ends too: the message must not be that they are gone.
    arguments = validated(world, str(out), "--save-every", "2", "--num-workers", "1")
    # Returns when all have ended.
    status, output, errors = launch(tmp_path, [rank, where, str(moment), *arguments])
    assert time.monotonic() - float(moment.read_text()) < 60
    assert status != 0
    before, *after = errors.split("Another process of this run is gone")
    assert len(after) == 1, errors
    assert "Traceback" not in before, before
    assert "4 videos a step (2 processes, 1 at a time, 2 accumulation steps)" in output
    names = sorted(path.name for path in out.glob("checkpoint*"))
    assert names == [f"checkpoint-{step:08d}.pt" for step in saved]
    finetune.main(arguments)  # goes on alone
    assert [line["step"] for line in lines_of(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(out, world / "alone")
