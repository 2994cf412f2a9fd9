"""Averages of the weights as a callback of Lightning."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from openvclip.checkpoints.api import save_checkpoint
from openvclip.errors import UsageError
from openvclip.integrations.lightning.callback import LightningCallback, overrides, runs_deepspeed
from openvclip.integrations.steps import (
    StepCounter,
    is_sharded_model,
    load_average,
    require_trained,
    require_whole_weights,
    state_of_average,
)
from openvclip.weights.schedule import Tracker


class AveragingCallback(LightningCallback):
    """Average the weights along a run of a Lightning ``Trainer``: SWA, EMA, LAWA.

    ::

        averaging = AveragingCallback(lambda model: openvclip.SWATracker(model, start=1000))
        trainer = lightning.Trainer(callbacks=[averaging])
        trainer.fit(module, loader)
        theta = averaging.tracker.averaged_state_dict()

    The tracker is updated at the end of each training batch in which an optimizer stepped. Steps
    that a ``GradScaler`` skips are not counted. The module keeps its own weights. The callback's
    state in a checkpoint holds the average, so a resumed run continues it.

    Args:
        tracker: a tracker such as :class:`openvclip.SWATracker`, or a function that returns a
            tracker for a model. The function is called when a run begins, before a checkpoint is
            loaded (after it, if the module overrides ``configure_model()``).
        model: name of the submodule that is averaged. Default: the whole module. A tracker that
            was created for a part of the module needs the name of this part.
        evaluate: whether validation, test and prediction use the average. Before the first model
            is in the average, they use the weights themselves.
        file: a safetensors file, to which the average is written when the training ends.
        name: name of the average in checkpoints. Each callback needs its own name.

    Raises:
        UsageError: the run can't be averaged: DeepSpeed, ``FullyShardedDataParallel``, no trained
            parameter in the model, two callbacks of one name; or a checkpoint is saved while the
            module holds the average.
        StateMismatchError: the tracker was created for another module.
        EmptyAverageError: ``file`` is given, and no model was averaged in the training.
    """

    def __init__(
        self,
        tracker: Tracker | Callable[[nn.Module], Tracker],
        *,
        model: str = "",
        evaluate: bool = False,
        file: str | os.PathLike[str] | None = None,
        name: str = "average",
    ) -> None:
        super().__init__(model)
        self._make = None if isinstance(tracker, Tracker) else tracker
        self._tracker = tracker if isinstance(tracker, Tracker) else None
        self._name = name
        self.evaluate = evaluate
        self.file = file
        self._counter: StepCounter | None = None
        self._applied: ExitStack | None = None

    @property
    def tracker(self) -> Tracker:
        """The tracker.

        Raises:
            UsageError: the tracker is given as a function, and no run has begun.
        """
        if self._tracker is None:
            raise UsageError(
                "The tracker does not exist yet: it is created when fit(), validate(), test() or "
                "predict() begins."
            )
        return self._tracker

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return f"{type(self).__qualname__}{{'name': {self._name!r}}}"

    # --- the run -----------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Create the tracker, if it is given as a function.

        Args:
            trainer: see ``Callback.setup`` of Lightning.
            pl_module: see ``Callback.setup`` of Lightning.
            stage: see ``Callback.setup`` of Lightning.
        """
        self.require_once(trainer, same_name=self.state_key)
        self._saved = None
        if not overrides(pl_module, "configure_model"):
            self._create(pl_module)

    def _create(self, pl_module: Any) -> None:
        if self._tracker is None:
            assert self._make is not None
            self._tracker = self._make(self._model(pl_module))

    def _resume(self, pl_module: Any) -> Tracker:
        """Return the tracker with the state of the checkpoint from which the run resumes."""
        self._create(pl_module)
        if self._saved is not None:
            load_average(self.tracker, self._saved, self._model(pl_module))
            self._saved = None
        return self.tracker

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the set-up, and begin to count the steps of the optimizers.

        Args:
            trainer: see ``Callback.on_train_start`` of Lightning.
            pl_module: see ``Callback.on_train_start`` of Lightning.
        """
        model = self._model(pl_module)
        require_whole_weights(trainer.strategy.model, deepspeed=runs_deepspeed(trainer))
        require_trained(model, trainer.optimizers, "averaged")
        self._resume(pl_module).check_model(model)
        self._stop()
        ours = {id(parameter) for parameter in model.parameters()}
        self._counter = StepCounter(
            optimizer
            for optimizer in trainer.optimizers
            if any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if an optimizer stepped in this batch.

        Args:
            trainer: see ``Callback.on_train_batch_end`` of Lightning.
            pl_module: see ``Callback.on_train_batch_end`` of Lightning.
            outputs: see ``Callback.on_train_batch_end`` of Lightning.
            batch: see ``Callback.on_train_batch_end`` of Lightning.
            batch_idx: see ``Callback.on_train_batch_end`` of Lightning.
        """
        if self._counter is not None and self._counter.take():
            self.tracker.update(self._model(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the average to the file.

        Args:
            trainer: see ``Callback.on_train_end`` of Lightning.
            pl_module: see ``Callback.on_train_end`` of Lightning.
        """
        self._stop()
        if self.file is not None:
            average = self.tracker.averaged_state_dict()
            if trainer.is_global_zero or is_sharded_model(pl_module):
                save_checkpoint(average, self.file)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the weights of the module.

        Args:
            trainer: see ``Callback.teardown`` of Lightning.
            pl_module: see ``Callback.teardown`` of Lightning.
            stage: see ``Callback.teardown`` of Lightning.
        """
        self._stop()

    def _stop(self) -> None:
        self._restore()
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    # --- evaluation --------------------------------------------------------------------------

    def _apply(self, pl_module: Any) -> None:
        tracker = self._resume(pl_module)
        if self.evaluate and tracker.n_averaged and self._applied is None:
            self._applied = ExitStack()
            self._applied.enter_context(tracker.applied(self._model(pl_module)))

    def _restore(self) -> None:
        applied, self._applied = self._applied, None
        if applied is not None:
            applied.close()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the module.

        Args:
            trainer: see ``Callback.on_validation_start`` of Lightning.
            pl_module: see ``Callback.on_validation_start`` of Lightning.
        """
        self._apply(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the weights of the module.

        Args:
            trainer: see ``Callback.on_validation_end`` of Lightning.
            pl_module: see ``Callback.on_validation_end`` of Lightning.
        """
        self._restore()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the module.

        Args:
            trainer: see ``Callback.on_test_start`` of Lightning.
            pl_module: see ``Callback.on_test_start`` of Lightning.
        """
        self._apply(pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the weights of the module.

        Args:
            trainer: see ``Callback.on_test_end`` of Lightning.
            pl_module: see ``Callback.on_test_end`` of Lightning.
        """
        self._restore()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the module.

        Args:
            trainer: see ``Callback.on_predict_start`` of Lightning.
            pl_module: see ``Callback.on_predict_start`` of Lightning.
        """
        self._apply(pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the weights of the module.

        Args:
            trainer: see ``Callback.on_predict_end`` of Lightning.
            pl_module: see ``Callback.on_predict_end`` of Lightning.
        """
        self._restore()

    # --- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that would not hold the weights of the training.

        Args:
            trainer: see ``Callback.on_save_checkpoint`` of Lightning.
            pl_module: see ``Callback.on_save_checkpoint`` of Lightning.
            checkpoint: see ``Callback.on_save_checkpoint`` of Lightning.
        """
        if self._applied is not None:
            raise UsageError(
                "A checkpoint is saved while the module holds the average, so the weights of the "
                "training would be lost. Save the checkpoint after the validation, for example in "
                "on_validation_end() of a callback that stands behind AveragingCallback."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker, for a checkpoint."""
        if self._saved is not None:
            return self._saved
        return {} if self._tracker is None else state_of_average(self._tracker)
