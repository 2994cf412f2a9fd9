"""Interpolated weight regularisation: Equations 7-9 and Algorithm 1 of Open-VCLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openvclip.errors import LossError, RegularizationError, StateMismatchError, UsageError
from openvclip.weights.anchor import fingerprint, kept, room_for, take_anchor, trained_parameters
from openvclip.weights.names import listed
from openvclip.weights.numerics import lerp_, overwriting
from openvclip.weights.shards import (
    backend_device,
    local,
    no_sync,
    process_groups,
    require_agreement,
    reshard,
)


class InterpolatedWeightRegularizer:
    r"""Train weights that stay good when they are interpolated with the original ones.

    Equation 7 adds to the loss of the weights :math:`\theta` the loss of weights between them and
    the original CLIP's, with the same batch:

    .. math:: L(\theta) + \beta L(\tilde\theta), \qquad
              \tilde\theta = \alpha\theta_{CLIP} + (1-\alpha)\theta, \qquad
              \alpha \sim U(\text{interval}), \qquad \beta = \frac{C}{1-\alpha}

    With that :math:`\beta` the gradient is :math:`g(\theta) + C\,g(\tilde\theta)` (Equation 9),
    where :math:`g` is the gradient of the plain loss at each point. So one step is two passes,
    one of them with the interpolated weights in place, and one optimizer step::

        iwr = InterpolatedWeightRegularizer(model, optimizer)  # CLIP: the weights as they are
        for video, label in loader:
            loss = iwr.step(lambda: criterion(classifier(video), label))

    Loops that own their backward pass (gradient accumulation, clipping, several losses) use
    :meth:`interpolated`, with ``iwr.weight`` as the factor of the second loss::

        optimizer.zero_grad()
        with iwr.interpolated():
            for video, label in micro_batches:
                (iwr.weight * criterion(classifier(video), label)).backward()
        for video, label in micro_batches:
            criterion(classifier(video), label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    Only parameters that require gradients are moved, and they are back bitwise after each step
    and after any exception. alpha comes from a generator of the regulariser's own, so it neither
    disturbs nor depends on the global random state.

    Several processes that train one model draw the same alphas, since each makes its regulariser
    with the same seed; the first step or block compares generators, settings and anchors, and
    raises where they differ. Under ``DistributedDataParallel`` :meth:`step` reduces the gradients
    of both passes at once. Under ``fully_shard`` (FSDP2) anchor and stash are the shards, and the
    gradients are reduced after each pass: to add them up before would take the memory of a whole
    model's gradients.

    Args:
        model: the model that is trained; wrappers may be around it.
        optimizer: the optimizer that :meth:`step` drives. Not needed for :meth:`interpolated`.
        wrapper: what the closure calls, where ``DistributedDataParallel`` or ``fully_shard`` was
            applied to that and not to ``model``, for example to a classifier around the model.
        anchor: the original weights by name, usually CLIP's state dict; ``None`` takes a snapshot
            of the trained parameters as they are now. Tensors on the right device that the model
            does not itself use are kept as they are, not copied: don't change them. For a model
            that is sharded they may be whole or sharded.
        anchor_device: where the anchor and the copy of the weights during :meth:`interpolated`
            are kept; ``None`` is the parameters' device. ``"cpu"`` is for a model that hardly
            fits on its GPU: the copies go through page-locked memory, one tensor of the anchor
            at a time is on the GPU, and the numbers are the same.
        interval: ``(low, high)`` of alpha, the weight of the *anchor*, within [0, 1]. The paper
            uses (0.0, 0.6). Equal ends fix alpha.
        weight: C of Equation 9, at least 0; the paper uses 0.5.
        every: add the interpolated pass at every ``every``-th call of :meth:`step`, beginning
            with the first; the others are plain steps. C stays as it is.
        seed: seed of the generator of alpha.
        missing: what to do with trained parameters that the anchor lacks: ``"error"``, or
            ``"skip"`` to train them without regularisation.

    Raises:
        RegularizationError: an argument is outside its range.
        UsageError: nothing requires gradients, or the optimizer is another model's.
        StateMismatchError: the anchor lacks trained parameters, has names that the model does not
            know, or has other shapes.

    Memory: the anchor and, during the interpolated pass, one copy of the trained parameters; of a
    sharded model, of the shards. :meth:`step` does that pass first, so that the copy is gone when
    the other pass has the first one's gradients to hold; do the same in loops of your own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        wrapper: nn.Module | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        anchor_device: torch.device | str | None = None,
        interval: tuple[float, float] = (0.0, 0.6),
        weight: float = 0.5,
        every: int = 1,
        seed: int = 0,
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        _require_settings(interval, weight, every, missing)
        self.model = model
        self.optimizer = optimizer
        self.wrapper = wrapper
        self.anchor_device = _full_device(anchor_device)
        self.interval = (float(interval[0]), float(interval[1]))
        self.weight = float(weight)
        self.every = every
        self._steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._inside = False
        self._agreed = False
        self._anchor = take_anchor(model, anchor, missing, self.anchor_device)
        self._fingerprint = fingerprint(self._anchor, model)
        self._unanchored = trained_parameters(model).keys() - self._anchor.keys()
        self._stash: dict[str, Tensor] = {}
        if optimizer is not None:
            _require_own_optimizer(model, optimizer)

    def step(
        self,
        closure: Callable[[], Tensor],
        *,
        scaler: Any = None,
        max_grad_norm: float | None = None,
        backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> Tensor:
        """Do one training step: gradients of both losses, then the optimizer's step.

        Args:
            closure: runs the forward pass and returns the loss, a scalar. It must not call
                ``backward``. It is called twice, with the interpolated weights first, or once
                where ``every`` leaves these out.
            scaler: a ``torch.amp.GradScaler``. Both losses are scaled, and the scaler drives the
                step and is updated, so a step with infinite gradients is skipped as usual.
            max_grad_norm: clip the norm of the combined gradient of all the optimizer's
                parameters to this; the paper's recipe has 1.0.
            backward: runs the backward pass of a loss, for frameworks that have a function of
                their own for it, as ``accelerator.backward``.

        Returns:
            The loss at the weights themselves, detached.

        Raises:
            LossError: the closure returned something other than a scalar with a graph.
            UsageError: there is no optimizer, or the call came within :meth:`interpolated`.
        """
        if self.optimizer is None:
            raise UsageError(
                "step() needs an optimizer: InterpolatedWeightRegularizer(model, optimizer). "
                "Loops of their own use `with iwr.interpolated():` and need none."
            )
        if self._inside:
            raise UsageError("step() was called within interpolated(); leave the block first.")
        self._require_agreement()
        regularize = self.weight > 0 and self._steps % self.every == 0
        self.optimizer.zero_grad(set_to_none=True)
        if regularize:
            # The second backward pass reduces the sum of both over the processes.
            with self.interpolated(), no_sync(self._modules()):
                backward(_scaled(self.weight * _require_loss(closure()), scaler))
        loss = _require_loss(closure())
        backward(_scaled(loss, scaler))
        self._optimizer_step(scaler, max_grad_norm)
        self._steps += 1
        return loss.detach()

    def _modules(self) -> list[nn.Module]:
        return [self.model] if self.wrapper is None else [self.model, self.wrapper]

    def _reshard(self) -> None:
        for module in self._modules():
            reshard(module)

    def _optimizer_step(self, scaler: Any, max_grad_norm: float | None) -> None:
        optimizer = cast(Optimizer, self.optimizer)
        if max_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    @contextmanager
    def interpolated(self) -> Iterator[float]:
        """Within the block the weights are ``alpha * anchor + (1 - alpha) * weights``.

        Forward *and* backward of the second loss belong inside. Afterwards the weights are back
        bitwise, also after an exception; gradients collected inside stay.

        Yields:
            alpha, freshly drawn from the interval.

        Raises:
            UsageError: the blocks are nested, a parameter began to require gradients or was
                sharded after the regulariser was made, or the processes that train the model
                would not draw the same alphas.
        """
        if self._inside:
            raise UsageError("interpolated() can't be nested; leave the first block before.")
        self._reshard()
        live = self._moved()
        self._require_agreement()
        alpha = self._draw()
        self._inside = True
        try:
            with overwriting(list(live.values()), self._stash_for(live)):
                lerp_(list(live.values()), [self._anchor[name] for name in live], alpha)
                yield alpha
        finally:
            self._inside = False
            self._reshard()  # or gathered copies of the interpolated weights stay in use

    def _moved(self) -> dict[str, Tensor]:
        """The live weights that move, detached, with their anchors where they belong."""
        trained = trained_parameters(self.model)
        unknown = [n for n in trained if n not in self._anchor and n not in self._unanchored]
        if unknown:
            raise UsageError(
                f"{len(unknown)} parameters require gradients that did not when the regulariser "
                f"was made ({listed(unknown)}). Make it after the last change of requires_grad, "
                "with the original weights as anchor."
            )
        live = {name: local(p) for name, p in trained.items() if name in self._anchor}
        for name, tensor in live.items():  # a model that was moved to another device since
            if self._anchor[name].shape != tensor.shape:
                raise UsageError(
                    f"This process holds {name} as {list(tensor.shape)}, and its anchor as "
                    f"{list(self._anchor[name].shape)}. Make the regulariser after fully_shard()."
                )
            self._anchor[name] = kept(self._anchor[name], self.anchor_device, tensor, copy=False)
        return live

    def _stash_for(self, live: dict[str, Tensor]) -> list[Tensor] | None:
        """Where to keep the weights on ``anchor_device``; new memory beside them otherwise.

        Page-locked memory is slow to get, so that is held; beside the weights it would be in the
        way of what follows the block.
        """
        if self.anchor_device is None:
            return None
        for name, tensor in live.items():
            held = self._stash.get(name)
            if held is None or held.dtype != tensor.dtype:
                self._stash[name] = room_for(tensor, self.anchor_device)
        return [self._stash[name] for name in live]

    def _require_agreement(self) -> None:
        """Compare what decides alpha, once: in the first step or block, and again after loading."""
        groups = [] if self._agreed else process_groups(self._modules())
        if groups:
            facts = {
                "alpha's generator": self._generator.get_state().numpy().tobytes(),
                "settings": repr((self.interval, self.weight, self.every, self._steps)).encode(),
                "the anchor": self._fingerprint.encode(),
            }
            require_agreement(
                groups,
                facts,
                backend_device(self.model.parameters()),
                "Make the regulariser with the same seed, settings and anchor in each of them, "
                "load its state in all or none, and enter its blocks equally often.",
            )
        self._agreed = True

    def _draw(self) -> float:
        low, high = self.interval
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return low + (high - low) * uniform

    def state_dict(self) -> dict[str, Any]:
        """The settings, the number of steps and the state of alpha's generator.

        The anchor is not in it (it is a file that the user has, the original CLIP); a fingerprint
        of it is, so that :meth:`load_state_dict` refuses to go on with another one.
        """
        return {
            "interval": self.interval,
            "weight": self.weight,
            "every": self.every,
            "steps": self._steps,
            "generator": self._generator.get_state(),
            "anchor_fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the same sequence of alphas.

        Raises:
            StateMismatchError: an entry is missing, or the anchor is not the saved run's.
        """
        wanted = self.state_dict()
        if state.keys() != wanted.keys():
            raise StateMismatchError(
                "This is not the state of an InterpolatedWeightRegularizer.",
                missing=wanted.keys() - state.keys(),
                unexpected=state.keys() - wanted.keys(),
            )
        if state["anchor_fingerprint"] != wanted["anchor_fingerprint"]:
            raise StateMismatchError(
                "The anchor is not the one of the run that was saved. Make the regulariser with "
                "anchor=<the original CLIP's state dict>, or before the fine-tuned weights are "
                "loaded into the model; the same parameters must require gradients."
            )
        low, high = state["interval"]
        self.interval, self.weight = (float(low), float(high)), float(state["weight"])
        self.every, self._steps = int(state["every"]), int(state["steps"])
        self._generator.set_state(state["generator"].cpu())
        self._agreed = False


def _require_settings(
    interval: tuple[float, float], weight: float, every: int, missing: str
) -> None:
    if not _is_interval(interval):
        raise RegularizationError(
            f"interval={interval!r}: expected (low, high) with 0 <= low <= high <= 1. alpha is the "
            "weight of the anchor (the original CLIP); the paper uses (0.0, 0.6)."
        )
    if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0.0):
        raise RegularizationError(f"weight={weight!r}: expected C of Equation 9, a number >= 0.")
    if not (isinstance(every, int) and every >= 1):
        raise RegularizationError(f"every={every!r}: expected a whole number of steps >= 1.")
    if missing not in ("error", "skip"):
        raise RegularizationError(f"missing={missing!r}: expected 'error' or 'skip'.")


def _is_interval(interval: Any) -> bool:
    try:
        low, high = interval
        return 0.0 <= float(low) <= float(high) <= 1.0
    except (TypeError, ValueError):
        return False


def _full_device(device: torch.device | str | None) -> torch.device | None:
    return None if device is None else torch.empty(0, device=device).device  # with its number


def _require_own_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    trained = {id(p) for p in trained_parameters(model).values()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not trained & held:
        raise UsageError(
            "The optimizer holds none of the model's trained parameters; was it made for another "
            "model, or before the model was copied or moved?"
        )


def _require_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(
            f"The closure returned {type(loss).__name__}; expected the loss, a scalar tensor. It "
            "should run the forward pass and return the loss without calling backward()."
        )
    if loss.numel() != 1:
        raise LossError(
            f"The closure returned a tensor of shape {list(loss.shape)}; expected a scalar loss. "
            "Reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise LossError(
            "The loss has no graph: nothing in it requires gradients. Compute it from the model's "
            "output with gradients enabled (no torch.no_grad(), no .detach(), no .item())."
        )
    return loss


def _scaled(loss: Tensor, scaler: Any) -> Tensor:
    scaled: Tensor = loss if scaler is None else scaler.scale(loss)
    return scaled
