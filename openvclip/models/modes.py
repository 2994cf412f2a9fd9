"""Eval mode for the time of a prediction, also if several threads use the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# The modules that were in train mode before evaluation_mode, by id: the number of threads or
# nested calls that still need eval mode. The contexts keep the modules alive.
_uses: dict[int, int] = {}
_lock = threading.RLock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that sets a model to eval mode and restores the mode of each module.

    Several threads can be inside at the same time, with the same model or with models that share
    modules. The last thread that leaves restores the modes. A model in eval mode is not changed.
    """
    held = _hold(model)
    try:
        yield
    finally:
        _release(held)


def _hold(model: nn.Module) -> list[nn.Module]:
    """Set ``model`` to eval mode, and return its modules whose mode must be restored."""
    with _lock:
        held = [m for m in model.modules() if m.training or id(m) in _uses]
        if any(module.training for module in held):
            model.eval()
        for module in held:
            _uses[id(module)] = _uses.get(id(module), 0) + 1
        return held


def _release(held: list[nn.Module]) -> None:
    if not held:
        return
    with _lock:
        for module in held:
            _uses[id(module)] -= 1
            if _uses[id(module)] == 0:
                del _uses[id(module)]
                module.training = True
