"""The state of a training run in files, from which it goes on exactly where it was."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import openvclip
from openvclip.checkpoints import atomic_path
from openvclip.errors import CheckpointError
from openvclip.processes import Processes
from openvclip.weights.names import named_state
from openvclip.weights.shards import is_sharded, local, local_like, whole

_PATTERN = "checkpoint-*.pt"


@dataclass(frozen=True)
class TrainingState:
    """Everything of a run that changes with its steps, but for the random number generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iwr: openvclip.InterpolatedWeightRegularizer
    swa: openvclip.SWATracker | None


class Checkpoints:
    """The last checkpoints of a run, in a folder that all processes see.

    A checkpoint holds whole tensors, so a run may go on with another number of processes.

    Args:
        folder: made where it is missing.
        settings: what the numbers of the run depend on; a run with others is refused.
        every: steps between two checkpoints.
        keep: how many stay.
        processes: the processes of the run; the first writes.

    Raises:
        CheckpointError: ``every`` or ``keep`` is below 1.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        every: int,
        keep: int = 2,
        processes: Processes | None = None,
    ) -> None:
        if every < 1 or keep < 1:
            raise CheckpointError(f"every={every}, keep={keep}: expected at least 1 of each.")
        self.folder, self.settings = folder, dict(settings)
        self.every, self.keep, self.processes = every, keep, processes or Processes()
        self.stop_requested = False

    def request_stop(self, *_: object) -> None:
        """Let the run save and end after its present step; a handler for signals."""
        self.stop_requested = True

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        found = self._found()
        return _step_of(found[-1]) if found else 0

    def due(self, step: int, total: int) -> bool:
        """Whether to save after this step."""
        return step % self.every == 0 or step == total

    def resume(self, state: TrainingState) -> int:
        """Load the newest checkpoint into ``state``; returns its step, 0 where there is none.

        Raises:
            CheckpointError: it can't be read, or is of a run with other settings, which are shown.
        """
        found = self._found()
        self.processes.wait()  # or one process could see a checkpoint that another writes by then
        if not found:
            return 0
        saved = _read(found[-1])
        _require_same_settings(saved["settings"], self.settings, self.folder)
        _restore(state, saved)
        if self.processes.rank < len(saved["random"]):
            _set_random_state(saved["random"][self.processes.rank])
        return int(saved["step"])

    def save(self, state: TrainingState, step: int) -> None:
        """Write a checkpoint, then remove the oldest.

        Raises:
            CheckpointError: in all processes, if it can't be written; earlier ones are as they
                were.
        """
        random = self.processes.gather(_random_state())
        content = _gathered(
            {
                "settings": self.settings,
                "step": step,
                "model": named_state(state.model),
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "iwr": state.iwr.state_dict(),
                "swa": None if state.swa is None else state.swa.state_dict(),
                "random": random,
            }
        )
        path = self.folder / f"checkpoint-{step:08d}.pt"
        problem = _write(content, path) if self.processes.is_first else ""
        problem = self.processes.gather(problem)[0]
        if problem:
            raise CheckpointError(problem)
        if self.processes.is_first:
            for old in self._found()[: -self.keep]:
                old.unlink()

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _write(content: dict[str, Any], path: Path) -> str:
    """What went wrong, or an empty text."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # On a full disk PyTorch fails once more while it handles the system's error.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        return (
            f"The checkpoint {path} can't be written: {reason}. Earlier ones are as they were; "
            "make room, and the same command goes on from the last one."
        )
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The checkpoint {path} can't be read: {error}. Remove it to go on from the one before."
        ) from error
    return saved


def _require_same_settings(there: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    names = [*now, *(name for name in there if name not in now)]
    lines = [
        f"  {name}: there {there.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if there.get(name) != now.get(name)
    ]
    if lines:
        raise CheckpointError(
            f"{folder} holds checkpoints of a run with other settings:\n"
            + "\n".join(lines)
            + "\nGive these settings to go on with it, or another --out to begin a run."
        )


def _gathered(entry: Any) -> Any:
    """The same nested content with whole tensors in place of sharded ones; all processes call it.

    Tensors that are sharded or on a GPU are copied to the CPU, one at a time.
    """
    if isinstance(entry, Tensor):
        return whole(entry).cpu()
    if isinstance(entry, dict):
        return {name: _gathered(value) for name, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_gathered(value) for value in entry)
    return entry


def _restore(state: TrainingState, saved: Mapping[str, Any]) -> None:
    load_whole(state.model, saved["model"])
    live = named_state(state.model)
    optimizer = saved["optimizer"]
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for number, entries in optimizer["state"].items():
        entries.update(
            {n: _placed(v, parameters[number]) for n, v in entries.items() if n != "step"}
        )
    state.optimizer.load_state_dict(optimizer)
    state.scaler.load_state_dict(saved["scaler"])
    state.iwr.load_state_dict(saved["iwr"])
    if state.swa is not None:
        state.swa.load_state_dict(
            {
                key: {name: _placed(value, live[name]) for name, value in entry.items()}
                if isinstance(entry, dict) and key != "aliases"
                else entry
                for key, entry in saved["swa"].items()
            }
        )


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a model's entries, whole or sharded."""
    with torch.no_grad():
        for name, value in named_state(model).items():
            local(value).copy_(local_like(weights[name], value))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """On the device of ``like``, and sharded where that is."""
    moved = value.to(like.device)
    if not is_sharded(like):
        return moved
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    return distribute_tensor(moved, there.device_mesh, there.placements, src_data_rank=None)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
