"""Averages of LoRA fine-tunes along a training run: the means of the products, not of the factors.

The averages of :mod:`openvclip.weights.averaging` average each entry by itself, which is wrong for
two factors of a product. The averages here keep sums of products.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from openvclip.errors import (
    StateMismatchError,
    UsageError,
)
from openvclip.weights.adapter import Adapter
from openvclip.weights.adapter_model import (
    LiveLayer,
    adapter_of,
    copied,
    lora_layers,
)
from openvclip.weights.adapter_storage import state_of_adapter
from openvclip.weights.arguments import is_whole
from openvclip.weights.low_rank import CompressionLoss, LowRank
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    is_interpolable,
    overwriting,
)
from openvclip.weights.product_sums import ProductSum
from openvclip.weights.schedule import Tracker, require_decay, warmed_up
from openvclip.weights.schedule_free import warn_of_training_weights, watch_optimizers


class AdapterTracker(Tracker):
    """Base class of averages of LoRA fine-tunes.

    The average equals the average of the merged weights ``W + s B A``. The base model is neither
    copied nor changed. Entries that are trained whole (``modules_to_save``, biases) are averaged
    one by one. Buffers of the model are not averaged.

    Args:
        model: a model of peft, of open_clip or Hugging Face, with or without wrappers.
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
        max_rank: the largest rank of the average. ``None`` keeps all products, exactly. The
            products are factors until a dense sum takes less memory. A number bounds the memory:
            the average is then recompressed, and :meth:`error` tells what was left out.
        adapter: the name of the adapter. Default: the active adapter, which must be the only one.
        check_finite: whether to refuse weights that hold NaN or infinity.

    Raises:
        UsageError: ``start``, ``every`` or ``max_rank`` is out of range, the model has no LoRA, or
            the weights are sharded.
        WeightTypeError: the adapter is not plain LoRA.
    """

    _settings: ClassVar[tuple[str, ...]] = ("start", "every", "max_rank")
    _optional_settings = ("max_rank",)

    def __init__(
        self,
        model: nn.Module,
        *,
        start: int = 0,
        every: int = 1,
        max_rank: int | None = None,
        adapter: str | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(start, every, check_finite)
        if max_rank is not None and not is_whole(max_rank, 1):
            raise UsageError(f"max_rank={max_rank!r}: expected None or a whole number, at least 1.")
        self.max_rank = None if max_rank is None else int(max_rank)
        self._adapter = adapter
        self._sums: dict[str, ProductSum] = {}
        self._values: dict[str, Tensor] = {}
        present = adapter_of(model, adapter, copy=False)
        # What the average needs beside its sums: the layouts and the settings, without values.
        self._like = Adapter({}, {}, present.layouts, present.modules_to_save, present.base)
        self._names = {name: update.shape for name, update in present.updates.items()}
        self._dtypes = {name: value.dtype for name, value in present.values.items()}
        self._shapes = {name: tuple(value.shape) for name, value in present.values.items()}
        watch_optimizers()

    @abstractmethod
    def _shares(self) -> tuple[float, float]:
        """Return the factors of the old average and of the new model, in an update.

        ``self._n_averaged`` is the number of models that were added before.
        """

    @abstractmethod
    def _scale(self) -> float:
        """Return the number that the sums are multiplied by when the average is read."""

    @property
    def nbytes(self) -> int:
        """Memory of the average in bytes."""
        sums = sum(products.nbytes for products in self._sums.values())
        return sums + sum(value.nbytes for value in self._values.values())

    def check_model(self, model: nn.Module) -> None:
        """Raise the error that :meth:`update` would raise, without a change of the average.

        Args:
            model: the model that :meth:`update` will get.
        """
        self._require_same(adapter_of(model, self._adapter, copy=False))

    def _add_model(self, model: nn.Module) -> None:
        warn_of_training_weights(p for p in model.parameters() if p.requires_grad)
        present = adapter_of(model, self._adapter, copy=False)
        self._require_same(present)
        factors = {f"{n} ({side})": getattr(update, side) for n, update in present.updates.items()
                   for side in ("down", "up")}  # fmt: skip
        self._require_finite({**factors, **present.values})
        old, new = self._shares()
        for name, update in present.updates.items():
            products = self._sums.setdefault(name, ProductSum(self.max_rank))
            products.scale(old)
            products.add(update, new)
        for name, value in present.values.items():
            self._add_value(name, value, old, new)
        self._n_averaged += 1

    def _add_value(self, name: str, value: Tensor, old: float, new: float) -> None:
        if not is_interpolable(value):
            self._values[name] = value.clone()
            return
        wide = value.to(common_dtype(torch.float32, compute_dtype(value.dtype)), copy=True)
        if name in self._values:
            self._values[name] = self._values[name].to(wide.device).mul_(old).add_(wide, alpha=new)
        else:
            self._values[name] = wide.mul_(new)

    def _require_same(self, present: Adapter) -> None:
        # An entry can have a change and a value of its own.
        updates = {name: update.shape for name, update in present.updates.items()}
        values = {name: tuple(value.shape) for name, value in present.values.items()}
        expected, given = self._names.keys() | self._shapes, updates.keys() | values
        if updates != self._names or values != self._shapes:
            raise StateMismatchError(
                "The model does not train the entries of the tracked model.",
                missing=expected - given,
                unexpected=given - expected,
                mismatched=[*_differing(self._names, updates), *_differing(self._shapes, values)],
                hint="Create the tracker after the last change of requires_grad and of the "
                "adapters.",
            )

    # --- the average -----------------------------------------------------------------------------

    def averaged_adapter(self) -> Adapter:
        """Return the average as an adapter: the means of the products.

        Its rank is larger than the rank of the model, and at most ``max_rank`` if given. To get an
        adapter of a given rank, call :meth:`Adapter.compressed`. To get whole weights, call
        :meth:`Adapter.merged`.

        Raises:
            EmptyAverageError: no model was added yet.
        """
        return copied(self._averaged()[0])

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """Return the average as the entries of a file of peft, whose products have the scale 1.

        :func:`openvclip.checkpoints.save_adapter` writes a whole folder of
        :meth:`averaged_adapter`, with its settings.

        Raises:
            EmptyAverageError: no model was added yet.
        """
        average = self.averaged_adapter()
        updates = {
            name: LowRank(update.up * update.scale, update.down, 1.0, update.shape)
            for name, update in average.updates.items()
        }
        return state_of_adapter(replace(average, updates=updates))[0]

    def error(self) -> CompressionLoss:
        """Return a bound of what the recompression to ``max_rank`` left out of each product.

        The bound is the sum of the norms that all recompressions left out. It is 0 without
        ``max_rank``.

        Raises:
            EmptyAverageError: no model was added yet.
        """
        average, lost = self._averaged()
        return CompressionLoss(lost, {n: update.norm() for n, update in average.updates.items()})

    def _averaged(self) -> tuple[Adapter, dict[str, float]]:
        self._require_models()
        scale = self._scale()
        updates, lost = {}, {}
        for name, products in self._sums.items():
            updates[name], lost[name] = products.value(scale)
        values = {
            name: value * scale if is_interpolable(value) else value
            for name, value in self._values.items()
        }
        values = {name: value.to(self._dtypes[name]) for name, value in values.items()}
        like = self._like
        return Adapter(updates, values, like.layouts, like.modules_to_save, like.base), lost

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Use the average as the adapter of ``model`` inside a ``with`` block.

        The parameters of the adapter hold factors of a larger rank inside the block. They stay the
        same objects. After the block, the live factors are restored bitwise, also after an
        exception. Run only the evaluation inside the block, and no backward pass.

        Args:
            model: the tracked model.

        Yields:
            ``model``.

        Raises:
            EmptyAverageError: no model was added yet.
            StateMismatchError: the model trains other entries than the tracked model.
        """
        average, _ = self._averaged()
        layers = lora_layers(model, self._adapter)
        present = adapter_of(model, self._adapter, copy=False)
        self._require_same(present)
        live = [present.values[name] for name in average.values]
        values = overwriting(live) if live else nullcontext()
        try:
            with values, _holding(layers, average.updates):
                with torch.no_grad():
                    for target, value in zip(live, average.values.values(), strict=True):
                        target.copy_(value)
                yield model
        finally:
            torch.clear_autocast_cache()

    # --- saving and resuming ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker. A run that loads the state resumes bitwise.

        The tensors are not copied. Save them, or clone them before the next call of
        :meth:`update`.
        """
        sums = {name: products.state_dict() for name, products in self._sums.items()}
        return {
            "steps": self._steps,
            "n_averaged": self._n_averaged,
            **{setting: getattr(self, setting) for setting in self._settings},
            "sums": sums,
            "values": dict(self._values),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`. The tensors are copied.

        Raises:
            StateMismatchError: an entry is missing or unknown, or the state belongs to another
                model or to a run that trained other parameters.
        """
        self._require_own_state(state)
        self._require_entries(state, "sums", Mapping)
        self._require_entries(state, "values", Tensor)
        names, saved = {*self._names, *self._dtypes}, {*state["sums"], *state["values"]}
        if state["n_averaged"] and names != saved:
            raise StateMismatchError(
                "The saved average does not fit the model.",
                missing=names - saved,
                unexpected=saved - names,
                hint="Train the same adapter as in the run that was saved.",
            )
        shapes = {name: tuple(value.shape) for name, value in state["values"].items()}
        if differing := _differing(self._shapes, shapes):
            raise StateMismatchError(
                "The saved average does not fit the model.",
                mismatched=differing,
                hint="Train the same adapter as in the run that was saved.",
            )
        sums = {name: ProductSum(state["max_rank"]) for name in state["sums"]}
        for name, products in sums.items():
            try:
                products.load_state_dict(state["sums"][name], self._names[name])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._damaged("sums", f"holds no sum of products as {name!r}") from error
        self._sums = sums
        self._values = {name: value.clone() for name, value in state["values"].items()}
        self._steps, self._n_averaged = int(state["steps"]), int(state["n_averaged"])
        for setting in self._settings:
            setattr(self, setting, state[setting])


