"""Run all checks in one of the two processes that ``test_distributed.py`` starts.

python -m tests.distributed FOLDER RANK
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed

from tests.distributed import data_parallel, resuming, sharded, state_dicts
from tests.distributed.training import CHECKS, WORLD


def main() -> None:
    modules = (data_parallel, resuming, sharded, state_dicts)
    files = {module.__name__ for module in modules}
    assert files == {check.__module__ for check in CHECKS.values()}
    out, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=WORLD
    )
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


if __name__ == "__main__":
    main()
