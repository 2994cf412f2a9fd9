"""Models that enter an average: whole or not at all, and on a CPU in pieces that fit the cache.

Weights whose dtype is not that of the average have to be converted. A float32 copy of whole weights
would be written to memory and read again. On a CPU, a piece is therefore converted, checked for NaN
and added while it is in the cache. Weights in the dtype of the average need no copy: the check
for NaN reads them first, and they enter in one call of PyTorch.

A group of pieces enters in one call of PyTorch, which also sets the group's mark. An error or
Ctrl-C between two calls leaves the marks, so the move can go on where it stopped, or can be taken
back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openvclip.weights.numerics import copy_all, finite_probe, foreach, has_kernels

_PIECE = 2**17  # values for each thread: a float32 copy of them fits in the cache of a core
_GROUP = 2**24  # values of tensors on a GPU that are converted together
_ATTEMPTS = 8


class Blend(NamedTuple):
    """What becomes of an average if a model enters.

    Attributes:
        kind: ``"add"`` (``average + weight * model``), ``"lerp"`` (``average + weight * (model -
            average)``), ``"copy"`` (``model``) or ``"scale"`` (``weight * average``).
        weight: weight of the model.
    """

    kind: str
    weight: float = 1.0

    @property
    def can_be_taken_back(self) -> bool:
        """Whether the old average follows from the new one, except for rounding."""
        return self.kind == "add" or (self.kind == "lerp" and self.weight < 1.0)

    def apply(self, averages: list[Tensor], models: list[Tensor]) -> None:
        """Let models enter averages, in one call of PyTorch."""
        if self.kind == "add":
            foreach._foreach_add_(averages, models, alpha=self.weight)
        elif self.kind == "lerp":
            foreach._foreach_lerp_(averages, models, self.weight)
        elif self.kind == "copy":
            foreach._foreach_copy_(averages, models)
        else:
            foreach._foreach_mul_(averages, self.weight)

    def take_back(self, averages: list[Tensor], models: list[Tensor]) -> None:
        """Remove models that entered."""
        weight = -self.weight if self.kind == "add" else -self.weight / (1.0 - self.weight)
        self._replace(weight=weight).apply(averages, models)


ADD = Blend("add")
COPY = Blend("copy")


class _Group(NamedTuple):
    """Pieces that enter together. Staged pieces are converted or joined before they enter."""

    averages: list[Tensor]
    models: list[Tensor]
    is_staged: bool


class Move:
    """One model on its way into an average. All methods can be called again after an error.

    Args:
        averages: the tensors that change, plain tensors of at least float32.
        models: the tensors that enter, of the same shapes and on the same devices.
        blend: what becomes of the averages.
        look: whether to look for NaN and infinity before each group enters. Groups before it can
            be in at this time. Only on the CPU.
    """

    def __init__(
        self, averages: list[Tensor], models: list[Tensor], blend: Blend, *, look: bool
    ) -> None:
        on_cpu = all(value.device.type == "cpu" for value in (*averages, *models))
        pairs = [(a, m) for a, m in zip(averages, models, strict=True) if a.numel()]
        self.looks = look and on_cpu  # a stage on a GPU has padding without values
        self._blend, self._align = blend, 1 if on_cpu else 64
        self._groups = list(_groups(pairs, on_cpu, self.looks))
        self._stages = self._new_stages()
        # Marks have the dtype and device of the averages, so that a GPU can use its fast kernels.
        first = averages[0] if averages else torch.empty(0)
        dtype = first.dtype if has_kernels(first.dtype) else torch.float32
        self._unset = 1.0 if blend.kind == "scale" else 0.0
        self._marked = torch.full(
            (len(self._groups),), self._unset, dtype=dtype, device=first.device
        )
        self._marks, self._one = self._marked.unbind(), self._marked.new_ones(())
        self._has_begun = False

    @property
    def can_be_taken_back(self) -> bool:
        """Whether :meth:`take_back` gives the old averages, except for rounding."""
        return self._blend.can_be_taken_back or not any(self._entered())

    def run(self) -> bool:
        """Let the groups enter that are not in yet. Return whether the model is in.

        The model is not in if values are not finite. Groups can have entered before that.
        """
        entered = self._entered()
        self._has_begun = True
        for group, mark, is_in in zip(self._groups, self._marks, entered, strict=True):
            if is_in:
                continue
            models, joined = self._ready(group)
            if self.looks and not _is_finite(joined):
                return False
            self._blend.apply([*group.averages, mark], [*models, self._one])
        return True

    def take_back(self) -> None:
        """Remove the groups that entered. The averages are the old ones except for rounding."""
        for group, mark, is_in in zip(self._groups, self._marks, self._entered(), strict=True):
            if is_in:
                models, _ = self._ready(group)
                self._blend.take_back([*group.averages, mark], [*models, self._one])

    def _entered(self) -> list[bool]:
        if not self._has_begun:  # reading the marks would wait for a GPU
            return [False] * len(self._groups)
        half = self._blend.weight / 2  # a mark that was taken back can be off by its rounding
        return [abs(mark - self._unset) > half for mark in self._marked.tolist()]

    def _new_stages(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        """Return memory for the largest staged group of each device and dtype."""
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for group in self._groups:
            if group.is_staged:
                kind = (group.averages[0].device, group.averages[0].dtype)
                size = sum(self._padded(average) for average in group.averages)
                sizes[kind] = max(size, sizes.get(kind, 0))
        return {
            (device, dtype): torch.empty(size, dtype=dtype, device=device)
            for (device, dtype), size in sizes.items()
        }

    def _ready(self, group: _Group) -> tuple[list[Tensor], Tensor]:
        """Return the pieces that enter, and a tensor to look at."""
        if not group.is_staged:
            return group.models, group.models[0]
        stage = self._stages[group.averages[0].device, group.averages[0].dtype]
        parts, end = [], 0
        for average in group.averages:
            parts.append(stage[end : end + average.numel()].view(average.shape))
            end += self._padded(average)
        copy_all(parts, group.models)
        return parts, stage[:end]

    def _padded(self, tensor: Tensor) -> int:
        return -(-tensor.numel() // self._align) * self._align


def _groups(pairs: list[tuple[Tensor, Tensor]], on_cpu: bool, look: bool) -> Iterator[_Group]:
    """Cut large tensors into pieces, and join small ones."""
    if not (on_cpu and look) and all(a.dtype == m.dtype for a, m in pairs):
        yield _Group([a for a, _ in pairs], [m for _, m in pairs], False)
        return
    limit = _PIECE * torch.get_num_threads() if on_cpu else _GROUP
    small: dict[tuple[torch.device, torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    sizes: dict[tuple[torch.device, torch.dtype, torch.dtype], int] = {}
    for average, model in pairs:
        kind = (average.device, average.dtype, model.dtype)
        if average.numel() < limit:
            small.setdefault(kind, []).append((average, model))
            sizes[kind] = sizes.get(kind, 0) + average.numel()
            if sizes[kind] >= limit:
                sizes[kind] = 0
                yield _joined(small.pop(kind), look)
        elif on_cpu and average.is_contiguous() and model.is_contiguous():
            pieces = (average.view(-1).split(limit), model.view(-1).split(limit))
            for a, m in zip(*pieces, strict=True):
                yield _Group([a], [m], a.dtype != m.dtype)
        else:
            yield _joined([(average, model)], look)
    for joined in small.values():
        yield _joined(joined, look)


def _joined(pairs: Sequence[tuple[Tensor, Tensor]], look: bool) -> _Group:
    averages, models = [a for a, _ in pairs], [m for _, m in pairs]
    # The stage is looked at in one call.
    is_staged = averages[0].dtype != models[0].dtype or (look and len(pairs) > 1)
    return _Group(averages, models, is_staged)


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite. A probe in one pass decides most cases."""
    return math.isfinite(finite_probe(values).item()) or bool(torch.isfinite(values).all())


def insist(action: Callable[[], None]) -> BaseException | None:
    """Run an action to its end, also if Ctrl-C or another error interrupts it.

    Args:
        action: goes on where an error stopped it if it is called again.

    Returns:
        The first error, which the caller has to raise. ``None`` without an error.

    Raises:
        BaseException: the first error, if the action fails each time.
    """
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            action()
            return first
        except BaseException as error:
            first = first or error
    assert first is not None
    raise first
