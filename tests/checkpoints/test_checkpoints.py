"""Files of weights: what is written comes back, and nothing is half written."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openvclip.checkpoints import load_checkpoint, save_checkpoint
from openvclip.errors import CheckpointError
from tests.forked import run_code, started


def _state() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 3)
    return {
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "view": shared.T,
        "tied": shared,
        "expanded": torch.ones(1, 1).expand(2, 3),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }


def test_round_trip_is_bitwise_also_for_views_and_shared_memory(tmp_path: Path) -> None:
    state = _state()
    save_checkpoint(state, tmp_path / "new" / "w.safetensors")
    loaded = load_checkpoint(tmp_path / "new" / "w.safetensors")
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_wrappers_prefixes_are_not_stored(tmp_path: Path) -> None:
    prefixed = {f"module._orig_mod.{name}": value for name, value in _state().items()}
    save_checkpoint(prefixed, tmp_path / "w.safetensors")
    assert load_checkpoint(tmp_path / "w.safetensors").keys() == _state().keys()


def test_dtype_and_metadata(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_checkpoint(_state(), file, dtype=torch.float16, metadata={"lambda": "0.5"})
    loaded = load_checkpoint(file)
    assert loaded["view"].dtype == torch.float16
    assert loaded["count"].dtype == torch.int64
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"lambda": "0.5"}


@pytest.mark.parametrize("size", [0, 5, 100])
def test_truncated_and_empty_files_are_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "w.safetensors"
    save_checkpoint(_state(), file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"\({size} bytes\) is not a whole safetensors"):
        load_checkpoint(file)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="There is no file"):
            load_checkpoint(path)


def _run(script: str, log: Path) -> int | None:
    """Run a script in another process, and return the exit status."""
    with started(run_code, textwrap.dedent(script), [], log=log) as process:
        process.join(60)
    return process.exitcode


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    file, log = tmp_path / "folder" / "w.safetensors", tmp_path / "log"
    save_checkpoint({"x": torch.zeros(3)}, file)
    status = _run(
        f"""
        import resource, signal, torch
        from openvclip.checkpoints import save_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save_checkpoint({{"x": torch.zeros(10_000)}}, {str(file)!r})
        """,
        log,
    )
    assert status == 1
    assert "CheckpointError: Could not write" in log.read_text()
    assert "An existing file is unchanged" in log.read_text()
    assert torch.equal(load_checkpoint(file)["x"], torch.zeros(3))
    assert os.listdir(file.parent) == ["w.safetensors"]


def test_write_that_fails_is_our_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").mkdir()  # the rename onto a folder fails
    with pytest.raises(CheckpointError, match="Could not write"):
        save_checkpoint(_state(), tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_checkpoint({"x": torch.zeros(3)}, file)
    status = _run(
        f"""
        import os, signal
        from openvclip.checkpoints import atomic_path
        with atomic_path({str(file)!r}) as temporary:
            temporary.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "log",
    )
    assert status == -signal.SIGKILL
    assert torch.equal(load_checkpoint(file)["x"], torch.zeros(3))
