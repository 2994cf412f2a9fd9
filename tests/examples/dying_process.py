"""The trainer, of whose processes one is killed: after its third step, or in its second validation.

Started by ``torchrun`` in ``tests/examples/test_finetune_distributed.py``. Its arguments are the
number of the process, "training" or "validation", a file for the moment of the death, and then the
trainer's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import count
from pathlib import Path

from examples import finetune
from openvclip.training.log import RunLog, Step
from openvclip.training.validation import Validation

log_step, accuracy_of, validations = RunLog.step, Validation.accuracy, count(1)


def die(where: str) -> None:
    if [os.environ["RANK"], where] == sys.argv[1:3]:
        Path(sys.argv[3]).write_text(str(time.monotonic()))  # a clock of the whole system
        os.kill(os.getpid(), signal.SIGKILL)


def step(log: RunLog, done: Step) -> None:
    log_step(log, done)
    if done.number == 3:
        die("training")


def accuracy(validation: Validation) -> dict[str, float]:
    if next(validations) == 2:
        die("validation")
    return accuracy_of(validation)


if __name__ == "__main__":
    RunLog.step = step  # type: ignore[method-assign]
    Validation.accuracy = accuracy  # type: ignore[method-assign]
    finetune.main(sys.argv[4:])
