"""The trained weights of a model, interpolated with their anchor for a block of code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.weights.anchor import follow_devices, stash_for, take_anchor, trained_parameters
from openvclip.weights.buffers import keeping_buffers
from openvclip.weights.copies import HiddenCopies, hidden_copies
from openvclip.weights.factor_gradients import product_gradients, unscaled_factors
from openvclip.weights.hashing import fingerprint
from openvclip.weights.names import named_parameters
from openvclip.weights.numerics import lerp_, overwriting
from openvclip.weights.regularization_input import require_known
from openvclip.weights.shards import local, reshard
from openvclip.weights.watch import WeightWatch, changed_weights


class AnchoredWeights:
    """Interpolates the trained parameters of a model with an anchor, and restores them.

    Args:
        model: the model that is trained.
        anchor: original weights by name; ``None`` copies the current weights.
        missing: ``"error"`` or ``"skip"``, for trained parameters that the anchor lacks.
        device: device of the anchor and of the copy of the weights; ``None`` is that of the
            parameters.

    Attributes:
        anchor: this process's part of each entry of the anchor, by name.
        fingerprint: see :func:`openvclip.weights.hashing.fingerprint`.
        stash: copies of the weights on ``device``, which are kept from one block to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: Mapping[str, Tensor] | None,
        missing: str,
        device: torch.device | None,
    ) -> None:
        self._model, self._device = model, device
        self.anchor = take_anchor(model, anchor, missing, device)
        self.fingerprint = fingerprint(self.anchor, named_parameters(model))
        trained = trained_parameters(model)
        self._unanchored = trained.keys() - self.anchor.keys()
        self.stash: dict[str, Tensor] = {}
        self._watch: WeightWatch | None = None  # of the last block, if a GPU compares its weights
        self._copies: HiddenCopies | None = None

    def live(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters that have an anchor, which follows them to their device.

        Raises:
            UsageError: a parameter was sharded, or set to require gradients, after the anchor was
                taken.
        """
        trained = trained_parameters(self._model)
        require_known(trained, self.anchor.keys() | self._unanchored)
        live = {name: p for name, p in trained.items() if name in self.anchor}
        follow_devices(self.anchor, live, self._device)
        return live

    @contextmanager
    def interpolated(
        self,
        live: dict[str, nn.Parameter],
        alpha: float,
        modules: list[nn.Module],
        backwards: int | None,
    ) -> Iterator[None]:
        """Interpolate the weights in a ``with`` block.

        Args:
            live: the parameters from :meth:`live`.
            alpha: weight of the anchor.
            modules: the modules whose buffers are kept.
            backwards: number of backward passes in the block, if it is known.

        Raises:
            UsageError: the weights changed inside the block.
        """
        trained = trained_parameters(self._model)
        changed: list[str] = []
        try:
            # If lora_B was frozen since the anchor was taken, its product is not scaled.
            factors = {name: trained[name] for name in unscaled_factors(trained, live)}
            with (
                keeping_buffers(modules),
                product_gradients(factors, alpha),
                self._overwritten(live, alpha, backwards) as stash,
            ):
                watch = WeightWatch(trained)
                yield
                _reshard(modules)
                if self._copies is not None:
                    self._copies.settle()
                kept = {n: (s, self.anchor[n]) for n, s in zip(live, stash, strict=True)}
                changed = watch.look(named_parameters(self._model), kept, alpha)
                self._watch = watch if watch.is_late else None
        finally:
            _reshard(modules)  # frees gathered copies of the interpolated weights
        if changed:
            raise changed_weights(changed)

    @contextmanager
    def _overwritten(
        self, live: dict[str, nn.Parameter], alpha: float, backwards: int | None
    ) -> Iterator[list[Tensor]]:
        """Overwrite the weights, and yield the tensors that hold them meanwhile."""
        stash = stash_for(live, self._device, self.stash)
        copies = self._copies = hidden_copies(live.values(), self._device, self._copies)
        if copies is None:
            with overwriting(list(live.values()), stash):
                parts = [local(parameter) for parameter in live.values()]
                lerp_(parts, [self.anchor[name] for name in live], alpha)
                del parts  # the forward pass can replace the memory of the shards
                yield stash
            return
        returning: AbstractContextManager[Any] = nullcontext()
        if backwards is not None:
            returning = copies.while_weights_return(live, self.stash, backwards)
        try:
            copies.interpolate(live, self.anchor, self.stash, alpha)
            torch.clear_autocast_cache()  # see overwriting()
            with returning:
                yield stash
        finally:
            copies.restore(live, self.stash)
            torch.clear_autocast_cache()

    def while_anchor_comes(self) -> AbstractContextManager[None]:
        """Return a context for the last backward pass before the next block, to hide a copy."""
        if self._copies is None:
            return nullcontext()
        return self._copies.while_anchor_comes(self.anchor)

    def free(self) -> None:
        """Free memory of the device that the next block would use."""
        if self._copies is not None:
            self._copies.drop()

    def require_unchanged(self) -> None:
        """Raise an error if the weights changed in the last block, as its GPU has found by now.

        Raises:
            UsageError: the weights changed.
        """
        watch, self._watch = self._watch, None
        if watch is not None and watch.late():
            raise changed_weights([])

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy or a pickle, without streams of a GPU."""
        return {**vars(self), "_watch": None, "_copies": None}


def _reshard(modules: list[nn.Module]) -> None:
    for module in modules:
        reshard(module)
