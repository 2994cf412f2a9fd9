"""One lock for the functions of other libraries that build or export a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_one_at_a_time = threading.RLock()


@contextmanager
def building() -> Iterator[None]:
    """Context manager in which another library builds or exports a model, without its log.

    The log would warn of random weights, which are loaded later. The level of the log and the
    settings with which transformers builds a model belong to the whole process, so threads build
    one after the other.
    """
    with _one_at_a_time:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
