"""The checks of tests/distributed with one process: NCCL on a GPU, gloo on a CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import distributed

from tests.device.checks import Check, Checks, Setup
from tests.distributed import data_parallel, resuming, sharded, state_dicts, training
from tests.on_device import MadeByTests, exact_kernels

CHECKS = Checks()

NEED_TWO = frozenset(
    {
        "a_model_sharded_too_late_is_refused",
        "ddp_overflow_in_one_process_skips_the_step_in_both",
        "ddp_takes_a_part_of_the_batch_of_each_process",
        "every_process_draws_the_same_alphas",
        "fsdp_keeps_shards_and_communicates_nothing_of_its_own",
        "fsdp_overflow_in_one_process_skips_the_step_in_both",
        "fsdp_saves_whole_tensors_once",
        "fsdp_weights_that_one_process_finds_broken_enter_no_average",
        "processes_that_differ_are_told_so",
        "the_l2_penalty_counts_replicas_once",
    }
)
"""Checks that need a second process, or shards that are no whole tensors."""
FEW = ("fsdp_training_equals_one_process", "ddp_average")
"""What small setups run."""


@contextmanager
def one_process(setup: Setup) -> Iterator[None]:
    """Be a group of one process, in which each batch is the joined batch."""
    backend = "nccl" if setup.device == "cuda" else "gloo"
    store = distributed.HashStore()
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with patch.object(training, "WORLD", 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        distributed.destroy_process_group()


def run(setup: Setup, function: Callable[[Path], None]) -> None:
    """Run a check of tests/distributed."""
    folder = setup.folder / "files" / function.__name__
    folder.mkdir(parents=True, exist_ok=True)
    if setup.device == "cuda":
        torch.cuda.set_device(0)
    device = torch.empty(0, device=setup.device).device
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    with one_process(setup), exact_kernels(), MadeByTests(device):
        function(folder)


for _module in (data_parallel, sharded, resuming, state_dicts):
    for _name, _function in training.CHECKS.items():
        if _function.__module__ == _module.__name__ and _name not in NEED_TWO:
            CHECKS.all.append(Check(_name, run, (_function,), small=_name in FEW))
