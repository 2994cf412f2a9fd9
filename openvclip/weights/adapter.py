"""A LoRA fine-tune as a value: the changes that it makes to the weights of a base model.

All results equal the same operation on the merged weights ``W + s B A``. Changes of low rank stay
factors where the result is again of low rank: interpolation scales a product, and a mean joins the
factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from openvclip.errors import MergeError, StateMismatchError, UsageError
from openvclip.weights.interpolation import Lambda, as_number, weights_of
from openvclip.weights.kinds import quantized_names, refuse, require_values
from openvclip.weights.low_rank import CompressionLoss, LowRank
from openvclip.weights.names import canonical_model, live_model, require_live
from openvclip.weights.numerics import (
    compute_dtype,
    device_for_float64,
    dtype_of_result,
    is_interpolable,
)
from openvclip.weights.relative import RelativeWeights
from openvclip.weights.shards import is_sharded, sharded_like, whole

_T = TypeVar("_T")
Layout = Literal["linear", "transposed", "embedding"]
"""How files of peft store the factors of an entry.

``"transposed"`` is a layer whose weight is stored as ``[inputs, out]``.
"""


@dataclass(frozen=True, eq=False)
class Adapter(RelativeWeights):
    """A LoRA fine-tune: the changes of the weights of a base model, by the names of the base model.

    :func:`openvclip.checkpoints.load_adapter` reads an adapter from a folder of peft, and
    :func:`openvclip.weights.adapter_of` from a model in training. Functions of openvclip that take
    the original CLIP and a fine-tuned model accept an adapter as the fine-tuned model::

        adapter = load_adapter("lora/")
        theta = openvclip.interpolate(clip, adapter, 0.5)
        theta = merging.ties(clip, [adapter, other])

    :meth:`interpolated`, :meth:`mean`, :meth:`total` and :meth:`compressed` compute in factors.
    They need the base model only for ``values``.

    Attributes:
        updates: changes of low rank, by the name of the entry that they are added to.
        values: entries that were trained whole (``modules_to_save``, biases), with their new
            values.
        layouts: entries whose factors peft stores in another layout than ``"linear"``.
        modules_to_save: the modules that peft trained whole.
        base: the name of the base model in the file, or ``None``.
    """

    updates: Mapping[str, LowRank]
    values: Mapping[str, Tensor] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    base: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of a change."""
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Memory of all factors and values in bytes."""
        factors = sum(update.nbytes for update in self.updates.values())
        return factors + sum(value.nbytes for value in self.values.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries that the adapter changes, in the order of the adapter."""
        return tuple(dict.fromkeys((*self.updates, *self.values)))

    def prefixed(self, prefix: str) -> Adapter:
        """Return the adapter for a larger model that holds the base model as a part.

        Args:
            prefix: the text before the names of the base model, such as ``"visual."``.
        """
        return replace(
            self,
            updates={prefix + name: update for name, update in self.updates.items()},
            values={prefix + name: value for name, value in self.values.items()},
            layouts={prefix + name: layout for name, layout in self.layouts.items()},
            modules_to_save=tuple(prefix + name for name in self.modules_to_save),
        )

    # --- in factors ----------------------------------------------------------------------------

    def interpolated(self, lam: Lambda, base: Mapping[str, Tensor] | None = None) -> Adapter:
        """Return the adapter of ``lam * base + (1 - lam) * tuned`` (Equation 6).

        The products are scaled by ``1 - lam``, which is exact. **lam weighs the base model.**

        Args:
            lam: a number, or a function from the name of an entry to its number.
            base: state dict of the base model. Only needed if the adapter holds ``values``.

        Raises:
            LambdaError: a weight is not a finite number.
            UsageError: ``base`` is needed, but not given.

        Warns:
            ExtrapolationWarning: a weight lies outside [0, 1].
        """
        names: dict[str, Tensor] = dict.fromkeys(self.names, torch.empty(0))
        weight_of = {name: 1.0 - weight for name, weight in weights_of(lam, names).items()}
        return Adapter.total([self], [weight_of.__getitem__], base)

    @staticmethod
    def mean(adapters: Sequence[Adapter], base: Mapping[str, Tensor] | None = None) -> Adapter:
        """Return the adapter of the mean of several fine-tunes of one base model (uniform soup).

        The mean of the products is exact. The ranks add up: see :meth:`compressed`.

        Args:
            adapters: one or more fine-tunes. An adapter that lacks an entry does not change it.
            base: state dict of the base model. Only needed if some adapters lack ``values`` that
                others hold.

        Raises:
            MergeError: there are no adapters.
            StateMismatchError: shapes differ.
            UsageError: ``base`` is needed, but not given.
        """
        return Adapter.total(adapters, [1.0 / max(1, len(adapters))] * len(adapters), base)

    @staticmethod
    @torch.no_grad()
    def total(
        adapters: Sequence[Adapter],
        scales: Sequence[Lambda],
        base: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        r"""Return the adapter of the base model plus scaled changes (task arithmetic).

        .. math:: \theta = \theta_0 + \sum_t \lambda_t s_t B_t A_t

        With scales whose sum is 1, this is a weighted mean of the fine-tuned models.

        Args:
            adapters: one or more fine-tunes of one base model.
            scales: one number for each adapter, or a function from the name of an entry to its
                number.
            base: state dict of the base model. Only needed for ``values``, and only if the scales
                of an entry do not add up to 1.

        Raises:
            MergeError: there are no adapters, or the number of scales differs.
            LambdaError: a scale is not a finite number.
            StateMismatchError: shapes differ.
            UsageError: ``base`` is needed, but not given.
        """
        if not adapters or len(scales) != len(adapters):
            raise MergeError(
                f"Got {len(adapters)} adapters and {len(scales)} scales; expected one scale for "
                "each adapter, and at least one adapter."
            )
        updates: dict[str, LowRank] = {}
        for name in dict.fromkeys(n for adapter in adapters for n in adapter.updates):
            parts = _with(name, [adapter.updates for adapter in adapters], scales)
            updates[name] = LowRank.total([part for part, _ in parts], [w for _, w in parts])
        return replace(
            adapters[0],
            updates=updates,
            values=_total_values(adapters, scales, base),
            layouts={name: kind for a in reversed(adapters) for name, kind in a.layouts.items()},
            modules_to_save=tuple(dict.fromkeys(m for a in adapters for m in a.modules_to_save)),
        )

    def compressed(self, rank: int) -> tuple[Adapter, CompressionLoss]:
        """Return the closest adapter whose changes have at most this rank, and the error.

        Each change is recompressed by its singular value decomposition, in float64.

        Args:
            rank: the largest rank of the result.

        Raises:
            MergeError: ``rank`` is below 1.
        """
        updates, lost, kept = {}, {}, {}
        for name, update in self.updates.items():
            updates[name], lost[name], kept[name] = update.compressed_with_norm(rank)
        return replace(self, updates=updates), CompressionLoss(lost, kept)

    # --- in weights ----------------------------------------------------------------------------

    def merged(
        self,
        base: Mapping[str, Tensor],
        lam: Lambda = 0.0,
        *,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Return the state dict ``lam * base + (1 - lam) * tuned``.

        Args:
            base: state dict of the base model, which also holds entries that did not change.
            lam: weight of the base model: a number, or a function from the name of an entry to its
                number. Default: 0, the fine-tuned model.
            dtype: dtype of the entries that change. Default: the dtype of each entry of ``base``.

        Returns:
            A new dict in the order of ``base``, under canonical names. The entries that the adapter
            changes are new tensors. **All other entries are the tensors of** ``base``, without a
            copy.

        Raises:
            StateMismatchError: ``base`` lacks an entry of the adapter, or its shape differs.
            WeightTypeError: an entry that changes is quantised, sparse or without values.
            LambdaError: a weight is not a finite number.

        Warns:
            ExtrapolationWarning: a weight lies outside [0, 1].
        """
        entries, extra = self._fitting(base)
        weight_of = weights_of(lam, {name: entries[name] for name in self.names})
        merged = {
            name: self._merged_entry(name, value, 1.0 - weight_of[name], dtype)
            if name in weight_of
            else value.detach()
            for name, value in entries.items()
        }
        return {**merged, **extra}

    def merge_into(self, model: nn.Module, lam: Lambda = 0.0) -> None:
        """Add the changes to the weights of a base model, in place.

        One entry at a time is computed, so no memory of the size of the model is needed. The
        weights of the base model are overwritten.

        Args:
            model: the base model.
            lam: weight of the base model, as in :meth:`merged`.

        Raises:
            StateMismatchError, WeightTypeError, LambdaError: as in :meth:`merged`. The model is
                then unchanged.
        """
        live, _ = live_model(model)
        require_live(model, live)
        entries, _ = self._fitting(live)
        weight_of = weights_of(lam, {name: entries[name] for name in self.names})
        with torch.no_grad():
            for name, weight in weight_of.items():
                live[name].copy_(self._merged_entry(name, live[name], 1.0 - weight, None))
        torch.clear_autocast_cache()

    def on(self, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the fine-tuned model as a mapping, whose entries are merged at each access.

        Args:
            base: state dict of the base model.

        Raises:
            StateMismatchError, WeightTypeError: as in :meth:`merged`.
        """
        entries, extra = self._fitting(base)
        return _MergedView({**entries, **extra}, self)

    def _fitting(self, base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the entries and the extra state of a base model that the adapter fits."""
        entries, extra = canonical_model(base, "base")
        unexpected = [name for name in self.names if name not in entries]
        shapes = {name: update.shape for name, update in self.updates.items()}
        shapes |= {name: tuple(value.shape) for name, value in self.values.items()}
        mismatched = [
            (name, tuple(entries[name].shape), shape)
            for name, shape in shapes.items()
            if name in entries and tuple(entries[name].shape) != shape
        ]
        if unexpected or mismatched:
            raise StateMismatchError(
                "The adapter does not fit the base model: base defines the expected names and "
                "shapes.",
                unexpected=unexpected,
                mismatched=mismatched,
                hint=self._hint(entries, unexpected),
            )
        changed = {name: entries[name] for name in self.names}
        require_values(changed, "base")
        quantized = set(quantized_names(entries))
        refuse("quantized", [name for name in changed if name in quantized], "base")
        return entries, extra

    def _hint(self, entries: Mapping[str, Tensor], unexpected: list[str]) -> str:
        first = max(unexpected, key=len, default="")
        for name in entries if first else ():
            prefix = name.removesuffix(first)
            if name.endswith(f".{first}") and all(prefix + n in entries for n in self.names):
                return f"The base model is a part of this model: use adapter.prefixed({prefix!r})."
        return (
            "Give the state dict of the model that the adapter was trained on, under the names of "
            "this model."
        )

    def _merged_entry(
        self, name: str, value: Tensor, share: float, dtype: torch.dtype | None
    ) -> Tensor:
        """Return one entry: the base model plus ``share`` times the change, rounded once."""
        target = dtype_of_result(value.dtype, dtype)
        if not is_interpolable(value):
            return self.values.get(name, value).to(value.device, copy=True)
        if share == 0.0:
            return value.detach().to(target, copy=True)
        gathered = whole(value)
        changed = gathered.to(compute_dtype(gathered.dtype), copy=True)
        if name in self.values:
            changed.lerp_(self.values[name].to(changed.device, changed.dtype), share)
        if name in self.updates:
            change = self.updates[name].to(changed.device).scaled(share).product()
            changed = changed + change  # float64 factors give a float64 sum
        merged = changed.to(target)
        return sharded_like(merged, value) if is_sharded(value) else merged


class _MergedView(Mapping[str, Tensor]):
    """A fine-tuned model whose changed entries are merged at each access.

    Args:
        base: entries and extra state of the base model, under canonical names.
        adapter: an adapter that fits.
    """

    def __init__(self, base: dict[str, Tensor], adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self._changed = frozenset(adapter.names)

    def __getitem__(self, name: str) -> Tensor:
        value = self._base[name]
        if name not in self._changed:
            return value
        return self._adapter._merged_entry(name, value, 1.0, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _number(scale: Lambda, name: str) -> float:
    return as_number(scale(name) if callable(scale) else scale, f"scale of {name}")


def _with(
    name: str, states: Sequence[Mapping[str, _T]], scales: Sequence[Lambda]
) -> list[tuple[_T, float]]:
    """Return the entry of each adapter that has it, with its scale."""
    return [
        (state[name], _number(scale, name))
        for state, scale in zip(states, scales, strict=True)
        if name in state
    ]


def _total_values(
    adapters: Sequence[Adapter], scales: Sequence[Lambda], base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    originals = None if base is None else canonical_model(base, "base")[0]
    result: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for adapter in adapters for n in adapter.values):
        pairs = _with(name, [adapter.values for adapter in adapters], scales)
        first = pairs[0][0]
        if not is_interpolable(first):
            result[name] = first.clone()
            continue
        rest = 1.0 - math.fsum(weight for _, weight in pairs)
        if abs(rest) > 1e-12:
            pairs.append((_original(originals, name), rest))
        home = device_for_float64(first.device)
        wide = torch.promote_types(first.dtype, torch.float64)
        mean = torch.zeros_like(first, dtype=wide, device=home)
        for value, weight in pairs:
            mean.add_(value.to(home), alpha=weight)
        result[name] = mean.to(first.dtype).to(first.device)
    return result


def _original(originals: Mapping[str, Tensor] | None, name: str) -> Tensor:
    if originals is None:
        raise UsageError(
            f"The adapter holds whole values of {name} (modules_to_save or biases). Their "
            "interpolation needs the values of the base model: pass base=<state dict of the base "
            "model>."
        )
    if name not in originals:
        raise StateMismatchError(
            "The base model lacks entries of the adapter.",
            unexpected=[name],
            hint="Give the state dict of the model that the adapter was trained on.",
        )
    return originals[name]
