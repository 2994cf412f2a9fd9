"""Two processes: the same training as one, and the end of both when one of them dies.

The checks are in ``tests/examples/finetune_checks.py``; one pair of processes runs them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from examples import finetune
from openvclip.checkpoints import load_checkpoint
from tests.examples import finetune_checks
from tests.examples.forked import free_port, rendezvous, started
from tests.examples.tiny_videos import command, write_videos
from tests.helpers import REPO

LIMIT = 300.0  # seconds after which processes that wait for each other are stopped


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [*launcher, *arguments],
        cwd=REPO,
        env=environment,
        timeout=LIMIT,
        check=False,
        capture_output=True,
        text=True,
    )


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(finetune_checks.main, [str(tmp_path)], log=log, **rendezvous(rank, 2, port))
            )
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.join(LIMIT)
    for rank in range(2):
        file = tmp_path / f"{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        failed = {name: text for name, text in found.items() if text != "passed"}
        assert not failed, f"process {rank}:\n" + "\n".join(failed.values())
        assert len(found) == 15, logs[rank].read_text()


def test_a_process_that_dies_ends_all_with_one_message_and_the_run_goes_on(tmp_path: Path) -> None:
    write_videos(tmp_path, 9)
    arguments = command(tmp_path, "run", "--save-every", "2", "--per-device-batch", "1")
    done = torchrun(str(Path("tests/examples/dying_process.py")), *arguments)
    assert done.returncode != 0
    assert done.stderr.count("Another process of this run is gone") == 1, done.stderr
    assert "4 videos a step (2 processes, 1 at a time, 2 times added up)" in done.stdout
    out = tmp_path / "run"
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-00000002.pt"]
    finetune.main(arguments)  # goes on alone
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    finetune.main(command(tmp_path, "alone", "--per-device-batch", "1"))
    one, other = (
        load_checkpoint(tmp_path / name / "final.safetensors") for name in ("run", "alone")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("text", ["--batch-size 3", "--batch-size 12"])
def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, text: str) -> None:
    from examples.video_batches import VideoBatches
    from openvclip.errors import UsageError
    from openvclip.ranks import Ranks
    from openvclip.video import VideoDataset

    dataset = VideoDataset([(f"{i}.mp4", 0) for i in range(9)], transform=None)
    with pytest.raises(UsageError, match=r"can't be shared evenly by 2|9 videos don't fill one"):
        VideoBatches(dataset, batch_size=int(text.split()[1]), micro_batch=2, ranks=Ranks(0, 2))
