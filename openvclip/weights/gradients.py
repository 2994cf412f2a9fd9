"""Which gradients of an optimizer were used, and what one call of ``step()`` may do with them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from openvclip.errors import LossError, OpenVCLIPError, UsageError
from openvclip.weights.numerics import foreach
from openvclip.weights.regularization_input import require_loss
from openvclip.weights.shards import any_process, clip_gradients, local, versions

_SEVERAL_EVALUATIONS = """\
{name} {why}, so step() can't be used. Write the loop with interpolated(). All evaluations of one \
step of the optimizer need the same alpha:

    alpha = iwr.draw_alpha()
{code}
"""
_CLOSURE = """\
    def closure():
        optimizer.zero_grad()
        with iwr.interpolated(alpha):
            second = compute_loss()
            (iwr.weight * second).backward()
        loss = compute_loss()
        loss.backward()
        return loss.detach() + iwr.weight / (1 - alpha) * second.detach()  # Equation 7

    optimizer.step(closure)"""
_TWO_STEPS = """\
    for step in (optimizer.first_step, optimizer.second_step):
        with iwr.interpolated(alpha):
            (iwr.weight * compute_loss()).backward()
        compute_loss().backward()
        step(zero_grad=True)"""


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and Lightning."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_accumulating(optimizer: Any) -> bool:
    """Return whether accelerate's optimizer skips its step now, between two micro-batches."""
    state = getattr(optimizer, "gradient_state", None)
    return state is not None and not getattr(state, "sync_gradients", True)


