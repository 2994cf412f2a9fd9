"""Run all checks in one of the two processes that ``test_distributed.py`` starts."""

from __future__ import annotations

import json
import traceback
import warnings
from pathlib import Path

from torch import distributed

from tests.distributed import data_parallel, resuming, sharded, state_dicts
from tests.distributed.training import CHECKS, WORLD


def main(out: Path) -> None:
    """Run all checks, and write what came of them to a file of the process in a folder."""
    modules = (data_parallel, resuming, sharded, state_dicts)
    files = {module.__name__ for module in modules}
    assert files == {check.__module__ for check in CHECKS.values()}
    warnings.simplefilter("error")
    # torch.distributed.checkpoint of PyTorch 2.7 and 2.8 uses storages that it declares deprecated.
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert distributed.get_world_size() == WORLD
    folder = out / "files"
    folder.mkdir(exist_ok=True)
    results = {}
    for name, function in CHECKS.items():
        try:
            function(folder)
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc(limit=-8, chain=False)
        print(rank, name, results[name], flush=True)
        (out / f"{rank}.json").write_text(json.dumps(results))
        distributed.barrier()
    distributed.destroy_process_group()
