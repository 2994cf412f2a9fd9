"""The weights at which a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.evaluation.frozen import require_live_weights
from openvclip.weights.interpolation import interpolate_into
from openvclip.weights.names import named_state
from openvclip.weights.numerics import overwriting
from openvclip.weights.shards import local


@dataclass(frozen=True, eq=False)
class Mixture:
    """The weights at which a model is evaluated.

    ``Mixture()`` evaluates a model with its own weights. ``Mixture(tuned, lams)`` evaluates the
    model at ``interpolate(original, tuned, lam)`` for each ``lam``, where ``original`` is the state
    dict of the model.

    Attributes:
        tuned: state dict of the fine-tuned model, or ``None``.
        lams: interpolation weights of the original CLIP. 0 is the fine-tuned model. Default:
            ``(0.0,)`` with ``tuned``, ``()`` without ``tuned``.

    Raises:
        UsageError: ``lams`` is given without ``tuned``.
    """

    tuned: Mapping[str, Tensor] | None = None
    lams: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.tuned is None and len(self.lams):
            raise UsageError(
                f"lams={list(self.lams)} without tuned; expected tuned, the state dict of the "
                "fine-tuned model."
            )
        default = () if self.tuned is None else (0.0,)
        lams = tuple(float(lam) for lam in self.lams)
        object.__setattr__(self, "lams", lams or default)

    @contextmanager
    def setters(self, model: nn.Module) -> Iterator[list[Callable[[], None]]]:
        """Context manager that returns one function for each ``lam``.

        A call of a function sets the weights of ``model`` to the interpolation at this ``lam``.
        ``Mixture()`` has one function, which does nothing. On exit the model has its original
        weights, bitwise.

        Args:
            model: a model with the weights of the original CLIP.

        Raises:
            UsageError: the model is compiled with Inductor's ``freezing=True``, which keeps the old
                weights.
        """
        if self.tuned is None:
            yield [lambda: None]
            return
        require_live_weights(model)
        tuned, live = self.tuned, named_state(model)
        original = {name: torch.empty_like(value) for name, value in live.items()}

        def setter(lam: float) -> Callable[[], None]:
            return lambda: interpolate_into(model, original, tuned, lam)

        with overwriting(list(live.values()), [local(value) for value in original.values()]):
            setters = [setter(lam) for lam in self.lams]
            if len(setters) == 1:
                setters[0]()  # once for the whole run, not once for each batch
                setters = [lambda: None]
            yield setters
