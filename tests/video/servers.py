"""What a test puts in place of ``checking._serve``; imported by the processes that it starts."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

from openvclip.video.checking import check_video


def crashing(connection: Connection, quick: bool) -> None:
    """Some files crash the process, or keep it busy for ever."""
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
