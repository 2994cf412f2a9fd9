"""Processes that begin with PyTorch and the trainer imported: forks of one server, for all tests.

A fresh interpreter takes seconds to import what a run of some steps then uses for one.
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
    """A process of a session of its own, which is killed at the end of the block.

    Args:
        target: what it runs; a function of a module.
        arguments: of ``target``.
        log: file for what it prints.
        environment: variables that it has beside those of this process.
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
    os.setsid()  # a signal to its group reaches it and its own workers alone
    multiprocessing.set_start_method("fork", force=True)  # the platform's, for its own workers
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    target(*arguments)


def rendezvous(rank: int, world: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process of the others."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in places.items()}}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
