"""Checks that fail in every way, for the test of the processes that run groups."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from tests.device.checks import Checks, Figure, Setup, Skip

CHECKS = Checks()


@CHECKS.add()
def passes(setup: Setup) -> Iterator[Figure]:
    yield Figure("forward", "ViT-B/16", 1.07)
    yield Figure("backward", "ViT-B/16", 1.2, "16 clips")


@CHECKS.add()
def is_skipped(setup: Setup) -> None:
    raise Skip("there is no decoder")


@CHECKS.add()
def fails(setup: Setup) -> Iterator[Figure]:
    yield Figure("memory", "ViT-B/16", 1.0)
    raise AssertionError("1 is not 2")


@CHECKS.add()
def leaves_the_device_unusable(setup: Setup) -> None:
    print("process", os.getpid())
    raise RuntimeError("CUDA error: device-side assert triggered")


@CHECKS.add()
def ends_its_process(setup: Setup) -> None:
    print("the last words", flush=True)
    os._exit(9)


@CHECKS.add("first", "second")
def passes_after_all_that(setup: Setup, case: str) -> None:
    (setup.folder / f"{case}.pid").write_text(str(os.getpid()))


@CHECKS.add()
def hangs(setup: Setup) -> None:
    time.sleep(600)


@CHECKS.add()
def is_not_reached(setup: Setup) -> None:
    (setup.folder / "reached").touch()
