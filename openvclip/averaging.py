"""Averages of weights along a training run: Equation 10 and Algorithm 1 of Open-VCLIP."""

from __future__ import annotations

from collections.abc import Iterator
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
from openvclip.state import (
    common_dtype,
    compute_dtype,
    few,
    foreach,
    is_interpolable,
    named_parameters,
    named_state,
    non_finite_names,
    overwriting,
    require_match,
)

_BLOCK = 128  # models summed up before their sum is added to the others'


class SWATracker:
    r"""Stochastic weight averaging: the uniform mean of the weights at chosen steps.

    Algorithm 1: with ``T = start`` and ``c = every``, the weights after step ``s = 1, 2, ...``
    enter the average where ``s > T`` and ``(s - T) % c == 0``. By Equation 10 the average of
    interpolated weights is the interpolation of the average, so one average serves every
    :math:`\lambda`::

        theta = interpolate(clip, swa.averaged_state_dict(), 0.5)

    What is averaged: the parameters that require gradients when the tracker is made (all
    parameters where none does, for averaging checkpoints that are loaded one after the other).
    Everything else (frozen parameters, buffers such as batch-norm statistics) is carried as it
    is at the last update, so that frozen weights stay bitwise what they were.

    Numerics: the tracker keeps the *sum* of the weights in ``dtype`` and divides when read, where
    a running mean would round at every update; an update is one foreach addition. Sums of 128
    models are added up apart from each other, so that the rounding does not grow with the length
    of the run.

    Args:
        model: the model whose weights will be given to :meth:`update`. Wrappers
            (``DistributedDataParallel``, ``torch.compile``) may be around it.
        start: number of steps before the averaging begins (``T``), for example the warm-up.
        every: number of steps between two averaged models (``c``), for example one epoch.
        dtype: dtype of the sums, at least float32; a float64 parameter is summed in float64.

    Memory: one copy of the averaged parameters in ``dtype`` and one of the rest in its own dtype,
    on the model's devices, from the first averaged step on; one more copy of the averaged
    parameters from the 129th model on.

    Raises:
        UsageError: ``start`` or ``every`` is out of range.
        WeightTypeError: ``model`` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (isinstance(start, int) and isinstance(every, int) and start >= 0 and every >= 1):
            raise UsageError(
                f"start={start!r}, every={every!r}: expected whole numbers of steps, start >= 0 "
                "and every >= 1."
            )
        self.start = start
        self.every = every
        self.dtype = dtype
        self._steps = 0
        self._n_averaged = 0
        self._averaged_names = frozenset(_names_to_average(model))
        # Meta tensors: names, shapes and dtypes of the model to expect, without memory.
        self._expected = {
            name: torch.empty_like(value, device="meta")
            for name, value in _split_aliases(model)[0].items()
        }
        self._sums: dict[str, Tensor] = {}  # of the current block of models
        self._earlier: dict[str, Tensor] = {}  # of all full blocks before it
        self._carried: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}

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
            NonFiniteWeightsError: the weights hold NaN or infinity. The average is as before; the
                step counts.
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
        broken = non_finite_names(averaged)
        if broken:
            raise NonFiniteWeightsError(
                f"The weights hold NaN or infinity in {len(broken)} entries ({few(broken)}), so "
                f"they were not added; the average of {self._n_averaged} models is as it was. "
                "Look for a learning rate that is too high or a loss that overflows."
            )
        if self._n_averaged == 0:
            self._sums = {
                name: value.to(common_dtype(self.dtype, compute_dtype(value.dtype)), copy=True)
                for name, value in averaged.items()
            }
            self._carried = {name: value.clone() for name, value in carried.items()}
        else:
            if self._n_averaged % _BLOCK == 0:
                self._end_block()
            foreach._foreach_add_(list(self._sums.values()), list(averaged.values()))
            _copy(self._carried, carried)
        self._n_averaged += 1

    def _end_block(self) -> None:
        if self._earlier:
            foreach._foreach_add_(list(self._earlier.values()), list(self._sums.values()))
        else:
            self._earlier = {name: value.clone() for name, value in self._sums.items()}
        foreach._foreach_zero_(list(self._sums.values()))

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
                f"({few(late)}). Make the tracker after the last change of requires_grad."
            )
        entries = {name: state[name].detach() for name in self._expected}
        averaged = {
            name: entries.pop(name) for name in list(entries) if name in self._averaged_names
        }
        self._follow_devices(averaged, entries)
        return averaged, entries

    def _follow_devices(self, averaged: dict[str, Tensor], carried: dict[str, Tensor]) -> None:
        """Move the average to the model, which may have moved or been loaded elsewhere."""
        held = ((self._sums, averaged), (self._earlier, averaged), (self._carried, carried))
        for own, live in held:
            own.update({name: value.to(live[name].device) for name, value in own.items()})

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The average as a state dict under the plain model's names.

        Returns:
            New tensors: averaged entries in the dtype of the sums, the rest as carried.

        Raises:
            EmptyAverageError: no step was averaged yet.
        """
        self._require_some()
        means = dict(zip(self._sums, self._means(), strict=True))
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
        with overwriting([*averaged.values(), *carried.values()]):
            with torch.no_grad():
                foreach._foreach_copy_(list(averaged.values()), self._means())
                _copy(carried, self._carried)
            yield model

    def _means(self) -> list[Tensor]:
        sums = list(self._sums.values())
        if self._earlier:
            sums = foreach._foreach_add(list(self._earlier.values()), sums)
        return list(foreach._foreach_div(sums, float(self._n_averaged)))

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
            "start": self.start,
            "every": self.every,
            "sums": dict(self._sums),
            "earlier": dict(self._earlier),
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
                "This is not the state of a SWATracker.",
                missing=wanted - state.keys(),
                unexpected=state.keys() - wanted,
            )
        if state["n_averaged"]:
            self._require_same_entries(state["sums"], state["carried"])
        self._steps, self._n_averaged = int(state["steps"]), int(state["n_averaged"])
        self.start, self.every = int(state["start"]), int(state["every"])
        # In the model's order, which the foreach operations rely on: a file may have another.
        self._sums, self._earlier, self._carried = (
            {name: state[part][name].clone() for name in self._expected if name in state[part]}
            for part in ("sums", "earlier", "carried")
        )
        self._aliases = dict(state["aliases"])

    def _require_same_entries(self, sums: dict[str, Tensor], carried: dict[str, Tensor]) -> None:
        trained = {name: self._expected[name] for name in self._averaged_names}
        rest = {name: v for name, v in self._expected.items() if name not in trained}
        hint = "Freeze the same parameters as in the run that was saved."
        require_match(trained, sums, "The saved average is not of what this model trains.", hint)
        require_match(rest, carried, "The saved average is not of this model.", hint)


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
def _copy(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    if target:
        foreach._foreach_copy_(list(target.values()), [source[name] for name in target])
