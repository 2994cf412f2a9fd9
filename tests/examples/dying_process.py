"""The trainer, of whose processes one is killed: after its third step, or in its second validation.

Started in ``tests/examples/test_finetune_distributed.py``. Its arguments are the number of the
process, "training" or "validation", a file for the moment of the death, and then the trainer's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from examples import finetune
from openvclip.training.log import RunLog, Step
from openvclip.training.validation import Validation

log_step, accuracy_of, validations = RunLog.step, Validation.accuracy, count(1)


def main(arguments: Sequence[str]) -> None:
    rank, where, moment, *of_the_trainer = arguments

    def die(here: str) -> None:
        if (os.environ["RANK"], here) == (rank, where):
            Path(moment).write_text(str(time.monotonic()))  # a clock of the whole system
            os.kill(os.getpid(), signal.SIGKILL)

    def step(log: RunLog, done: Step) -> None:
        log_step(log, done)
        if done.number == 3:
            die("training")

    def accuracy(validation: Validation) -> dict[str, float]:
        if next(validations) == 2:
            die("validation")
        return accuracy_of(validation)

    RunLog.step = step  # type: ignore[method-assign]
    Validation.accuracy = accuracy  # type: ignore[method-assign]
    finetune.main(of_the_trainer)


if __name__ == "__main__":
    main(sys.argv[1:])
