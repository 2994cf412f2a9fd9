"""What all averages along a training run share: the schedule, and the errors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openvclip.errors import (
    EmptyAverageError,
    NonFiniteWeightsError,
    StateMismatchError,
    UsageError,
    listed,
)
from openvclip.weights.arguments import as_float, is_whole, require_own_keys
from openvclip.weights.numerics import non_finite_names


def require_decay(decay: float) -> float:
    """Return the decay of an exponential average, or raise :class:`UsageError`."""
    if not 0.0 <= as_float(decay) < 1.0:
        raise UsageError(f"decay={decay!r}: expected a number in [0, 1), such as 0.9999.")
    return float(decay)


def warmed_up(decay: float, n_averaged: int) -> float:
    """Return the decay of an exponential average after ``n_averaged`` models, with a warm-up."""
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class Tracker(ABC):
    """An average along a training run: of whole weights, or of LoRA adapters.

    Args:
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        check_finite: whether to refuse weights that hold NaN or infinity.

    Raises:
        UsageError: ``start`` or ``every`` is out of range.
    """

    _settings: ClassVar[tuple[str, ...]] = ("start", "every")
    """Names of the attributes that ``state_dict()`` saves and ``load_state_dict()`` restores."""

    _optional_settings: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that can be None."""

    def __init__(self, start: int, every: int, check_finite: bool) -> None:
        if not (is_whole(start, 0) and is_whole(every, 1)):
            raise UsageError(
                f"start={start!r}, every={every!r}: expected whole numbers of steps, start >= 0 "
                "and every >= 1."
            )
        self.start, self.every = int(start), int(every)  # torch.load refuses numbers of NumPy
        self.check_finite = check_finite
        self._steps = 0
        self._n_averaged = 0

    @property
    def n_averaged(self) -> int:
        """Number of models in the average."""
        return self._n_averaged

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Count one training step, and add the weights of ``model`` if the schedule says so.

        Args:
            model: the model after the step of the optimizer.

        Returns:
            Whether the weights were added to the average.

        Raises:
            NonFiniteWeightsError: the weights hold NaN or infinity, in any process that holds
                shards of them. The average does not change, but the step is counted. Not raised
                with ``check_finite=False``.
            StateMismatchError: names or shapes differ from those of the tracked model.
            UsageError: a parameter that was frozen when the tracker was created now requires
                gradients.

        Warns:
            OptimizerModeWarning: the weights are those of a schedule-free optimizer in training
                mode. Call ``optimizer.eval()`` before the update, and ``optimizer.train()`` after.
        """
        self._steps += 1
        steps_after_start = self._steps - self.start
        is_due = steps_after_start > 0 and steps_after_start % self.every == 0
        if is_due:
            self._add_model(model)
        return is_due

    @abstractmethod
    def check_model(self, model: nn.Module) -> None:
        """Raise the error that :meth:`update` would raise, without a change of the average.

        Use this method before a long training, because a tracker with a late ``start`` looks at
        the model for the first time after this number of steps.

        Args:
            model: the model that :meth:`update` will get.

        Raises:
            StateMismatchError: names or shapes differ from those of the tracked model.
            UsageError: a parameter that was frozen when the tracker was created now requires
                gradients.
        """

    @abstractmethod
    def _add_model(self, model: nn.Module) -> None:
        """Add the weights of a model to the average."""

    @abstractmethod
    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the average as a state dict."""

    @abstractmethod
    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Use the average in ``model`` inside a ``with`` block."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker, with which a run resumes bitwise."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""

    def _require_finite(self, weights: Mapping[str, Tensor]) -> None:
        broken = non_finite_names(weights) if self.check_finite else []
        if broken:
            raise NonFiniteWeightsError(
                f"The weights hold NaN or infinity in {len(broken)} entries ({listed(broken)}), so "
                f"they were not added. The average of {self.n_averaged} models did not change. "
                "Look for a learning rate that is too high or a loss that overflows."
            )

    def _require_models(self) -> None:
        if self._n_averaged == 0:
            raise EmptyAverageError(
                f"The average is empty after {self._steps} steps: with start={self.start} and "
                f"every={self.every}, a model first enters at step {self.start + self.every}. "
                "Call update(model) after each step of the optimizer."
            )

    def _require_own_state(self, state: Mapping[str, Any]) -> None:
        owner = f"a {type(self).__name__}"
        require_own_keys(state, self.state_dict().keys(), owner)
        own = {"steps": 0, "n_averaged": 0} | {name: getattr(self, name) for name in self._settings}
        for name, value in own.items():
            if state[name] is None and name in self._optional_settings:
                continue
            if not _is_like(state[name], value):
                raise self._damaged(name, f"is {state[name]!r}")

    def _require_entries(
        self, state: Mapping[str, Any], name: str, kind: type | tuple[type, ...] = object
    ) -> None:
        """Check that an entry of a saved state holds values of a kind by name."""
        entries = state[name]
        if not isinstance(entries, Mapping):
            raise self._damaged(name, f"is a {type(entries).__name__}, not a dict")
        for key, value in entries.items():
            if not isinstance(value, kind):
                raise self._damaged(name, f"holds a {type(value).__name__} as {key!r}")

    def _damaged(self, name: str, how: str) -> StateMismatchError:
        owner = f"a {type(self).__name__}"
        return StateMismatchError(
            f"The entry {name!r} of the state {how}, which {owner} does not save.",
            hint=f"Pass the result of state_dict() of {owner}.",
        )


def _is_like(value: object, own: bool | int | float | None) -> bool:
    """Return whether a saved number can be of the same attribute as ``own``."""
    if isinstance(own, bool):
        return isinstance(value, bool)
    if isinstance(own, float):
        return not math.isnan(as_float(value))
    return is_whole(value, 0)
