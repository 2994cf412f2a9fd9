"""Functions for all integrations: passes of IWR, counted steps, saved states, checks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from openvclip.errors import CheckpointError, UsageError
from openvclip.weights.names import live_model
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.schedule import Tracker
from openvclip.weights.shards import full_state, is_sharded, no_sync, sharded_like


class InterpolatedPasses:
    """The passes at the interpolated weights, in a loop that counts its optimizer steps.

    All micro-batches of an optimizer step have the same alpha.

    Args:
        regularizer: the regulariser of the model.
    """

    def __init__(self, regularizer: InterpolatedWeightRegularizer) -> None:
        self.regularizer = regularizer
        self._drawn: tuple[int, float] | None = None  # an optimizer step and its alpha

    def is_due(self, step: int) -> bool:
        """Return whether the optimizer step with this number, from 0 on, is regularised."""
        return self.regularizer.weight > 0 and step % self.regularizer.every == 0

    @contextmanager
    def interpolated(self, step: int, wrapper: nn.Module) -> Iterator[float]:
        """Interpolate the weights in a ``with`` block. Processes do not reduce its gradients.

        Args:
            step: number of the optimizer step.
            wrapper: the module that the loop calls, with the wrapper of the library.

        Yields:
            alpha.
        """
        iwr = self.regularizer
        known = self._drawn[1] if self._drawn is not None and self._drawn[0] == step else None
        before = iwr.wrapper
        iwr.wrapper = wrapper if before is None else before
        try:
            with iwr.interpolated(known) as alpha, no_sync([wrapper]):
                self._drawn = (step, alpha)
                yield alpha
        finally:
            iwr.wrapper = before

    def forget(self) -> None:
        """Forget the alpha of the last step, because another run begins."""
        self._drawn = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the regulariser, and the alpha of the last step."""
        drawn = None if self._drawn is None else list(self._drawn)
        return {"regularizer": self.regularizer.state_dict(), "drawn": drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.regularizer.load_state_dict(state["regularizer"])
        self._drawn = None if state["drawn"] is None else tuple(state["drawn"])


class StepCounter:
    """Counts the steps of optimizers that changed weights.

    A step that a ``GradScaler`` skips is not counted.

    Args:
        optimizers: the optimizers, without wrappers.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._steps = 0
        self._hooks = [o.register_step_post_hook(self._count) for o in optimizers]

    def _count(self, optimizer: Optimizer, *_: object) -> None:
        # Fused optimizers skip a step themselves: a GradScaler tells them so.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self._steps += 1

    def take(self) -> bool:
        """Return whether there were steps since the last call."""
        stepped, self._steps = self._steps > 0, 0
        return stepped

    @property
    def waits(self) -> bool:
        """Whether there were steps since the last call of :meth:`take`."""
        return self._steps > 0

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()


_Regularizer: TypeAlias = InterpolatedWeightRegularizer | InterpolatedPasses | None


def states_of(regularizer: _Regularizer, averages: Sequence[Tracker]) -> dict[str, Any]:
    """Return the states of a regulariser and of averages.

    The tensors of sharded averages are gathered, so every process must call this function.
    """
    return {
        "regularizer": None if regularizer is None else regularizer.state_dict(),
        "averages": [state_of_average(average) for average in averages],
    }


def load_states(
    states: Mapping[str, Any],
    regularizer: _Regularizer,
    averages: Sequence[Tracker],
    averaged: nn.Module,
    *,
    source: str,
    owner: str,
) -> None:
    """Restore states from :func:`states_of`.

    Args:
        states: the states.
        regularizer: the regulariser of the resumed run.
        averages: the averages of the resumed run.
        averaged: the model that is averaged.
        source: the file or object that held the states, for errors.
        owner: the object with the regulariser and the averages, such as ``"trainer"``, for errors.

    Raises:
        CheckpointError: the saved run had another number of averages, or a regulariser where the
            resumed run has none.
    """
    saved = (states["regularizer"] is not None, len(states["averages"]))
    expected = (regularizer is not None, len(averages))
    if saved != expected:
        raise CheckpointError(
            f"{source} holds {_description(*saved)}; the {owner} has {_description(*expected)}. "
            f"Create the {owner} with the same regularizer and averages as in the saved run."
        )
    if regularizer is not None:
        regularizer.load_state_dict(states["regularizer"])
    for average, state in zip(averages, states["averages"], strict=True):
        load_average(average, state, averaged)


def state_of_average(average: Tracker) -> dict[str, Any]:
    """Return the state of a tracker. The tensors of a sharded average are gathered on the CPU.

    Every process must call this function. The checkpoint that the first process writes is then
    whole.
    """
    return {
        key: full_state(value) if isinstance(value, dict) else value
        for key, value in average.state_dict().items()
    }


def load_average(average: Tracker, state: Mapping[str, Any], model: nn.Module) -> None:
    """Restore a state from :func:`state_of_average`.

    Args:
        average: the tracker.
        state: the state. Its tensors are whole.
        model: the model that is averaged. If it is sharded, each process keeps its parts.
    """
    live = live_model(model)[0]
    average.load_state_dict(
        {
            key: {name: _part(entry, live.get(name)) for name, entry in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in state.items()
        }
    )


def _part(entry: Any, like: Tensor | None) -> Any:
    return sharded_like(entry, like) if isinstance(entry, Tensor) and like is not None else entry


def _description(has_regularizer: bool, n_averages: int) -> str:
    averages = f"{n_averages} average{'' if n_averages == 1 else 's'}"
    return f"{'a' if has_regularizer else 'no'} regulariser and {averages}"


def require_whole_weights(model: nn.Module, *, deepspeed: bool) -> None:
    """Raise a :class:`UsageError` if a training step has flattened or partitioned parameters.

    Args:
        model: the model with the wrapper of the library.
        deepspeed: whether the loop runs under DeepSpeed.
    """
    if deepspeed:
        raise UsageError(
            "The training runs under DeepSpeed, which does not keep whole weights in a training "
            "step. Train without DeepSpeed, for example with DistributedDataParallel."
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(part, fsdp.FullyShardedDataParallel) for part in model.modules()
    ):
        raise UsageError(
            "FullyShardedDataParallel (FSDP1) joins the parameters of the model to flat tensors, "
            "which can't be interpolated by name. Use fully_shard (FSDP2): "
            "ModelParallelStrategy in Lightning, fsdp_version=2 in accelerate."
        )


def is_sharded_model(model: nn.Module) -> bool:
    """Return whether a process holds only a part of a parameter."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def require_trained(model: nn.Module, optimizers: Iterable[Optimizer], what: str) -> None:
    """Raise a :class:`UsageError` if no optimizer holds a trained parameter of the model.

    Args:
        model: the model that is regularised or averaged.
        optimizers: the optimizers of the loop.
        what: what is done with the model, for the error.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    optimized = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not trained & optimized:
        raise UsageError(
            f"The optimizers hold none of the trained parameters of the model that is {what}. "
            "Pass the model that this loop trains, and set requires_grad before the training."
        )
