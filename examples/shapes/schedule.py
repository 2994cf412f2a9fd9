"""Share work among processes with one thread each.

Results do not depend on the number of processes.
"""

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
    ready: Callable[[Item], bool] = lambda _: True,
) -> Iterator[tuple[Item, Result]]:
    """Call a function for each item in worker processes, and yield the results as they come.

    The items are started in their order. All worker processes end with this function, also after an
    error, Ctrl-C or the death of a process.

    Args:
        function: function that is called in a worker process with an item and a function to report
            progress. The function, the items and the results are pickled.
        items: the items.
        jobs: number of worker processes.
        report: function that is called in this process with each report of a worker process.
        log: folder for the standard error of the worker processes.
        ready: whether an item can be started. An item that is not ready is passed over until other
            items are done. Items that never become ready are left out.

    Yields:
        ``(item, result)`` for each item.

    Raises:
        WorkError: the function raised an exception for an item, or a worker process died.
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
        waiting, running = list(items), dict[Future[Any], Item]()
        while True:
            while len(running) < jobs and (item := next(filter(ready, waiting), None)) is not None:
                waiting.remove(item)
                running[pool.submit(call, item)] = item
            if not running:
                break
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            while not reports.empty():
                report(reports.get())
            for future in done:
                item = running.pop(future)
                yield item, _result(future, item, log)
    except BaseException:
        for process in set(active_children()) - before:
            process.terminate()  # waiting for the end of the work would take minutes
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        reports.close()


def _result(future: Future[Result], item: object, log: Path) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WorkError(
            f"A worker process died before {item} was finished, perhaps because the memory was "
            f"full (see {log}). Use fewer processes with --jobs."
        ) from error
    except Exception as error:  # the function raised an exception in the worker process
        raise WorkError(f"{item} failed: {type(error).__name__}: {error}") from error


def _call(function: Callable[[Item, Report], Result], item: Item) -> Result:
    return function(item, _reports.put)


def _begin_worker(reports: SimpleQueue[Any], log: Path) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the parent process ends this process
    # A file is no terminal, so the worker processes show no progress bars.
    sys.stderr = (log / f"worker-{os.getpid()}.log").open("w", 1, "utf-8", "backslashreplace")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process if the parent process was killed, because its results would be lost."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
