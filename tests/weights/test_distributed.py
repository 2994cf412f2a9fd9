"""Regulariser and averages in two processes, with DistributedDataParallel and fully_shard (FSDP2).

The checks are in ``tests/distributed/``. One pair of processes runs all of them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.distributed import all_checks
from tests.forked import together
from tests.helpers import REPO

NAMES = [
    node.name
    for file in ("data_parallel.py", "sharded.py", "resuming.py", "state_dicts.py")
    for node in ast.parse((REPO / "tests" / "distributed" / file).read_text()).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
]
LIMIT = 240.0  # seconds for all checks; then both processes are stopped


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return the outcomes of the checks by name, for each of the two processes."""
    folder = tmp_path_factory.mktemp("processes")
    with together(all_checks.main, folder, logs=folder) as processes:
        for process in processes:  # checks without an outcome fail below
            process.join(LIMIT)
    return [_reported(folder, rank) for rank in range(2)]


def _reported(folder: Path, rank: int) -> dict[str, str]:
    file = folder / f"{rank}.json"
    outcomes: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    errors = (folder / f"{rank}.log").read_text()
    return {name: outcomes.get(name, f"not reached\n{errors}") for name in NAMES}


def test_there_are_checks() -> None:
    assert len(NAMES) >= 18


@pytest.mark.parametrize("name", NAMES)
def test_in_two_processes(results: list[dict[str, str]], name: str) -> None:
    for rank, outcomes in enumerate(results):
        assert outcomes[name] == "passed", f"process {rank}:\n{outcomes[name]}"
