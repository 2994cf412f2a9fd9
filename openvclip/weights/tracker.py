"""The base class of all weight averages: schedule, entries, use in a model, saving and resuming."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, listed
from openvclip.weights.arguments import require_device
from openvclip.weights.kinds import require_values
from openvclip.weights.moves import Blend, Move, insist
from openvclip.weights.names import require_match
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    copy_all,
    overwriting,
)
from openvclip.weights.schedule import Tracker
from openvclip.weights.schedule_free import warn_of_training_weights, watch_optimizers
from openvclip.weights.shards import is_sharded, local, reshard
from openvclip.weights.statistics import statistics_modules, warn_of_old_statistics
from openvclip.weights.tracked import averaged_names, require_trackable, tracked_model

Entries: TypeAlias = dict[str, Tensor]
"""Tensors by canonical name. Under ``fully_shard`` the tensors are ``DTensor``."""


class WeightTracker(Tracker):
    """Base class of averages of a model's weights along a training run.

    All trackers follow the same rules. They average the parameters that require gradients when the
    tracker is created, or all parameters if none requires gradients. All other entries (frozen
    parameters and buffers) keep their values of the last averaged step. Weights that are not finite
    are refused. Under ``fully_shard`` each process averages its own shards.

    A new tracker is a subclass. It overrides three methods:

    * :meth:`_add` adds the weights of a model to the average.
    * :meth:`_mean` returns the average.
    * :meth:`_tensors` returns the dicts of tensors that the tracker keeps. The base class saves
      them, loads them and moves them between devices.

    A mean of the first and the last model, for example::

        class FirstAndLast(WeightTracker):
            def __init__(self, model, **options):
                super().__init__(model, **options)
                self._first, self._last = {}, {}

            def _add(self, weights):
                if self._n_averaged == 0:
                    self._first.update(self._wide_copy(weights))
                self._last.update(self._wide_copy(weights))

            def _mean(self):
                return {name: (self._first[name] + self._last[name]) / 2 for name in self._first}

            def _tensors(self):
                return {"first": self._first, "last": self._last}

    Args:
        model: the model whose weights are passed to :meth:`update`, with or without wrappers.
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        dtype: dtype of the average, at least float32.
        check_finite: whether to refuse weights that hold NaN or infinity.
        device: device of the average. Default: the device of each parameter.

    Raises:
        UsageError: ``start`` or ``every`` is out of range, ``dtype`` is not floating point, this
            machine does not have ``device``, or the state dict of the model does not hold a
            trained parameter.
        WeightTypeError: ``model`` is not a module, or a mean of its entries would not be a mean of
            models (factors of LoRA, quantised weights).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype = torch.float32,
        check_finite: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(start, every, check_finite)
        self.dtype = _require_floating(dtype)
        self._device = None if device is None else require_device(device, "device")
        state, self._aliases, self._extra_state = tracked_model(model)
        self._averaged_names = averaged_names(model, state)
        require_trackable(model, state, self._averaged_names)
        # The expected names, shapes and dtypes as meta tensors, which need no memory.
        self._expected = {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in state.items()
        }
        self._carried: Entries = {}
        self._is_whole = True
        self._n_statistics = len(statistics_modules(model))
        self._has_old_statistics = False
        watch_optimizers()

    # --- what a subclass overrides -----------------------------------------------------------

    @abstractmethod
    def _add(self, weights: Entries) -> None:
        """Add the weights of one model to the average.

        Args:
            weights: live weights with the averaged names, in the order of the model. They are
                finite unless ``check_finite=False``. Do not change them and do not keep them.
                ``self._n_averaged`` is the number of models that were added before.
        """

    @abstractmethod
    def _mean(self) -> Entries:
        """Return the average as new tensors. At least one model was added before this call."""

    @abstractmethod
    def _tensors(self) -> dict[str, Entries]:
        """Return the dicts of tensors that the tracker keeps, by their names in ``state_dict()``.

        Each dict holds the averaged names or is empty. The first dict must not be empty after a
        model was added. The base class changes the dicts in place, so return the same dict objects
        in each call.
        """

    def _wide_copy(self, weights: Entries) -> Entries:
        """Return copies of the weights in the dtype and on the device of the average."""
        copies = {}
        for name, value in weights.items():
            dtype = common_dtype(self.dtype, compute_dtype(value.dtype))
            copies[name] = value.to(self._device or value.device, dtype, copy=True)
        return copies

    # --- what all trackers share -------------------------------------------------------------

    def check_model(self, model: nn.Module) -> None:
        """Raise the error that :meth:`update` would raise, without a change of the average.

        Args:
            model: the model that :meth:`update` will get.
        """
        self._live(model)

    def _add_model(self, model: nn.Module) -> None:
        self._require_whole()
        live, carried, extra_state = self._live(model)
        warn_of_training_weights(live.values())
        if self._n_statistics and self._n_averaged:
            layers = statistics_modules(model).values()
            self._has_old_statistics |= any(layer.training for layer in layers)
        averaged, carried = _detached(live), _detached(carried)
        if self._extra_state:
            extra_state = copy.deepcopy(extra_state)
        looks = self.check_finite and _are_plain_on_cpu(averaged.values())
        moves = self._moves(averaged, looks)
        if moves is None:
            self._require_finite(averaged)
            self._add(averaged)
            moves = []
        elif not (len(moves) == 1 and moves[0].looks):
            self._require_finite(averaged)
        if not self._enter(moves, carried, extra_state):
            self._require_finite(averaged)

    def _moves(self, weights: Entries, look: bool) -> list[Move] | None:
        """Return the moves that add the weights of one model, or ``None`` to call :meth:`_add`.

        Args:
            weights: as in :meth:`_add`.
            look: whether a single move can look for NaN itself.
        """
        return None

    def _keep_numbers(self) -> None:
        """Keep the numbers that belong to the average with the new model. Called once or more."""

    def _enter(self, moves: list[Move], carried: Entries, extra_state: dict[str, Any]) -> bool:
        """Let a model enter whole, also if Ctrl-C interrupts the update, or not at all.

        Returns:
            Whether the model entered. It does not if its values are not finite.
        """
        number, is_finite = self._n_averaged + 1, True

        def take_back() -> None:
            for move in reversed(moves):
                move.take_back()
            self._is_whole = True

        def enter() -> None:
            nonlocal is_finite
            self._is_whole = False
            is_finite = is_finite and all(move.run() for move in moves)
            if not is_finite:
                take_back()
                return
            if self._carried:
                _copy(self._carried, carried)
            else:
                self._carried = {name: value.clone() for name, value in carried.items()}
            self._extra_state = extra_state
            self._keep_numbers()
            self._n_averaged = number
            self._is_whole = True

        try:
            error = insist(enter)
        except Exception:
            if all(move.can_be_taken_back for move in moves):
                insist(take_back)
            raise
        except BaseException:  # Ctrl-C while another one was handled
            insist(enter)
            raise
        if error is not None:
            raise error
        return is_finite

    def _move(self, average: Entries, weights: Entries, blend: Blend, look: bool = False) -> Move:
        """Return a move of the weights to an average."""
        averages, models = shards(average), shards(weights)
        if self._device is not None:
            models = [value.to(self._device) for value in models]
        # Weights that are not converted enter in one call, which is faster after a look at them.
        converted = any(a.dtype != m.dtype for a, m in zip(averages, models, strict=True))
        return Move(averages, models, blend, look=look and converted)

    def _live(self, model: nn.Module) -> tuple[Entries, Entries, dict[str, Any]]:
        """Return the live entries to average, all other live entries, and the extra state."""
        state, self._aliases, extra_state = tracked_model(model)
        require_match(
            self._expected,
            state,
            "The model does not fit the tracker: the tracked model defines the expected names and "
            "shapes.",
        )
        late = [
            name
            for name, value in state.items()
            if value.requires_grad and name not in self._averaged_names
        ]
        if late:
            raise UsageError(
                f"{len(late)} parameters require gradients now but were frozen when the tracker "
                f"was created ({listed(late)}). Create the tracker after the last change of "
                "requires_grad."
            )
        require_values({n: value for n, value in state.items() if value.is_meta}, "The model")
        carried = {name: state[name] for name in self._expected}
        averaged = {
            name: carried.pop(name) for name in list(carried) if name in self._averaged_names
        }
        self._follow_devices(averaged, carried)
        return averaged, carried, extra_state

    def _follow_devices(self, averaged: Entries, carried: Entries) -> None:
        """Move the average to its device. Default: the current device of each live entry."""
        for entries in self._tensors().values():
            for name, value in entries.items():
                entries[name] = value.to(self._device or averaged[name].device)
        for name, value in self._carried.items():
            self._carried[name] = value.to(carried[name].device)

    def averaged_state_dict(self) -> Entries:
        """Return the average as a state dict under canonical names.

        Returns:
            New tensors. Averaged entries have ``dtype`` or a wider dtype. All other entries have
            the values and the dtype of the last averaged step. Extra state (``get_extra_state``)
            is that of the last averaged step and comes last. Under ``fully_shard`` the entries are
            shards, as in ``model.state_dict()``.

        Raises:
            EmptyAverageError: no model was added yet.

        Warns:
            StatisticsWarning: the model has running statistics (batch norm). They belong to the
                last model: see :func:`openvclip.update_statistics`.
        """
        self._require_models()
        mean = self._mean()
        state = {
            name: mean[name] if name in mean else self._carried[name].clone()
            for name in self._expected
        }
        state.update({alias: state[name].clone() for alias, name in self._aliases.items()})
        return {**state, **copy.deepcopy(self._extra_state)}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Use the average as the weights of ``model`` inside a ``with`` block.

        After the block, the live weights are restored bitwise, also after an exception. The
        parameters stay the same objects, so optimizers keep working.

        Args:
            model: the tracked model.

        Yields:
            ``model``.

        Raises:
            EmptyAverageError: no model was added yet.
            StateMismatchError: names or shapes differ from those of the tracked model.

        Warns:
            StatisticsWarning: as in :meth:`averaged_state_dict`.
        """
        self._require_models()
        averaged, carried, _ = self._live(model)
        try:
            with overwriting([*averaged.values(), *carried.values()]):
                with torch.no_grad():
                    _copy(averaged, self._mean())
                    _copy(carried, self._carried)
                yield model
        finally:
            reshard(model)  # frees gathered copies of the average

    def _require_models(self) -> None:
        super()._require_models()
        self._require_whole()
        if self._has_old_statistics:
            warn_of_old_statistics(self._n_statistics)

    def _require_whole(self) -> None:
        if not self._is_whole:
            raise UsageError(
                "An update of the average was interrupted several times, so a part of the model is "
                "in the average. Restore the last saved state with load_state_dict()."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker, with which a run resumes bitwise.

        The tensors are not copied. Save them, or clone them before the next call of
        :meth:`update`.
        """
        return {
            "steps": self._steps,
            "n_averaged": self._n_averaged,
            **{setting: getattr(self, setting) for setting in self._settings},
            **{name: dict(entries) for name, entries in self._tensors().items()},
            "carried": dict(self._carried),
            "aliases": dict(self._aliases),
            **({"extra_state": dict(self._extra_state)} if self._extra_state else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`. The tensors are copied.

        Raises:
            StateMismatchError: an entry is missing or unknown, or the state belongs to another
                model or to a run that trained other parameters.
        """
        self._require_own_state(state)
        self._require_entries(state, "aliases")
        for name in (*self._tensors(), "carried"):
            self._require_entries(state, name, Tensor)
        if state["n_averaged"]:
            self._require_same_entries(state)
        self._steps, self._n_averaged = int(state["steps"]), int(state["n_averaged"])
        for setting in self._settings:
            setattr(self, setting, type(getattr(self, setting))(state[setting]))
        for name, entries in (*self._tensors().items(), ("carried", self._carried)):
            entries.clear()
            entries.update(self._copied_in_order(state[name]))
        self._is_whole = True
        self._aliases = dict(state["aliases"])
        self._extra_state = copy.deepcopy(state.get("extra_state", {}))

    def _copied_in_order(self, saved: Mapping[str, Tensor]) -> Entries:
        # The foreach operations rely on the model's order. A file can have another order.
        return {name: saved[name].clone() for name in self._expected if name in saved}

    def _require_same_entries(self, state: dict[str, Any]) -> None:
        trained = {name: self._expected[name] for name in self._averaged_names}
        carried = {name: v for name, v in self._expected.items() if name not in trained}
        hint = "Freeze the same parameters as in the run that was saved."
        for number, name in enumerate(self._tensors()):
            if number == 0 or state[name]:
                require_match(
                    trained,
                    state[name],
                    "The saved average does not fit the model: the trained parameters define the "
                    "expected names and shapes.",
                    hint,
                )
        require_match(
            carried,
            state["carried"],
            "The saved average does not fit the model: its frozen parameters and buffers define "
            "the expected names and shapes.",
            hint,
        )


def _require_floating(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype={dtype!r}: expected torch.float32 or torch.float64.")
    return dtype


def shards(entries: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the parts of the entries that this process holds."""
    return [local(value) for value in entries.values()]


def _are_plain_on_cpu(tensors: Iterable[Tensor]) -> bool:
    return all(value.device.type == "cpu" and not is_sharded(value) for value in tensors)


def _detached(entries: Entries) -> Entries:
    return {name: value.detach() for name, value in entries.items()}


@torch.no_grad()
def _copy(target: Entries, source: Mapping[str, Tensor]) -> None:
    values = {name: source[name] for name in target}
    copy_all(shards(target), shards(values))
