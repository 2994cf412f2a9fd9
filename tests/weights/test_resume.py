"""A training process that is killed many times ends bitwise like one that was never killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.forked import CONTEXT
from tests.helpers import assert_same_state, through_a_file
from tests.weights import resume_run

KILLS = 20


@contextmanager
def process(folder: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    parent, child_end = CONTEXT.Pipe()
    child = CONTEXT.Process(target=resume_run.main, args=(folder, child_end))
    child.start()
    child_end.close()
    try:
        yield child, parent
    finally:
        child.kill()
        child.join()
        parent.close()


def killed_once(folder: Path, moments: random.Random, *, while_saving: bool) -> int:
    """Start the run, kill it at a random moment of a random step, and return the step."""
    allowed = moments.randint(0, 17)
    with process(folder) as (child, pipe):
        step = pipe.recv()
        for _ in range(allowed):
            if while_saving and (step + 1) % resume_run.SAVE_EVERY == 0:
                break
            pipe.send("go on")
            step = pipe.recv()
        pipe.send("go on")
        # A step takes about a millisecond and a save a few milliseconds. Kill during or after them.
        time.sleep(moments.uniform(0.0, 0.006))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    return int(step)


def finished(folder: Path) -> dict[str, Tensor]:
    child = CONTEXT.Process(target=resume_run.main, args=(folder, None))
    child.start()
    child.join()
    assert child.exitcode == 0
    result: dict[str, Tensor] = torch.load(folder / "result.pt", weights_only=True)
    return result


def test_a_run_killed_twenty_times_is_bitwise_the_run_never_stopped(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    expected = finished(straight)
    assert len(expected["alphas"].unique()) == resume_run.STEPS // 2

    moments = random.Random(0)
    steps = [killed_once(broken, moments, while_saving=n % 2 == 0) for n in range(KILLS)]
    assert len(set(steps)) > KILLS // 2  # at different steps, and never at the end
    assert max(steps) < resume_run.STEPS - 1
    assert_same_state(finished(broken), expected)


def result_after(state: dict[str, Any]) -> dict[str, Tensor]:
    run = resume_run.Run()
    run.load(through_a_file(state))  # an optimizer changes the tensors that it loads
    for _ in range(20):
        run.advance()
    return run.result()


def test_each_part_of_the_state_is_needed() -> None:
    """The test above would therefore fail if one part were not restored."""
    run = resume_run.Run()
    fresh = through_a_file(run.state())
    for _ in range(20):
        run.advance()
    saved = through_a_file(run.state())
    expected = result_after(saved)
    assert_same_state(result_after(saved), expected)
    for part in saved.keys() - {"step"}:
        other = result_after(saved | {part: fresh[part]})
        assert any(not torch.equal(other[name], expected[name]) for name in expected), part
