"""The trainer, of whose processes the second is killed after its third step.

Started by ``torchrun`` in ``tests/examples/test_finetune_distributed.py``.
"""

from __future__ import annotations

import os
import signal
import sys

from examples import finetune
from examples.run_log import RunLog, Step

told = RunLog.step


def die(log: RunLog, step: Step) -> None:
    told(log, step)
    if step.number == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    RunLog.step = die  # type: ignore[method-assign]
    finetune.main(sys.argv[1:])
