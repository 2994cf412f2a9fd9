"""Replacements of ``checking._serve`` for tests; worker processes import this module."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

from openvclip.video.checking import check_video


def crashing(connection: Connection, quick: bool) -> None:
    """Crash the process for some files, and never answer for other files."""
    connection.send("ready")
    while True:
        path = connection.recv()
        if "text" in path:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "header" in path:
            time.sleep(3600)
        connection.send(check_video(path, quick=quick))


def never_ready(connection: Connection, quick: bool) -> None:
    raise SystemExit(7)
