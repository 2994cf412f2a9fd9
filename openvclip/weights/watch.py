"""Notices weights that change where they must not change, for example in a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, listed
from openvclip.weights.averageable import is_same
from openvclip.weights.memory import is_one_view
from openvclip.weights.numerics import bits_of, lerp_
from openvclip.weights.shards import local, versions

_ELEMENTS = 16  # of a parameter
_PARAMETERS = 128  # whose elements are compared

_Kind: TypeAlias = tuple[torch.device, torch.dtype]


class WeightWatch:
    """Notices changes of parameters from its creation to the call of :meth:`look`.

    Two signs are looked at. The first is the version counter of each parameter, which PyTorch
    increases at operations in place. Fused optimizers and writes through ``.data`` do not increase
    this counter. The second sign is therefore the value of some elements: the first 16 of at most
    128 parameters. An optimizer that changes all weights is noticed by one of both. A write through
    ``.data`` to other elements is not noticed.

    On a GPU the elements are compared without waiting for the GPU. :meth:`look` then knows the
    version counters alone, and :meth:`late` gives the result later.

    Args:
        parameters: the parameters by name, plain or sharded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._before = {name: _signs(p) for name, p in self._parameters.items()}
        every = -(-len(self._parameters) // _PARAMETERS)
        self._sampled = list(self._parameters)[:: max(1, every)]
        self._elements = self._sample()
        self._flags: list[_Flag] = []

    def look(
        self,
        now: Mapping[str, nn.Parameter],
        kept: Mapping[str, tuple[Tensor, Tensor]],
        alpha: float,
    ) -> list[str]:
        """Return the names of parameters that changed, and stop watching.

        A parameter that was written but has the expected values did not change. Clamping a scale,
        or a context such as ``swa.applied()``, can write such values. A parameter in other memory
        is a change with any values, because the block restores the old memory alone.

        Args:
            now: the parameters that the model holds now, by name.
            kept: the weights and the anchor whose interpolation is expected, by name.
            alpha: weight of the anchor.
        """
        watched = self._parameters
        written = [
            name
            for name, parameter in watched.items()
            if now.get(name) is not parameter or _signs(parameter) != self._before[name]
        ]

        def changed(names: Iterable[str]) -> list[str]:
            return [
                name
                for name in names
                if not _is_restored(now.get(name), watched[name])
                or not _is_expected(now[name], kept.get(name), alpha)
            ]

        result = changed(written)
        # A clamped scale must not hide an optimizer whose writes PyTorch does not record.
        if not result and all(_signs(watched[n])[2:] == self._before[n][2:] for n in written):
            self._flags = [
                _Flag((bits_of(value) != bits_of(self._elements[kind])).any())
                for kind, value in self._sample().items()
            ]
            if not self.is_late and self.late():
                result = changed(watched)
        self._elements, self._parameters = {}, {}
        return result

    @property
    def is_late(self) -> bool:
        """Whether a GPU compares elements, so that :meth:`late` gives the result."""
        return any(flag.event is not None for flag in self._flags)

    def late(self) -> bool:
        """Return whether elements changed. Wait for the GPU if it has not compared them yet."""
        return True in [flag.read() for flag in self._flags]

    def _sample(self) -> dict[_Kind, Tensor]:
        return _elements(self._parameters[name] for name in self._sampled)


def changed_weights(names: Sequence[str]) -> UsageError:
    """Return the error for weights that changed inside ``interpolated()``.

    Args:
        names: names of the parameters; empty if they are not known.
    """
    which = f" ({len(names)} parameters: {listed(names)})" if names else ""
    return UsageError(
        f"The weights changed inside interpolated(){which}. The block restores the weights, so "
        "such a change is lost. Run only the forward and the backward pass inside the block, and "
        "step the optimizer after the block. An optimizer that steps in the backward pass can't be "
        "used with this regulariser: remove its hooks. The weights are those from before the "
        "block, but the state of such an optimizer has changed."
    )


class _Flag:
    """A boolean on any device, copied to the CPU without waiting if the device is a GPU."""

    def __init__(self, flag: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self._value = flag
        if flag.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self._value)


def _signs(parameter: nn.Parameter) -> tuple[object, ...]:
    return (*versions(parameter), parameter.dtype, parameter.device, parameter.shape)


@torch.no_grad()
def _elements(parameters: Iterable[nn.Parameter]) -> dict[_Kind, Tensor]:
    """Return the first elements of the parameters, joined for each device and dtype."""
    parts: dict[_Kind, list[Tensor]] = {}
    for parameter in parameters:
        part = local(parameter)
        number = min(_ELEMENTS, part.numel())
        first = (
            part.as_strided((number,), (1,)) if part.is_contiguous() else part.flatten()[:number]
        )
        parts.setdefault((part.device, part.dtype), []).append(first)
    return {kind: torch.cat(some) for kind, some in parts.items()}


def _is_restored(parameter: nn.Parameter | None, watched: nn.Parameter) -> bool:
    """Return whether a write to the watched parameter also restores the present one."""
    if parameter is None:
        return False
    return parameter is watched or is_one_view(parameter, watched)


def _is_expected(parameter: nn.Parameter, kept: tuple[Tensor, Tensor] | None, alpha: float) -> bool:
    if kept is None:
        return False
    weights, anchor = kept
    part = local(parameter)
    if (weights.shape, weights.dtype) != (part.shape, part.dtype):
        return False
    expected = weights.to(part.device, copy=True)
    lerp_([expected], [anchor], alpha)
    return is_same(expected, part)