class Gradients:
    """The gradients of an optimizer's parameters: used, or still to be used.

    A gradient is used once the optimizer steps. Gradients that are there when this object is
    created count as used.

    Args:
        optimizer: the optimizer, without wrappers.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer: weakref.ref[Any] = weakref.ref(optimizer)
        # By id of the parameter: the gradient, its versions, and whether it was used.
        self._marks: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], bool]] = {}
        self._in_closure = False
        self._steps = 0  # of the optimizer, counted from here on
        self._counts_steps = isinstance(optimizer, Optimizer)
        self.mark(used=True)
        if self._counts_steps:  # a plain step of the loop uses the gradients too
            ours = weakref.ref(self)
            hooks = [
                optimizer.register_step_pre_hook(lambda *call: _before_step(ours, *call)),
                optimizer.register_step_post_hook(lambda *call: _after_step(ours)),
            ]
            for hook in hooks:
                weakref.finalize(self, hook.remove).atexit = False

    def are_of(self, optimizer: Any) -> bool:
        """Return whether these are the gradients of ``optimizer``."""
        return self._optimizer() is optimizer

    def _parameters(self) -> Iterator[nn.Parameter]:
        optimizer = self._optimizer()
        for group in optimizer.param_groups if optimizer is not None else ():
            yield from group["params"]

    def mark(self, *, used: bool) -> None:
        """Mark the present gradients as used, or as gradients that the next step adds to."""
        self._marks = {
            id(p): (weakref.ref(p.grad), versions(p.grad), used)
            for p in self._parameters()
            if p.grad is not None
        }

    def prepare(self, zero_grad: Callable[[], Any]) -> None:
        """Clear used gradients. Keep those that the next step adds to.

        Raises:
            UsageError: there are gradients that would be lost, or the optimizer is in its step.
        """
        if self._in_closure:
            self._in_closure = False
            raise UsageError(
                "step() was called inside the step of the optimizer. step() steps the optimizer "
                "itself: call it outside of optimizer.step(closure). In Lightning, set "
                "self.automatic_optimization = False."
            )
        unknown, keep = [], False
        for parameter in self._parameters():
            grad = parameter.grad
            if grad is None:
                continue
            seen, version, used = self._marks.get(id(parameter), (None, None, True))
            if seen is None or seen() is not grad or version != versions(grad):
                unknown.append(grad)
            else:
                keep |= not used
        if unknown and _any_nonzero(unknown):
            raise UsageError(
                "The parameters have gradients that the optimizer has not used, and step() would "
                "clear them. To accumulate several batches, write the loop with interpolated(), "
                "or use accelerator.accumulate() around step(). To discard the gradients, call "
                "optimizer.zero_grad() before step()."
            )
        self._steps = 0
        if not keep:
            zero_grad()

    def finish(self, *, accumulating: bool, skips: bool) -> None:
        """Mark the gradients at the end of a step.

        Args:
            accumulating: the next step adds to the gradients.
            skips: a scaler may have skipped the step. The gradients then count as used.
        """
        if accumulating:
            self.mark(used=False)
        elif skips or self._steps or not self._counts_steps:
            self.mark(used=True)
        else:
            self._marks = {}  # a wrapper left the step out

    def loss_of(self, closure: Callable[[], Any], modules: list[nn.Module]) -> Tensor:
        """Return the loss of the closure, which must not change the gradients.

        Raises:
            LossError: the closure changed the gradients, or returned no scalar loss with a graph.
        """
        before = [(p.grad, versions(p.grad)) for p in self._parameters() if p.grad is not None]
        loss = closure()
        after = [(p.grad, versions(p.grad)) for p in self._parameters() if p.grad is not None]
        same = len(before) == len(after) and all(
            one is other and version == later
            for (one, version), (other, later) in zip(before, after, strict=True)
        )
        if not same and not _moves_gradients(modules):
            raise LossError(
                "The closure changed the gradients. It must only run the forward pass and return "
                "the loss, a scalar tensor: step() itself calls zero_grad(), backward() and the "
                "optimizer. Remove these calls from the closure."
            )
        return require_loss(loss)

    def require_no_graph(self) -> None:
        """Raise an error if the gradients have a graph, through which an optimizer would go."""
        if any(p.grad is not None and p.grad.requires_grad for p in self._parameters()):
            raise UsageError(
                "The gradients have a graph (create_graph=True), which belongs to the interpolated "
                "weights. step() restores the weights, so no second derivative can be computed. "
                "Use an optimizer that needs first derivatives only."
            )


def _before_step(ours: weakref.ref[Gradients], _: Any, args: Any, options: Any) -> None:
    gradients = ours()
    if gradients is not None:
        gradients._in_closure = any(callable(x) for x in (*args[1:], *options.values()))


def _after_step(ours: weakref.ref[Gradients]) -> None:
    gradients = ours()
    if gradients is not None:
        gradients._in_closure = False
        gradients._steps += 1
        gradients.mark(used=True)


def _any_nonzero(gradients: list[Tensor]) -> bool:
    parts = [local(gradient) for gradient in gradients]
    parts = [part.coalesce().values() if part.is_sparse else part for part in parts]
    norms = foreach._foreach_norm([part for part in parts if part.numel()], float("inf"))
    return any_process([any(bool(norm != 0) for norm in norms)], gradients)[0]


def _moves_gradients(modules: list[nn.Module]) -> bool:
    """Return whether a forward pass may move the gradients to other memory."""
    parts = (part for module in modules for part in module.modules())
    return any(isinstance(p, DistributedDataParallel) and p.gradient_as_bucket_view for p in parts)


def require_one_evaluation(optimizer: Any) -> None:
    """Raise an error if a step of the optimizer needs the gradients of several points.

    Args:
        optimizer: the optimizer, without wrappers.

    Raises:
        UsageError: the optimizer needs a closure (LBFGS), or has two steps (SAM).
    """
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise UsageError(_several_evaluations(optimizer, "has a first_step and a second_step"))
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(_several_evaluations(optimizer, "evaluates a closure in its step"))


def _several_evaluations(optimizer: Any, why: str) -> str:
    """Return the text of an error: what to write for an optimizer that needs a closure."""
    code = _TWO_STEPS if hasattr(optimizer, "first_step") else _CLOSURE
    return _SEVERAL_EVALUATIONS.format(name=type(optimizer).__name__, why=why, code=code)


def apply_gradients(optimizer: Any, scaler: Any, max_grad_norm: float | None) -> None:
    """Clip the gradients and step the optimizer.

    Args:
        optimizer: the optimizer, with or without wrappers.
        scaler: a ``torch.amp.GradScaler`` or ``None``. It is updated.
        max_grad_norm: maximum norm of all gradients together. ``None``: no clipping.
    """
    if max_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        elif getattr(optimizer, "scaler", None) is not None:  # accelerate's, in float16
            optimizer.scaler.unscale_(innermost(optimizer))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip_gradients(parameters, max_grad_norm)
    if scaler is None:
        _step(optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()


def _step(optimizer: Any) -> None:
    try:
        optimizer.step()
    except Exception as error:
        if isinstance(error, OpenVCLIPError) or "closure" not in str(error):
            raise
        inner = innermost(optimizer)
        raise UsageError(_several_evaluations(inner, f"asks for a closure ({error})")) from error
