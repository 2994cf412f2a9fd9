"""Interpolated weight regularisation as a callback of Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.integrations.lightning.callback import (
    LightningCallback,
    keeping_metrics,
    overrides,
    runs_deepspeed,
    without_log,
)
from openvclip.integrations.steps import (
    InterpolatedPasses,
    require_trained,
    require_whole_weights,
)
from openvclip.weights.gradients import require_one_evaluation
from openvclip.weights.regularization import InterpolatedWeightRegularizer


class IWRCallback(LightningCallback):
    """Train with interpolated weight regularisation in a Lightning ``Trainer``.

    With automatic optimization, the module stays as it is::

        clip = {name: value.clone() for name, value in module.model.state_dict().items()}
        iwr = openvclip.InterpolatedWeightRegularizer(module.model, anchor=clip)
        trainer = lightning.Trainer(callbacks=[IWRCallback(iwr)], gradient_clip_val=1.0)
        trainer.fit(module, loader)

    Before each training step, the callback runs the training step and the backward pass at the
    interpolated weights, with a loss that is weighted by C (Equation 9 of Open-VCLIP). Lightning
    then adds the gradients of the weights themselves, clips the sum, and steps. All micro-batches
    of an optimizer step have the same alpha. The ``every`` of the regulariser counts optimizer
    steps. With a ``share`` below 1, the training step at the interpolated weights gets a random
    part of the batch. Gradients are reduced over the processes once.

    ``training_step()`` and the hooks of a backward pass therefore run twice for a batch. In the
    first run, ``self.log()`` does nothing, and metrics of ``torchmetrics`` that are submodules are
    restored after the run. :attr:`is_interpolating` is true in this run. Use it if
    ``training_step()`` does other things that must happen once.

    With manual optimization, ``training_step()`` calls :func:`regularized_backward`.

    The callback's state in a checkpoint holds the state of the random numbers of alpha, so a
    resumed run continues the sequence of alphas.

    Args:
        regularizer: a regulariser of the module or of a part of it, created without an optimizer;
            or a function that returns the regulariser for a model. The function is called when
            ``fit()`` begins, before a checkpoint is loaded. If the module overrides
            ``configure_model()``, the function is called later: after this method, and after the
            checkpoint was loaded. The function must then pass ``anchor=`` to the regulariser.
        model: name of the submodule that is passed to the function. Default: the whole module.

    Raises:
        UsageError: the run can't be regularised rightly: DeepSpeed, ``FullyShardedDataParallel``,
            an optimizer that evaluates the loss several times (LBFGS), a ``training_step()`` that
            takes an iterator, a second ``IWRCallback``, a regulariser of another module, or manual
            optimization without :func:`regularized_backward`.
    """

    def __init__(
        self,
        regularizer: InterpolatedWeightRegularizer
        | Callable[[nn.Module], InterpolatedWeightRegularizer],
        *,
        model: str = "",
    ) -> None:
        super().__init__(model)
        self._make = None if isinstance(regularizer, InterpolatedWeightRegularizer) else regularizer
        self._passes: InterpolatedPasses | None = None
        if isinstance(regularizer, InterpolatedWeightRegularizer):
            self._passes = InterpolatedPasses(regularizer)
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._patched: ExitStack | None = None
        self._interpolating = False
        self._step = 0  # the optimizer step of the last batch
        self._called = False  # regularized_backward(), since the last optimizer step

    @property
    def regularizer(self) -> InterpolatedWeightRegularizer | None:
        """The regulariser, or ``None`` before a function has created it."""
        return None if self._passes is None else self._passes.regularizer

    @property
    def is_interpolating(self) -> bool:
        """Whether the model has interpolated weights now."""
        return self._interpolating

    # --- the run -----------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Create the regulariser, if it is given as a function.

        Args:
            trainer: see ``Callback.setup`` of Lightning.
            pl_module: see ``Callback.setup`` of Lightning.
            stage: see ``Callback.setup`` of Lightning.
        """
        if stage != "fit":
            return
        self.require_once(trainer)
        self._saved = None
        if self._make is not None:
            self._passes = None
            if not overrides(pl_module, "configure_model"):
                self._create(pl_module)
        if self._passes is not None:
            self._passes.forget()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the regulariser, if ``configure_model()`` creates the parameters.

        Args:
            trainer: see ``Callback.on_fit_start`` of Lightning.
            pl_module: see ``Callback.on_fit_start`` of Lightning.
        """
        if self._passes is None:
            self._create(pl_module)

    def _create(self, pl_module: Any) -> None:
        assert self._make is not None
        self._passes = InterpolatedPasses(self._make(self._model(pl_module)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the set-up, and put the second pass before each training step.

        Args:
            trainer: see ``Callback.on_train_start`` of Lightning.
            pl_module: see ``Callback.on_train_start`` of Lightning.
        """
        assert self._passes is not None
        require_whole_weights(trainer.strategy.model, deepspeed=runs_deepspeed(trainer))
        _require_part(self._passes.regularizer.model, pl_module)
        require_trained(self._passes.regularizer.model, trainer.optimizers, "regularised")
        if self._saved is not None:
            self._passes.load_state_dict(self._saved)
            self._saved = None
        self._step, self._called, self._held = trainer.global_step, False, []
        if pl_module.automatic_optimization:
            self._require_repeatable(trainer, pl_module)
            self._patch(trainer, pl_module)
        elif self._passes.regularizer.every > 1 and len(trainer.optimizers) > 1:
            raise UsageError(
                f"every={self._passes.regularizer.every} counts optimizer steps, but the module "
                f"has {len(trainer.optimizers)} optimizers. Use every=1, or one optimizer."
            )

    def _require_repeatable(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            require_one_evaluation(optimizer)
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise UsageError(
                "training_step() takes dataloader_iter, which would give other batches to the pass "
                "at the interpolated weights. Take batch instead, or use manual optimization and "
                "regularized_backward()."
            )

    def _patch(self, trainer: Any, pl_module: Any) -> None:
        """Let the strategy run the second pass first. Its own method stays what computes losses."""
        strategy = trainer.strategy
        training_step = strategy.training_step
        passes = self._passes
        assert passes is not None

        def with_second_pass(*args: Any, **kwargs: Any) -> Any:
            if passes.is_due(trainer.global_step):
                part = (*passes.regularizer.part_of(args[0]), *args[1:])
                self._second_pass(trainer, pl_module, lambda: training_step(*part, **kwargs))
            return training_step(*args, **kwargs)

        self._patched = ExitStack()
        strategy.training_step = with_second_pass
        self._patched.callback(delattr, strategy, "training_step")

    def _second_pass(self, trainer: Any, pl_module: Any, run: Callable[[], Any]) -> None:
        """Hold the gradients of the second loss, until Lightning has cleared the older ones."""
        parameters = list(pl_module.parameters())
        clears = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if clears and not overrides(pl_module, "optimizer_zero_grad"):
            before = []  # Lightning would clear these gradients after the plain forward pass
        else:
            before = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        try:
            with self._interpolated(trainer, pl_module) as weight:
                loss = _loss_of(run())
                if loss is not None:
                    loss = weight * loss / trainer.accumulate_grad_batches
                    trainer.strategy.backward(loss, trainer.optimizers[0])
                    del loss  # its graph must be gone in the plain pass
            self._held = [(p, p.grad) for p in parameters if p.grad is not None]
        finally:
            for parameter in parameters:
                parameter.grad = None
            for parameter, gradient in before:
                parameter.grad = gradient

    @contextmanager
    def _interpolated(self, trainer: Any, pl_module: Any) -> Iterator[float]:
        """Interpolate the weights, without logging. Yield C of Equation 9."""
        assert self._passes is not None
        self._interpolating = True
        try:
            with (
                without_log(pl_module),
                keeping_metrics(pl_module),
                self._passes.interpolated(trainer.global_step, trainer.strategy.model),
            ):
                yield self._passes.regularizer.weight
        finally:
            self._interpolating = False

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Put the gradients of the second loss back. The plain pass adds to them.

        Args:
            trainer: see ``Callback.on_before_backward`` of Lightning.
            pl_module: see ``Callback.on_before_backward`` of Lightning.
            loss: see ``Callback.on_before_backward`` of Lightning.
        """
        held, self._held = self._held, []
        with torch.no_grad():
            for parameter, gradient in held:
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise an error if a manual optimization is not regularised.

        Args:
            trainer: see ``Callback.on_train_batch_end`` of Lightning.
            pl_module: see ``Callback.on_train_batch_end`` of Lightning.
            outputs: see ``Callback.on_train_batch_end`` of Lightning.
            batch: see ``Callback.on_train_batch_end`` of Lightning.
            batch_idx: see ``Callback.on_train_batch_end`` of Lightning.
        """
        self._held = []  # of a training step that returned None
        step, self._step = self._step, trainer.global_step
        if pl_module.automatic_optimization or self._step == step:
            return
        assert self._passes is not None
        if self._passes.is_due(step) and not self._called:
            raise UsageError(
                "An optimizer stepped, but training_step() did not call regularized_backward(). "
                "With manual optimization, call regularized_backward(self, closure) instead of "
                "self.manual_backward(loss)."
            )
        self._called = False

    def _stop(self) -> None:
        if self._patched is not None:
            self._patched.close()
        self._patched, self._held = None, []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the second pass.

        Args:
            trainer: see ``Callback.on_train_end`` of Lightning.
            pl_module: see ``Callback.on_train_end`` of Lightning.
        """
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the regulariser, for a checkpoint."""
        if self._saved is not None:
            return self._saved
        return {} if self._passes is None else self._passes.state_dict()


def regularized_backward(module: Any, closure: Callable[..., Tensor], *batch: Any) -> Tensor:
    """Run both backward passes of Equation 9 in a training step with manual optimization.

    Use this function in place of ``self.manual_backward(loss)``::

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = regularized_backward(self, lambda: self.loss_of(batch))
            optimizer.step()

    The trainer needs an :class:`IWRCallback`. Without it, the gradients are those of the plain
    loss. Inside ``toggled_optimizer()``, only the parameters of this optimizer are interpolated.

    Args:
        module: the ``LightningModule``.
        closure: function that runs the forward pass and returns the loss, a scalar. It is called
            at the interpolated weights first, then at the weights themselves.
        batch: arguments of the closure. With a ``share`` below 1, the closure gets a random part of
            them at the interpolated weights.

    Returns:
        The loss of the weights themselves, detached.

    Raises:
        UsageError: the module uses automatic optimization, in which the callback alone does this.
    """
    if module.automatic_optimization:
        raise UsageError(
            "regularized_backward() is for manual optimization. With automatic optimization, "
            "return the loss from training_step(): IWRCallback adds the second pass. Or set "
            "self.automatic_optimization = False."
        )
    trainer = module.trainer
    callback = next((c for c in trainer.callbacks if isinstance(c, IWRCallback)), None)
    if callback is not None and callback._passes is not None:
        callback._called = True
        if callback._passes.is_due(trainer.global_step):
            part = callback._passes.regularizer.part_of(*batch)
            with callback._interpolated(trainer, module) as weight:
                module.manual_backward(weight * closure(*part))
    loss = closure(*batch)
    module.manual_backward(loss)
    return loss.detach()


def _require_part(model: nn.Module, pl_module: Any) -> None:
    ours = {id(parameter) for parameter in pl_module.parameters()}
    if not any(id(parameter) in ours for parameter in model.parameters()):
        raise UsageError(
            "The regulariser belongs to another model: the LightningModule holds none of its "
            "parameters. Create the regulariser for the module that is trained, or pass a "
            "function to IWRCallback."
        )


def _loss_of(output: Any) -> Tensor | None:
    """Return the loss in the output of a training step. Lightning itself refuses other outputs."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None
