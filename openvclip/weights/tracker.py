"""What all averages of weights along a run share: schedule, entries, applying, resuming."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import (
    EmptyAverageError,
    NonFiniteWeightsError,
    StateMismatchError,
    UsageError,
)
from openvclip.weights.names import listed, named_parameters, named_state, require_match
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    foreach,
    is_interpolable,
    non_finite_names,
    overwriting,
)
from openvclip.weights.shards import local, reshard


class WeightTracker(ABC):
    """Base of the trackers; a subclass says how weights enter the average and how it is read.

    The rules that all share: the parameters that require gradients when the tracker is made are
    averaged (all parameters where none does), and everything else is carried as it is at the last
    update. Weights that are not finite are refused. Under ``fully_shard`` each process averages
    its own shards.
    """

    _settings: tuple[str, ...] = ("start", "every")
    """Attributes that are saved and loaded with the average."""

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int,
        every: int,
        dtype: torch.dtype,
        check_finite: bool,
        parts: tuple[str, ...],
        device: torch.device | str | None = None,
    ) -> None:
        if not (isinstance(start, int) and isinstance(every, int) and start >= 0 and every >= 1):
            raise UsageError(
                f"start={start!r}, every={every!r}: expected whole numbers of steps, start >= 0 "
                "and every >= 1."
            )
        self.start = start
        self.every = every
        self.dtype = dtype
        self.check_finite = check_finite
        self._device = None if device is None else torch.device(device)
        self._steps = 0
        self._n_averaged = 0
        self._averaged_names = frozenset(_names_to_average(model))
        state, self._aliases = _split_aliases(model)
        # Meta tensors: names, shapes and dtypes of the model to expect, without memory.
        self._expected = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in state.items()
        }
        # Sets of tensors, each with the averaged names in the model's order, or empty.
        self._parts: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        self._carried: dict[str, Tensor] = {}

    @abstractmethod
    def _enter(self, weights: dict[str, Tensor]) -> None:
        """Let the finite weights of a model into ``self._parts``, in place from the second on."""

    @abstractmethod
    def _means(self) -> dict[str, Tensor]:
        """The average of at least one model, in new tensors."""

    def _wide_copy(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries in the dtype in which they are averaged, on the average's device."""
        copied = {}
        for name, value in weights.items():
            dtype = common_dtype(self.dtype, compute_dtype(value.dtype))
            copied[name] = value.to(self._device or value.device, dtype, copy=True)
        return copied

    @property
    def n_averaged(self) -> int:
        """Number of models in the average so far."""
        return self._n_averaged

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Count one training step and, where it is due, add the weights of ``model``.

        Args:
            model: the model after the optimizer's step.

        Returns:
            Whether the weights entered the average.

        Raises:
            NonFiniteWeightsError: the weights hold NaN or infinity, in any of the processes that
                hold shards of them. The average is as before; the step counts. Not raised with
                ``check_finite=False``.
            StateMismatchError: the model's names or shapes are not those of the tracked model.
            UsageError: a parameter requires gradients now and did not when the tracker was made.
        """
        self._steps += 1
        since = self._steps - self.start
        due = since > 0 and since % self.every == 0
        if due:
            self._add(model)
        return due

    def _add(self, model: nn.Module) -> None:
        averaged, carried = self._live(model)
        broken = non_finite_names(averaged) if self.check_finite else []
        if broken:
            raise NonFiniteWeightsError(
                f"The weights hold NaN or infinity in {len(broken)} entries ({listed(broken)}), so "
                f"they were not added; the average of {self.n_averaged} models is as it was. "
                "Look for a learning rate that is too high or a loss that overflows."
            )
        self._enter(averaged)
        if self._carried:
            _copy(self._carried, carried)
        else:
            self._carried = {name: value.clone() for name, value in carried.items()}
        self._n_averaged += 1

    def _live(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's entries, detached: those to average and the rest, in the tracker's order."""
        state, self._aliases = _split_aliases(model)
        require_match(
            self._expected, state, "The model is not the one that the tracker was made for."
        )
        late = [
            name
            for name, value in state.items()
            if value.requires_grad and name not in self._averaged_names
        ]
        if late:
            raise UsageError(
                f"{len(late)} parameters require gradients that did not when the tracker was made "
                f"({listed(late)}). Make the tracker after the last change of requires_grad."
            )
        entries = {name: state[name].detach() for name in self._expected}
        averaged = {
            name: entries.pop(name) for name in list(entries) if name in self._averaged_names
        }
        self._follow_devices(averaged, entries)
        return averaged, entries

    def _follow_devices(self, averaged: dict[str, Tensor], carried: dict[str, Tensor]) -> None:
        """Move the average to its device or the model's, which may have moved since."""
        for own, live in (
            *((part, averaged) for part in self._parts.values()),
            (self._carried, carried),
        ):
            device = self._device if live is averaged else None
            own.update({n: value.to(device or live[n].device) for n, value in own.items()})

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The average as a state dict under the plain model's names.

        Returns:
            New tensors: averaged entries in ``dtype`` or wider, the rest as carried. Under
            ``fully_shard`` they are shards, as in ``model.state_dict()``.

        Raises:
            EmptyAverageError: no step was averaged yet.
        """
        self._require_some()
        means = self._means()
        state = {
            name: means[name] if name in means else self._carried[name].clone()
            for name in self._expected
        }
        state.update({alias: state[name].clone() for alias, name in self._aliases.items()})
        return state

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the average into ``model`` for the length of a ``with`` block.

        The live weights are back, bitwise, afterwards, also after an exception. The parameters
        stay the same objects, so optimizers keep working.

        Raises:
            EmptyAverageError: no step was averaged yet.
            StateMismatchError: the average does not fit the model.
        """
        self._require_some()
        averaged, carried = self._live(model)
        try:
            with overwriting([local(value) for value in (*averaged.values(), *carried.values())]):
                with torch.no_grad():
                    _copy(averaged, self._means())
                    _copy(carried, self._carried)
                yield model
        finally:
            reshard(model)  # or gathered copies of the average stay in use

    def _require_some(self) -> None:
        if self._n_averaged == 0:
            raise EmptyAverageError(
                f"The average is empty: after {self._steps} steps no model has entered it, since "
                f"start={self.start} and every={self.every} (the first enters at step "
                f"{self.start + self.every}). Call update(model) after each step."
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if never stopped, bitwise.

        The tensors are the tracker's own: save them, or clone them before the next update.
        """
        return {
            "steps": self._steps,
            "n_averaged": self._n_averaged,
            **{setting: getattr(self, setting) for setting in self._settings},
            **{part: dict(held) for part, held in self._parts.items()},
            "carried": dict(self._carried),
            "aliases": dict(self._aliases),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` gave, copying its tensors.

        Raises:
            StateMismatchError: it belongs to another model, to a run that trained other
                parameters, or lacks an entry.
        """
        wanted = self.state_dict().keys()
        if state.keys() != wanted:
            raise StateMismatchError(
                f"This is not the state of a {type(self).__name__}.",
                missing=wanted - state.keys(),
                unexpected=state.keys() - wanted,
            )
        if state["n_averaged"]:
            self._require_same_entries(state)
        self._steps, self._n_averaged = int(state["steps"]), int(state["n_averaged"])
        for setting in self._settings:
            setattr(self, setting, type(getattr(self, setting))(state[setting]))
        self._parts = {part: self._own_entries(state[part]) for part in self._parts}
        self._carried = self._own_entries(state["carried"])
        self._aliases = dict(state["aliases"])

    def _own_entries(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # In the model's order, which the foreach operations rely on: a file may have another.
        return {name: saved[name].clone() for name in self._expected if name in saved}

    def _require_same_entries(self, state: dict[str, Any]) -> None:
        trained = {name: self._expected[name] for name in self._averaged_names}
        rest = {name: v for name, v in self._expected.items() if name not in trained}
        hint = "Freeze the same parameters as in the run that was saved."
        for number, part in enumerate(self._parts):
            if number == 0 or state[part]:  # the first holds something from the first model on
                what = "The saved average is not of what this model trains."
                require_match(trained, state[part], what, hint)
        require_match(rest, state["carried"], "The saved average is not of this model.", hint)


def shards(entries: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process holds of the entries."""
    return [local(value) for value in entries.values()]


def _names_to_average(model: nn.Module) -> list[str]:
    parameters = named_parameters(model)
    trained = [name for name, value in parameters.items() if value.requires_grad]
    return trained or [name for name, value in parameters.items() if is_interpolable(value)]


def _split_aliases(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The entries of the state dict, each once, and ``{further name: first name}`` for the rest."""
    first: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in named_state(model).items():
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            state[name] = value
    return state, aliases


@torch.no_grad()
def _copy(target: dict[str, Tensor], source: Mapping[str, Tensor]) -> None:
    if target:
        values = {name: source[name] for name in target}
        foreach._foreach_copy_(shards(target), shards(values))
