"""The weights at which a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.evaluation.frozen import require_live_weights
from openvclip.models.text_weights import TextSource, require_text_source, same_text
from openvclip.weights.averageable import require_own_memory
from openvclip.weights.interpolation import as_number, interpolate_into
from openvclip.weights.names import canonical_model, named_state
from openvclip.weights.numerics import overwriting
from openvclip.weights.relative import FineTuned, RelativeWeights, resolved
from openvclip.weights.shards import local


@dataclass(frozen=True, eq=False)
class Mixture:
    """The weights at which a model is evaluated.

    ``Mixture()`` evaluates a model with its own weights. ``Mixture(tuned, lams)`` evaluates the
    model at ``interpolate(original, tuned, lam)`` for each ``lam``, where ``original`` is the state
    dict of the model.

    Attributes:
        tuned: state dict of the fine-tuned model, or the :class:`openvclip.weights.Adapter` of a
            LoRA fine-tune of the model, or ``None``.
        lams: interpolation weights of the original CLIP. 0 is the fine-tuned model. Default:
            ``(0.0,)`` with ``tuned``, ``()`` without ``tuned``.
        text: the weights that encode the class names. ``"own"``: those of each interpolation.
            ``"original"``: those of the original CLIP at every ``lam``. Default: ``"own"``.

    Raises:
        UsageError: ``lams`` is given without ``tuned``, or ``text`` is unknown.
        LambdaError: a weight is not a finite number.
    """

    tuned: FineTuned | None = None
    lams: Sequence[float] = ()
    text: TextSource = "own"

    def __post_init__(self) -> None:
        require_text_source(self.text)
        if self.tuned is None and len(self.lams):
            raise UsageError(
                f"lams={list(self.lams)} without tuned; expected tuned, the state dict of the "
                "fine-tuned model."
            )
        default = () if self.tuned is None else (0.0,)
        lams = tuple(as_number(lam, "lam") for lam in self.lams)
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
                weights; or ``tuned`` shares the memory of the model.
        """
        if self.tuned is None:
            yield [lambda: None]
            return
        require_live_weights(model)
        given, live = self.tuned, named_state(model)
        if not isinstance(given, RelativeWeights):
            states = canonical_model(given, "tuned", like=live)[0]
            require_own_memory(live, states, "model and tuned")
        original = {name: torch.empty_like(value) for name, value in live.items()}

        def setter(lam: float) -> Callable[[], None]:
            return lambda: interpolate_into(model, original, tuned, lam)

        with overwriting(list(live.values()), [local(value) for value in original.values()]):
            # The changed entries of an adapter are merged once, and not at each lambda.
            tuned = dict(resolved(given, original))
            setters = [setter(lam) for lam in self.lams]
            if len(setters) == 1:
                setters[0]()  # once for the whole run, not once for each batch
                setters = [lambda: None]
            yield setters

    def tuned_state(self, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Return the state dict of the fine-tuned model, or ``None`` for ``Mixture()``.

        Args:
            model: a model with the weights of the original CLIP.
        """
        return None if self.tuned is None else resolved(self.tuned, named_state(model))

    def text_features(self, model: nn.Module, encode: Callable[[], Tensor]) -> list[Tensor]:
        """Return the text features at each ``lam``, or one set of features for ``Mixture()``.

        The class names are encoded once if both ends have the same text weights, or if ``text`` is
        ``"original"``. On exit the model has its original weights, bitwise.

        Args:
            model: a model with the weights of the original CLIP.
            encode: returns the text features ``[K, D]`` at the present weights of ``model``.
        """
        live = named_state(model)
        if (
            self.tuned is None
            or self.text == "original"
            or same_text(live, canonical_model(resolved(self.tuned, live), "tuned", like=live)[0])
        ):
            return [encode()] * max(1, len(self.lams))
        features = []
        with self.setters(model) as setters:
            for set_weights in setters:
                set_weights()
                features.append(encode())
        return features
