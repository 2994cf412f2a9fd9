"""Processes that start with PyTorch and the package imported: forks of one server, for all tests.

A fresh interpreter needs seconds for these imports, and a run of a few steps needs one second. A
test process has one server, so every test that forks must take its processes from here: another
list of modules to preload would replace the list of this file.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.helpers import REPO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


@contextmanager
def started(
    target: Callable[..., object],
    *arguments: Any,
    log: Path,
    errors: Path | None = None,
    **environment: str,
) -> Iterator[BaseProcess]:
    """Start a process in a new session; the process is killed at the end of the context.

    Args:
        target: a function of a module, which the process runs.
        arguments: arguments of ``target``.
        log: file for the output of the process.
        errors: file for the standard error. Default: ``log``.
        environment: environment variables that are added to those of this process.
    """
    outputs = (str(log), str(errors or log))
    process = CONTEXT.Process(target=_run, args=(target, arguments, outputs, environment))
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
    outputs: tuple[str, str],
    environment: dict[str, str],
) -> None:
    os.setsid()  # a signal to its group reaches this process and its workers alone
    # A shell starts background jobs with SIGINT ignored, and processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # the platform's, for its own workers
    os.environ.update(environment)
    for path, number in zip(outputs, (1, 2), strict=True):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    target(*arguments)


def run_module(name: str, arguments: list[str]) -> None:
    """``python -m NAME ARGUMENTS``, for :func:`started`."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_code(code: str, arguments: list[str]) -> None:
    """``python -c CODE ARGUMENTS``, for :func:`started`."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


def run_by_path(folder: str, example: str, arguments: list[str]) -> None:
    """``python .../examples/EXAMPLE.py ARGUMENTS``, for :func:`started`.

    The folder is one from where ``examples`` is not found.
    """
    os.chdir(folder)
    script = REPO / "examples" / f"{example}.py"
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path not in ("", str(REPO)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]
    assert importlib.util.find_spec("examples") is None
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


@contextmanager
def together(
    target: Callable[..., object], *arguments: Any, logs: Path
) -> Iterator[list[BaseProcess]]:
    """Two processes that find each other as those of ``torchrun`` do, with logs in a folder."""
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(target, *arguments, log=logs / f"{rank}.log", **rendezvous(rank, 2, port))
            )
            for rank in range(2)
        ]


def rendezvous(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment variables that ``torchrun`` gives to a process."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in variables.items()}}


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
