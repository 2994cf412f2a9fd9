"""IWR and weight averages in the ``Trainer`` of Hugging Face's ``transformers``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.extra_state import load_safely
from openvclip.errors import CheckpointError, UsageError
from openvclip.integrations.steps import (
    InterpolatedPasses,
    is_sharded_model,
    load_states,
    require_trained,
    require_whole_weights,
    states_of,
)
from openvclip.weights.batch_part import number_of_clips, part_size
from openvclip.weights.gradients import innermost, require_one_evaluation
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.schedule import Tracker

__all__ = ["STATE_FILE", "RegularizedTrainerMixin"]

STATE_FILE = "openvclip.pt"
"""The file in a checkpoint of the trainer that holds the states of the regulariser and averages."""

if TYPE_CHECKING:
    # What the mixin expects beside it. Any Trainer will do, so nothing is imported from its
    # library before an object is created.
    class _Trainer:
        args: Any
        state: Any
        accelerator: Any
        model: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def add_callback(self, callback: Any) -> None: ...

        def training_step(
            self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
        ) -> Tensor: ...

        def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Trainer = object


class RegularizedTrainerMixin(_Trainer):
    """Add interpolated weight regularisation and weight averages to a ``transformers.Trainer``.

    Put the mixin in front of the trainer, and pass the regulariser and the averages by name. The
    loss, the optimizer, gradient accumulation, clipping, mixed precision and checkpoints stay those
    of the trainer::

        class Trainer(RegularizedTrainerMixin, transformers.Trainer):
            pass

        clip = {name: value.clone() for name, value in model.state_dict().items()}
        swa = openvclip.SWATracker(model, start=1000, every=100)
        trainer = Trainer(
            model=model,
            args=transformers.TrainingArguments("out", max_grad_norm=1.0),
            train_dataset=data,
            regularizer=openvclip.InterpolatedWeightRegularizer(model, anchor=clip),
            averages=[swa],
        )
        trainer.train()
        model.load_state_dict(openvclip.interpolate(clip, swa.averaged_state_dict(), 0.5))

    Each training step adds a pass at the interpolated weights, whose loss is weighted by C
    (Equation 9 of Open-VCLIP). All micro-batches of an optimizer step have the same alpha. The
    ``every`` of the regulariser counts optimizer steps. With a ``share`` below 1, the pass gets a
    random part of the inputs, whose tensors have the samples along their first axis. The logged
    loss is the loss of the weights themselves. The averages are updated after each optimizer step
    that was not skipped.

    Checkpoints of the trainer get one more file, ``openvclip.pt``. A resumed run continues the
    sequence of alphas and the averages. With several processes, the first process writes this file.

    Args:
        args: arguments of the trainer.
        regularizer: the regulariser of the model, created without an optimizer. Default: no
            regularisation.
        averages: trackers of the weights of the model. Default: none.
        kwargs: keyword arguments of the trainer.

    Raises:
        UsageError: the trainer runs under DeepSpeed, whose weights are not whole in a training
            step; or the weights are sharded and the averages would be saved; or the regulariser
            belongs to another model; or the optimizer evaluates the loss several times (LBFGS).
        CheckpointError: a checkpoint to resume from holds no state of this regulariser and these
            averages, or the state can't be written.
    """

    def __init__(
        self,
        *args: Any,
        regularizer: InterpolatedWeightRegularizer | None = None,
        averages: Sequence[Tracker] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer
        self.averages = tuple(averages)
        self._passes = None if regularizer is None else InterpolatedPasses(regularizer)
        require_whole_weights(self.model, deepspeed=getattr(self, "is_deepspeed_enabled", False))
        self.add_callback(_callback_for(self))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Add the gradients of both losses on a batch. Return the loss of the weights themselves.

        Args:
            model: see ``transformers.Trainer.training_step``.
            inputs: see ``transformers.Trainer.training_step``.
            args: further arguments of the trainer.
            kwargs: further keyword arguments of the trainer.
        """
        passes, step = self._passes, self.state.global_step
        if passes is not None and passes.is_due(step):
            part, numbers, by_name = _part_of(passes.regularizer, inputs, args, kwargs)
            with (
                passes.interpolated(step, model),
                _weighted_backward(self.accelerator, passes.regularizer.weight),
            ):
                super().training_step(model, part, *numbers, **by_name)
        return super().training_step(model, inputs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume a run together with its regulariser and its averages.

        Args:
            resume_from_checkpoint: see ``transformers.Trainer.train``.
            args: further arguments of the trainer.
            kwargs: further keyword arguments of the trainer.

        Raises:
            CheckpointError: see the class.
        """
        if self._passes is not None:
            self._passes.forget()
        folder = _checkpoint_folder(resume_from_checkpoint, self.args.output_dir)
        if folder is not None and (self.regularizer is not None or self.averages):
            self._load_states(folder / STATE_FILE)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_states(self, path: Path) -> None:
        with write_errors(path), atomic_path(path) as temporary:
            torch.save(states_of(self.regularizer, self.averages), temporary)

    def _load_states(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file, so the regulariser and the averages can't be resumed. "
                "Resume from a checkpoint that RegularizedTrainerMixin wrote, or train without "
                "regularizer and averages."
            )
        load_states(
            _read(path),
            self.regularizer,
            self.averages,
            self.model,
            source=str(path),
            owner="trainer",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        states: Any = load_safely(path, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} can't be read: {str(error).splitlines()[0]} Resume from an older checkpoint."
        ) from error
    return dict(states)


def _checkpoint_folder(resume_from_checkpoint: Any, output_dir: str | None) -> Path | None:
    """Return the folder that the trainer resumes from, or ``None`` for a new run."""
    if resume_from_checkpoint is True and output_dir is not None:
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(output_dir)
        return None if last is None else Path(last)  # the trainer raises its own error
    if isinstance(resume_from_checkpoint, str | os.PathLike):
        return Path(resume_from_checkpoint)
    return None


def _part_of(
    iwr: InterpolatedWeightRegularizer, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return a random part of the inputs of a training step, and its other arguments.

    The trainer divides the sum of the losses of many models by ``num_items_in_batch``, which
    counts the items of the whole batch. The part has fewer items.
    """
    if iwr.share == 1:
        return inputs, args, kwargs
    clips = number_of_clips((inputs,))
    kept = part_size(iwr.share, clips) / clips
    items, others = args[:1], dict(kwargs)
    if items and items[0] is not None:
        items = (items[0] * kept,)
    if others.get("num_items_in_batch") is not None:
        others["num_items_in_batch"] *= kept
    return iwr.part_of(inputs)[0], (*items, *args[1:]), others


@contextmanager
def _weighted_backward(accelerator: Any, weight: float) -> Iterator[None]:
    """Multiply the loss of a training step by ``weight``, whatever computes the loss.

    Trainers of users override ``compute_loss``, so the loss is weighted in the backward pass.
    """
    backward, calls = accelerator.backward, 0

    def weighted(loss: Tensor, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        backward(weight * loss, **kwargs)

    accelerator.backward = weighted
    try:
        yield
    finally:
        del accelerator.backward
    if calls != 1:
        raise UsageError(
            f"training_step() called accelerator.backward() {calls} times; expected once. A "
            "trainer with its own backward pass needs its own loop: see "
            "InterpolatedWeightRegularizer."
        )


def _callback_for(trainer: RegularizedTrainerMixin) -> Any:
    """Return the callback that updates the averages and saves the states."""
    from transformers import TrainerCallback

    class WeightSpaceCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.regularizer is not None or trainer.averages:
                require_whole_weights(kwargs["model"], deepspeed=False)
            if trainer.regularizer is not None:
                optimizer = innermost(kwargs["optimizer"])
                require_one_evaluation(optimizer)
                require_trained(trainer.regularizer.model, [optimizer], "regularised")
            if (
                trainer.averages
                and args.save_strategy != "no"
                and is_sharded_model(kwargs["model"])
            ):
                raise UsageError(
                    "The weights are sharded, and a checkpoint of the trainer would hold the "
                    "averages of one process only. Give save_strategy='no', and save "
                    "average.state_dict() with torch.distributed.checkpoint."
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not trainer.accelerator.optimizer_step_was_skipped:
                for average in trainer.averages:
                    average.update(kwargs["model"])

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.should_save and (trainer.regularizer is not None or trainer.averages):
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                trainer._save_states(folder / STATE_FILE)

    return WeightSpaceCallback()
