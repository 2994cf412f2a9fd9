"""IWR and weight averages in a loop of Hugging Face's ``accelerate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from openvclip.errors import StateMismatchError, UsageError
from openvclip.integrations.steps import (
    InterpolatedPasses,
    StepCounter,
    load_states,
    require_trained,
    require_whole_weights,
    states_of,
)
from openvclip.weights.gradients import innermost, require_one_evaluation
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.schedule import Tracker

__all__ = ["RegularizedLoop"]


class RegularizedLoop:
    """Add IWR and weight averages to a loop of accelerate, and to its saved states.

    The loop stays as in accelerate's documentation. :meth:`backward` replaces
    ``accelerator.backward``, and :meth:`update` follows the step of the optimizer::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        iwr = openvclip.InterpolatedWeightRegularizer(model, anchor=clip)
        swa = openvclip.SWATracker(model, start=1000)
        regularized = RegularizedLoop(
            accelerator, model, optimizer, regularizer=iwr, averages=[swa]
        )
        for video, label in loader:
            with accelerator.accumulate(model):
                loss = regularized.backward(lambda: criterion(model(video), label))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                regularized.update()

    All micro-batches of an optimizer step have the same alpha. The ``every`` of the regulariser
    counts optimizer steps. With a ``share`` below 1, give the batch to :meth:`backward`, as in
    ``regularized.backward(loss_of, video, label)``. The averages are updated after each optimizer
    step that a ``GradScaler`` did not skip. Gradients are reduced over the processes once in a
    step.

    The object is registered for checkpointing: ``accelerator.save_state()`` and
    ``accelerator.load_state()`` save and restore the regulariser and the averages.

    Args:
        accelerator: the ``accelerate.Accelerator``.
        model: the prepared model that the closures call.
        optimizer: the prepared optimizer, or several of them.
        regularizer: the regulariser of the model or of a part of it, created without an optimizer.
            Default: no regularisation.
        averages: trackers. Default: none.
        averaged: the module that the trackers average, if it is a part of ``model``. Default:
            ``model``.

    Raises:
        UsageError: the loop can't be regularised rightly: DeepSpeed, ``FullyShardedDataParallel``
            (FSDP1), an optimizer that evaluates the loss several times (LBFGS), or an optimizer of
            another model.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        *,
        regularizer: InterpolatedWeightRegularizer | None = None,
        averages: Sequence[Tracker] = (),
        averaged: nn.Module | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.regularizer = regularizer
        self.averages = tuple(averages)
        self.averaged = model if averaged is None else averaged
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self._optimizers = [innermost(one) for one in optimizers]
        self._check()
        self._passes = None if regularizer is None else InterpolatedPasses(regularizer)
        self._counter = StepCounter(self._optimizers)
        self._step = 0  # optimizer steps, with those that a scaler skipped
        self._called = False  # backward(), since the last optimizer step
        accelerator.register_for_checkpointing(self)

    def _check(self) -> None:
        kind = str(getattr(self.accelerator.distributed_type, "value", ""))
        require_whole_weights(self.model, deepspeed=kind == "DEEPSPEED")
        if self.regularizer is not None:
            for optimizer in self._optimizers:
                require_one_evaluation(optimizer)
            require_trained(self.regularizer.model, self._optimizers, "regularised")
        if self.averages:
            require_trained(self.averaged, self._optimizers, "averaged")
        for average in self.averages:
            average.check_model(self.averaged)

    def backward(self, closure: Callable[..., Tensor], *batch: Any) -> Tensor:
        """Run the backward passes of a micro-batch. Return the loss of the weights themselves.

        Args:
            closure: function that runs the forward pass and returns the loss, a scalar. It is
                called at the interpolated weights first, then at the weights themselves.
            batch: arguments of the closure. With ``share`` below 1, the closure gets a random part
                of them at the interpolated weights.

        Returns:
            The loss of the weights themselves, detached.

        Raises:
            UsageError: an optimizer stepped, and :meth:`update` was not called after it; or
                ``share`` is below 1, and there is no batch.
        """
        if self._called and self._counter.waits:
            raise UsageError(
                "An optimizer stepped since the last call of backward(), but update() was not "
                "called. Call update() after optimizer.step(), in each micro-batch."
            )
        self._called = True
        if self._passes is not None and self._passes.is_due(self._step):
            part = self._passes.regularizer.part_of(*batch)
            with self._passes.interpolated(self._step, self.model):
                self.accelerator.backward(self._passes.regularizer.weight * closure(*part))
        loss = closure(*batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def update(self) -> bool:
        """Count an optimizer step, and update the averages. Call this after ``optimizer.step()``.

        Between two micro-batches of a step, this method does nothing.

        Returns:
            Whether the weights changed, so that the averages were updated.

        Raises:
            UsageError: :meth:`backward` was not called for this step.
        """
        if not self.accelerator.sync_gradients:
            return False
        stepped = self._counter.take()
        if self.regularizer is not None and stepped and not self._called:
            raise UsageError(
                "An optimizer stepped without a call of RegularizedLoop.backward(), so the step "
                "was not regularised. Call backward(closure) instead of accelerator.backward()."
            )
        self._called = False
        self._step += 1
        if stepped:
            for average in self.averages:
                average.update(self.averaged)
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """Return the states, for ``accelerator.save_state()``.

        The tensors of sharded averages are gathered, so every process must call this method.
        """
        return {**states_of(self._passes, self.averages), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the states, for ``accelerator.load_state()``.

        Raises:
            CheckpointError: the saved loop had another number of averages, or a regulariser where
                this loop has none.
            StateMismatchError: the state belongs to another object, model or anchor.
        """
        expected = {"regularizer", "averages", "step"}
        if state.keys() != expected:
            raise StateMismatchError(
                "This is not the state of a RegularizedLoop. Create the objects that accelerate "
                "registers for checkpointing in the same order as in the saved run.",
                missing=expected - state.keys(),
                unexpected=state.keys() - expected,
            )
        load_states(
            state,
            self._passes,
            self.averages,
            self.averaged,
            source="The saved state",
            owner="RegularizedLoop",
        )
        self._step, self._called = int(state["step"]), False
        self._counter.take()
