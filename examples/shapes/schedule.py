"""Work shared among processes of one thread each: no number depends on how many there are."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, TypeVar

import torch

from openvclip.errors import OpenVCLIPError

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[Any], None]
"""Function that takes what a worker process reports."""

_reports: SimpleQueue[Any]  # of a worker process


class WorkError(OpenVCLIPError, RuntimeError):
    """An item of the work could not be done."""


def side_by_side(
    function: Callable[[Item, Report], Result],
    items: Sequence[Item],
    jobs: int,
    report: Report,
    log: Path,
) -> Iterator[tuple[Item, Result]]:
    """Give each item's result as it comes; items are begun in their order.

    However this ends (an error, Ctrl-C, a killed process), no process stays behind.

    Args:
        function: called in a process of its own with an item and a function to report progress to;
            it and its items and results go through pickle.
        items: what to do.
        jobs: processes.
        report: called here with what the function reports.
        log: folder for what the processes write to their standard error.

    Raises:
        WorkError: the function raised an exception for an item, or a process died.
    """
    if not items:
        return
    log.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")  # a fork of a process that has run torch can hang
    reports: SimpleQueue[Any] = context.SimpleQueue()
    before = set(active_children())
    pool = ProcessPoolExecutor(min(jobs, len(items)), context, _begin_worker, (reports, log))
    try:
        call = partial(_call, function)
        running = {pool.submit(call, item): item for item in items}
        while running:
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            while not reports.empty():
                report(reports.get())
            for future in done:
                item = running.pop(future)
                yield item, _result(future, item, log)
    except BaseException:
        for process in set(active_children()) - before:
            process.terminate()  # what they are at would take minutes
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        reports.close()


def _result(future: Future[Result], item: object, log: Path) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WorkError(
            f"A process that worked on {item} or beside it died, perhaps for want of memory (see "
            f"{log}); --jobs sets how many there are."
        ) from error
    except Exception as error:  # whatever the function raised, in the other process
        raise WorkError(f"{item} failed: {type(error).__name__}: {error}") from error


def _call(function: Callable[[Item, Report], Result], item: Item) -> Result:
    return function(item, _reports.put)


def _begin_worker(reports: SimpleQueue[Any], log: Path) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends us
    # A file is no terminal, so that the progress bars of several workers don't mix.
    sys.stderr = (log / f"worker-{os.getpid()}.log").open("w", buffering=1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody would take the results of a worker that outlives a killed parent."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
