"""Imports of the server in ``tests/forked.py``: what its forks need and what is slow to import."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress

MODULES = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "av",
    "open_clip",
    "openvclip.cli.main",
    "examples.shapes.run",
    "tests.examples.finetune_checks",  # imports the trainer
    "tests.distributed.all_checks",
    "tests.weights.resume_run",
)

for _name in MODULES:
    with suppress(ImportError):  # of an optional dependency: the tests that need it are skipped
        importlib.import_module(_name)

gc.freeze()  # a collection in a fork would copy the memory of all these modules