def _differing(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Return ``(name, expected shape, given shape)`` of the names in both whose shapes differ."""
    both = [name for name in expected if name in given]
    return [(n, expected[n], given[n]) for n in both if expected[n] != given[n]]


@contextmanager
def _holding(layers: list[LiveLayer], updates: Mapping[str, LowRank]) -> Iterator[None]:
    """Let the parameters of LoRA hold other products inside the block."""
    kept = [(p, p.data) for layer in layers for p in (layer.a, layer.b) if p is not None]
    try:
        for layer in layers:
            layer.put(updates[layer.entry])
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class AdapterSWATracker(AdapterTracker):
    r"""Stochastic weight averaging of a LoRA fine-tune: the mean of the products at chosen steps.

    The schedule is that of :class:`openvclip.SWATracker`. The average equals the uniform mean of
    the merged weights::

        swa = AdapterSWATracker(model, start=1000, every=100)
        ...
        theta = openvclip.interpolate(clip, swa.averaged_adapter(), 0.5)

    Args:
        model: a model of peft.
        start: number of steps before the averaging begins (``T``).
        every: number of steps between two averaged models (``c``).
        max_rank: the largest rank of the average, as in :class:`AdapterTracker`. Default: exact.
        adapter: the name of the adapter. Default: the active adapter.
        check_finite: whether to refuse weights that hold NaN or infinity.

    Memory: the factors of all averaged models, at most one dense copy in float32 of the weights
    that the adapter changes. With ``max_rank``, at most factors of twice this rank.
    """

    def _shares(self) -> tuple[float, float]:
        return 1.0, 1.0

    def _scale(self) -> float:
        return 1.0 / self._n_averaged


class AdapterEMATracker(AdapterTracker):
    r"""Exponential moving average of a LoRA fine-tune, in the space of the products.

    The average starts as the first model. Each further model changes it to
    :math:`d\, \bar\theta + (1 - d)\, \theta`, as in :class:`openvclip.EMATracker`.

    Args:
        model: a model of peft.
        decay: share of the average that each update keeps, in [0, 1).
        warmup: whether the decay starts small and grows to ``decay``.
        start: number of steps before the averaging begins.
        every: number of steps between two updates of the average.
        max_rank: the largest rank of the average, as in :class:`AdapterTracker`. Default: exact.
        adapter: the name of the adapter. Default: the active adapter.
        check_finite: whether to refuse weights that hold NaN or infinity.

    Memory: after some updates, one dense copy in float32 of the weights that the adapter changes.
    With ``max_rank``, at most factors of twice this rank.
    """

    _settings = ("start", "every", "max_rank", "decay", "warmup")

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9999,
        warmup: bool = False,
        start: int = 0,
        every: int = 1,
        max_rank: int | None = None,
        adapter: str | None = None,
        check_finite: bool = True,
    ) -> None:
        decay = require_decay(decay)
        super().__init__(
            model,
            start=start,
            every=every,
            max_rank=max_rank,
            adapter=adapter,
            check_finite=check_finite,
        )
        self.decay = decay
        self.warmup = warmup

    def _shares(self) -> tuple[float, float]:
        if self._n_averaged == 0:
            return 1.0, 1.0
        decay = warmed_up(self.decay, self._n_averaged) if self.warmup else self.decay
        return decay, 1.0 - decay

    def _scale(self) -> float:
        return 1.0
