"""Processes that start with PyTorch and the trainer imported: forks of one server, for all tests.

A fresh interpreter needs seconds for these imports, and a run of a few steps needs one second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.examples.finetune_checks"])  # imports the trainer


@contextmanager
def started(
    target: Callable[..., object], *arguments: Any, log: Path, **environment: str
) -> Iterator[BaseProcess]:
    """Start a process in a new session; the process is killed at the end of the context.

    Args:
        target: a function of a module, which the process runs.
        arguments: arguments of ``target``.
        log: file for the output of the process.
        environment: environment variables that are added to those of this process.
    """
    process = _SERVER.Process(target=_run, args=(target, arguments, str(log), environment))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def _run(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    log: str,
    environment: dict[str, str],
) -> None:
    os.setsid()  # a signal to its group reaches this process and its workers alone
    # A shell starts background jobs with SIGINT ignored, and processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # the platform's, for its own workers
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    target(*arguments)


def rendezvous(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment variables that ``torchrun`` gives to a process."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in variables.items()}}


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
