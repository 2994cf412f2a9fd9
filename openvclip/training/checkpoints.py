"""Checkpoints of a training run: a resumed run gives the same weights as a run without a stop."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import CheckpointError
from openvclip.processes import Processes
from openvclip.training.regularised import RegularisedClassifier
from openvclip.weights.averaging import SWATracker
from openvclip.weights.names import named_state
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.shards import is_sharded, local, local_like, whole

_PATTERN = "checkpoint-*.pt"


@dataclass(frozen=True)
class TrainingState:
    """The objects whose state a checkpoint holds.

    Attributes:
        model: the model that is trained.
        optimizer: its optimizer.
        scaler: the scaler of the loss, which may be disabled.
        iwr: the regulariser, for the state of its random numbers.
        swa: the average of the weights; ``None`` if the method averages nothing.
        regularised: holds the projectors and the random texts of the regularisers; ``None`` if the
            recipe has none.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iwr: InterpolatedWeightRegularizer
    swa: SWATracker | None
    regularised: RegularisedClassifier | None = None


class Checkpoints:
    """Saves and loads the checkpoints of a run.

    A checkpoint holds whole tensors, so a run can be resumed with another number of processes.
    A checkpoint also holds the state of the random number generators of each process.

    Args:
        folder: folder of the checkpoints, on a disk that all processes share. It is
            created if it does not exist.
        settings: settings that change the weights. A checkpoint with other settings raises an
            error.
        every: number of steps between two checkpoints.
        keep: number of checkpoints that are kept.
        processes: the processes of the run. The first process writes. Default: this process alone.

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
        """Ask the run to save and end after the present step. This is a handler for signals."""
        self.stop_requested = True

    @contextmanager
    def stop_on(self, number: signal.Signals) -> Iterator[None]:
        """Return a context in which a signal calls :meth:`request_stop`.

        Args:
            number: the signal, such as ``signal.SIGTERM``.
        """
        handler = signal.signal(number, self.request_stop)
        try:
            yield
        finally:
            signal.signal(number, handler)

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 if there is no checkpoint."""
        paths = self._paths()
        return _step_of(paths[-1]) if paths else 0

    def due(self, step: int, total: int) -> bool:
        """Return whether a checkpoint is due after a step.

        Args:
            step: the number of steps that are done.
            total: the number of steps of the whole run.
        """
        return step % self.every == 0 or step == total

    def resume(self, state: TrainingState) -> int:
        """Load the newest checkpoint into ``state``, and return its step.

        Returns:
            The number of steps that were done; 0 if there is no checkpoint.

        Raises:
            CheckpointError: the checkpoint can't be read, or has other settings. The text lists
                the settings that differ.
        """
        paths = self._paths()
        # All processes list the folder before one of them can write the next checkpoint.
        self.processes.wait()
        if not paths:
            return 0
        saved = _read(paths[-1])
        _require_same_settings(saved["settings"], self.settings, self.folder)
        _restore(state, saved)
        if self.processes.rank < len(saved["random"]):
            _set_random_state(saved["random"][self.processes.rank])
        return int(saved["step"])

    def save(self, state: TrainingState, step: int) -> None:
        """Write a checkpoint, then remove the oldest one. All processes call this.

        Args:
            state: what the checkpoint holds.
            step: the number of steps that are done.

        Raises:
            CheckpointError: the checkpoint can't be written. All processes raise this error, and
                earlier checkpoints stay.
        """
        random, extra = self.processes.gather(_random_state()), state.regularised
        content = _whole_tensors(
            {
                "settings": self.settings,
                "step": step,
                "model": named_state(state.model),
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "iwr": state.iwr.state_dict(),
                "swa": None if state.swa is None else state.swa.state_dict(),
                "random": random,
                **({} if extra is None else {"regularisers": extra.regulariser_state()}),
            }
        )
        path = self.folder / f"checkpoint-{step:08d}.pt"
        problem = _write(content, path) if self.processes.is_first else ""
        problem = self.processes.gather(problem)[0]
        if problem:
            raise CheckpointError(problem)
        if self.processes.is_first:
            for old in self._paths()[: -self.keep]:
                old.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _write(content: dict[str, Any], path: Path) -> str:
    """Write a checkpoint; return the text of the error, or an empty text."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # On a full disk PyTorch raises another error while it handles the error of the system.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        return (
            f"The checkpoint {path} can't be written: {reason}. Earlier checkpoints stay. "
            "Make room on the disk, and the same command resumes from the last checkpoint."
        )
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"The checkpoint {path} can't be read: {error}. Remove it to resume from the "
            "checkpoint before it."
        ) from error
    return saved


def _require_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    names = [*now, *(name for name in saved if name not in now)]
    lines = [
        f"  {name}: stored {saved.get(name)!r}, now {now.get(name)!r}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
    if lines:
        raise CheckpointError(
            f"{folder} holds checkpoints of a run with other settings:\n"
            + "\n".join(lines)
            + "\nGive the stored settings to resume, or another --out to start a run."
        )


def _whole_tensors(entry: Any) -> Any:
    """Return nested content with whole tensors in place of sharded tensors.

    All processes call this. One tensor at a time is copied to the CPU.
    """
    if isinstance(entry, Tensor):
        return whole(entry).cpu()
    if isinstance(entry, dict):
        return {name: _whole_tensors(value) for name, value in entry.items()}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_whole_tensors(value) for value in entry)
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
    if state.regularised is not None:
        state.regularised.load_regulariser_state(saved["regularisers"])
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
    """Copy whole tensors into the entries of a model, which may be sharded.

    Args:
        model: the model, changed in place.
        weights: a whole tensor for each entry, by name.
    """
    with torch.no_grad():
        for name, value in named_state(model).items():
            local(value).copy_(local_like(weights[name], value))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """Move a tensor to the device of ``like``, and shard it if ``like`` is sharded."""
    moved = value.to(like.device)
    if not is_sharded(like):
        return moved
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
