"""What programs need to know of a merge method to call it by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import MergeError, UsageError, did_you_mean, listed
from openvclip.weights.relative import FineTuned

__all__ = ["Method", "Option"]


@dataclass(frozen=True)
class Option:
    """A setting of a merge method.

    Attributes:
        name: the keyword of the function.
        help: what it is, and its range.
        type: ``float``, ``int`` or ``str``.
        default: the value if the setting is not given. ``None`` with ``required=False`` means that
            the function decides.
        required: whether the setting must be given.
        choices: the allowed texts, for ``str``.
        example: a value for examples and tests. Default: ``default``.
    """

    name: str
    help: str
    type: type[float] | type[int] | type[str] = float
    default: float | int | str | None = None
    required: bool = False
    choices: tuple[str, ...] = ()
    example: float | int | str | None = None


@dataclass(frozen=True)
class Method:
    """A merge method that can be called by its name.

    Attributes:
        name: the name.
        summary: what the method does, in one line.
        paper: where it is published, in one line.
        function: the function on state dicts.
        least: smallest number of models beside the original model.
        most: largest number of models, or ``None`` for any number. With 1, the function takes one
            model in place of a list.
        base: whether the function takes the original model as its first argument.
        options: the settings of the function, beside ``dtype``.
        names: the setting that can hold the names of all entries of a model, or ``""``. A merge of
            files, which works entry by entry, passes the names.
        unused: pairs of an option and of an option with its value that makes the first one useless,
            such as ``{"threshold": ("rule", "freevariance")}``.
    """

    name: str
    summary: str
    paper: str
    function: Callable[..., Mapping[str, Tensor]]
    least: int = 1
    most: int | None = None
    base: bool = True
    options: tuple[Option, ...] = ()
    names: str = ""
    unused: Mapping[str, tuple[str, str]] | None = None

    @property
    def inputs(self) -> str:
        """What is merged, such as ``"CLIP and 2 or more models"``."""
        models = "1 model" if self.most == 1 else f"{self.least} or more models"
        return f"CLIP and {models}" if self.base else models

    def require_count(self, count: int) -> None:
        """Check the number of models beside the original model.

        Args:
            count: the number of models.

        Raises:
            MergeError: there are too few or too many models.
        """
        if count < self.least or (self.most is not None and count > self.most):
            expected = f"{self.least}" + ("" if self.most == self.least else " or more")
            beside = " beside the original CLIP" if self.base else ""
            raise MergeError(
                f"{self.name} merges {expected} model{'s' * (expected != '1')}{beside}, got "
                f"{count}. `openvclip merge --list` shows what each method merges."
            )

    def run(
        self,
        base: Mapping[str, Tensor] | None,
        models: Sequence[FineTuned],
        *,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Mapping[str, Tensor]:
        """Merge state dicts with this method.

        Args:
            base: state dict of the original model; ``None`` for a method without one.
            models: state dicts of the other models.
            dtype: dtype of the floating-point entries of the result.
            **settings: settings of the method; see ``options``.

        Returns:
            The merged state dict.

        Raises:
            MergeError: the number of models or a setting is out of range.
            UsageError: a setting is unknown or missing, or ``base`` is missing or has no use.
            StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
        """
        self.require_count(len(models))
        known = {option.name: option for option in self.options}
        for name in settings:
            if name not in known:
                raise UsageError(
                    f"{self.name} has no setting {name!r}{did_you_mean(name, known)}. "
                    f"Its settings: {listed(list(known), 10) or 'none'}."
                )
        missing = [o.name for o in self.options if o.required and o.name not in settings]
        if missing:
            raise UsageError(f"{self.name} needs the setting {missing[0]!r}.")
        if self.base != (base is not None):
            raise UsageError(
                f"{self.name} merges {self.inputs}: "
                + ("pass the original model as base." if self.base else "leave base out.")
            )
        merged = models[0] if self.most == 1 else list(models)
        first = (base,) if self.base else ()
        return self.function(*first, merged, dtype=dtype, **settings)

    def example(self) -> dict[str, Any]:
        """Return the settings that must be given, with the values of their examples."""
        return {
            option.name: option.example
            for option in self.options
            if option.example is not None or option.required
        }


SCALE = Option("scale", "factor of the merged change", default=1.0)
