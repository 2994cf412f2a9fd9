"""Checkpoints of a run: written whole or not at all, read back, refused with a reason."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import CheckpointError
from openvclip.training.checkpoints import Checkpoints, TrainingState
from tests.helpers import Smooth, assert_same_state, cross_entropy, snapshot


def _state() -> TrainingState:
    model = Smooth()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    iwr = InterpolatedWeightRegularizer(model, optimizer)
    return TrainingState(model, optimizer, scaler, iwr, SWATracker(model))


def _step(state: TrainingState) -> None:
    state.iwr.step(lambda: cross_entropy(state.model))
    assert state.swa is not None
    state.swa.update(state.model)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    state, checkpoints = _state(), Checkpoints(tmp_path, {}, every=1)
    _step(state)
    checkpoints.save(state, 1)
    saved = snapshot(state.model)
    _step(state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoint-00000001.pt").stat().st_size
    try:
        for room in (0, size // 4, size // 2, size - 100):  # what the disk takes
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
            with pytest.raises(CheckpointError, match=r"02\.pt can't be written: .*File too large"):
                checkpoints.save(state, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]
    other = _state()
    assert checkpoints.resume(other) == 1
    assert_same_state(snapshot(other.model), saved)


def test_a_checkpoint_cut_short_is_named(tmp_path: Path) -> None:
    state, checkpoints = _state(), Checkpoints(tmp_path, {}, every=1)
    checkpoints.save(state, 1)
    file = tmp_path / "checkpoint-00000001.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"00000001\.pt can't be read.*Remove it"):
        checkpoints.resume(state)


def test_random_numbers_go_on_and_the_last_checkpoints_stay(tmp_path: Path) -> None:
    state, checkpoints = _state(), Checkpoints(tmp_path, {}, every=1, keep=3)
    for step in (1, 9, 10, 11):
        checkpoints.save(state, step)
    expected = torch.rand(3)
    assert checkpoints.resume(state) == 11
    assert torch.equal(torch.rand(3), expected)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(CheckpointError, match="expected at least 1 of each"):
        Checkpoints(tmp_path, {}, every=0)
