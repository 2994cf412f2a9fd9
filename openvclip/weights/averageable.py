"""Checks of models before their weights are combined entry by entry."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, listed
from openvclip.weights.adapters import mixed_factors, refuse_factors
from openvclip.weights.kinds import kind_of, quantized_names, refuse, require_values, scales_of
from openvclip.weights.memory import is_one_view, overlap
from openvclip.weights.numerics import bits_of, common_dtype, is_interpolable, memory_of
from openvclip.weights.shards import is_sharded


def require_combinable(
    states: Sequence[Mapping[str, Tensor]], what: Sequence[str], action: str = "interpolate"
) -> None:
    """Raise an error if combining the entries of the models one by one would give wrong weights.

    * Factors of adapters (LoRA) may differ in one factor of each product only. The combination is
      then exact, because the product is linear in this factor.
    * Quantised weights must be equal in all models, with their scales.
    * Two models may share the memory of some entries, for example of a frozen text tower. They may
      not share the memory of all entries: this is ``model.state_dict()`` without a copy, taken
      before and after training. One object that is passed twice is accepted.

    Args:
        states: models with the same canonical names, without extra state, whose entries
            :func:`openvclip.weights.kinds.require_values` accepts.
        what: names of the models in error texts.
        action: what is done with the models, for the error texts.

    Raises:
        WeightTypeError: an entry can't be combined.
        UsageError: two models share the memory of all their entries.
    """
    first, *others = states

    def changed(name: str) -> bool:
        return any(not is_same(first[name], other[name]) for other in others)

    names: dict[str, int] = {}
    for i, state in enumerate(states):
        names |= {name: i for name in quantized_names(state) if name not in names}
    for name, position in names.items():
        scales = [s for s in scales_of(name, states[position]) if s in first]
        packed = kind_of(states[position][name]) == "quantized"
        if packed or changed(name) or any(map(changed, scales)):
            refuse("quantized", list(names), what[position])
    refuse_factors(mixed_factors(first, changed), what[-1], action)
    for (i, a), (j, b) in itertools.combinations(enumerate(states), 2):
        if what[i] != what[j]:
            require_own_memory(a, b, f"{what[i]} and {what[j]}")


def require_addable(base: Mapping[str, Tensor], vectors: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise an error if adding task vectors to a model would give wrong weights.

    The rules are those of :func:`require_combinable`: a factor differs if a vector is not zero.

    Args:
        base: the model, under canonical names, without extra state.
        vectors: task vectors under canonical names, whose entries :func:`require_values` accepts.

    Raises:
        WeightTypeError: an entry can't be combined.
    """
    require_values(base, "base")

    def changed(name: str) -> bool:
        return any(bool(vector[name].any()) for vector in vectors if name in vector)

    for name in quantized_names(base):
        if changed(name) or any(changed(scale) for scale in scales_of(name, base)):
            refuse("quantized", quantized_names(base), "base")
    refuse_factors(mixed_factors(base, changed), "base", "add the task vectors")


def is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two entries hold the same values, without reading shared memory."""
    if is_sharded(a) or is_sharded(b):
        return a is b
    if is_one_view(a, b):
        return True
    b = b.to(a.device)
    if a.dtype != b.dtype:  # for example float16 and float32
        a, b = a.to(wide := common_dtype(a.dtype, b.dtype)), b.to(wide)
    return a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def require_own_memory(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Raise an error if two models share the memory of all their entries.

    One object that is passed twice is accepted. Shared memory of some entries is accepted too.

    Args:
        a: a model under canonical names.
        b: another model under canonical names.
        what: names of both models, for the error text.

    Raises:
        UsageError: the models share the memory of all their entries.
    """
    same_object = True
    for name, value in a.items():
        if name in b and is_interpolable(value) and value.numel():
            if not is_one_view(value, b[name]):
                return
            is_live = isinstance(value, nn.Parameter)
            same_object = same_object and value is b[name] and not is_live
    if same_object:
        return
    raise UsageError(
        f"{what} share the memory of all their weights, so they are the same model. state_dict() "
        "does not copy: training changes a state dict that was taken before. Copy the original "
        "weights before training: {name: value.clone() for name, value in "
        "model.state_dict().items()}."
    )


def require_separate_from(
    live: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> None:
    """Raise an error if writing to ``live`` would change one of two models.

    An entry that has the same values in both models may share memory, because it stays the same.

    Raises:
        UsageError: an entry of ``a`` or ``b`` would be overwritten with other values.
    """
    by_memory: dict[Hashable, list[Tensor]] = {}
    for value in live.values():
        if value.numel():
            by_memory.setdefault(memory_of(value), []).append(value)
    shared = []
    for name, value in itertools.chain(a.items(), b.items()):
        others = by_memory.get(memory_of(value)) if is_interpolable(value) else None
        if others is None or (is_one_view(value, live[name]) and is_same(a[name], b[name])):
            continue
        if any(overlap(value, other) for other in others):
            shared.append(name)
    shared = list(dict.fromkeys(shared))
    if shared:
        raise UsageError(
            f"{len(shared)} entries of theta_a or theta_b are the weights of the model itself and "
            f"would be overwritten ({listed(shared)}), so the next interpolation would start from "
            "this result. Copy the state dict first: {name: value.clone() for name, value in "
            "model.state_dict().items()}."
        )
