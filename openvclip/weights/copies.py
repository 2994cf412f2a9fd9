"""Copies between a GPU and the CPU that run while the GPU computes.

With ``anchor_device="cpu"``, one interpolation of the weights needs three copies of all trained
parameters: the weights to the CPU, the anchor to the GPU, and the weights back to the GPU. A GPU
copies and computes at the same time, if the copies are in other streams than the computation:

* The weights go to the CPU during the forward pass that follows. Until then the GPU holds a second
  copy of them.
* The weights come back during the second half of the backward pass. They wait in new memory until
  the pass has ended, because the pass still uses the interpolated weights.
* The anchor of the next interpolation comes during the second half of the plain backward pass.

The new memory is at most half of the memory that PyTorch holds and does not use at that time, such
as that of activations that the backward pass has freed. If this is too little, the other weights
are copied when they are needed, in groups of 16 MiB. All results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from openvclip.weights.numerics import foreach, lerp_
from openvclip.weights.shards import local

GROUP_BYTES = 16 * 2**20
"""Tensors are copied in groups of about this size. Each group has an event of its own."""

_HOOKS = 8  # parameters whose gradients tell how far a backward pass is

_Group: TypeAlias = tuple[str, ...]


class Lanes(Protocol):
    """The streams of a device: one computes, one copies to the device, one copies to the CPU.

    Streams and events have the methods of those of ``torch.cuda``.
    """

    device: torch.device
    to_device: Any
    to_host: Any

    def main(self) -> Any:
        """Return the stream in which this thread computes."""
        ...

    def on(self, lane: Any) -> AbstractContextManager[Any]:
        """Return a context in which operations run in a stream."""
        ...

    def keep(self, tensor: Tensor, lane: Any) -> None:
        """Let a tensor's memory be used again only after the present work of a stream."""
        ...

    def free_bytes(self) -> int:
        """Return how much memory PyTorch holds for later use on the device."""
        ...


class CudaLanes:
    """The streams of a GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_device, self.to_host = (torch.cuda.Stream(device) for _ in range(2))

    def main(self) -> Any:
        """Return the stream in which this thread computes."""
        return torch.cuda.current_stream(self.device)

    def on(self, lane: Any) -> AbstractContextManager[Any]:
        """Return a context in which operations run in a stream."""
        return torch.cuda.stream(lane)

    def keep(self, tensor: Tensor, lane: Any) -> None:
        """Let a tensor's memory be used again only after the present work of a stream."""
        tensor.record_stream(lane)

    def free_bytes(self) -> int:
        """Return how much memory PyTorch holds for later use on the device."""
        held: int = torch.cuda.memory_reserved(self.device)
        return held - torch.cuda.memory_allocated(self.device)


class HiddenCopies:
    """Interpolates the weights of a model with an anchor on the CPU, and restores them.

    Args:
        lanes: the streams.
        group_bytes: see :data:`GROUP_BYTES`.

    Attributes:
        device: device of the weights.
    """

    def __init__(self, lanes: Lanes, group_bytes: int = GROUP_BYTES) -> None:
        self._lanes, self._group_bytes = lanes, group_bytes
        self.device = lanes.device
        self._main = lanes.main()
        self._anchors: dict[_Group, tuple[list[Tensor], Any]] = {}  # on the device, with an event
        self._weights: dict[_Group, tuple[list[Tensor], Any]] = {}
        self._live: Mapping[str, nn.Parameter] = {}  # of the last interpolation
        self._overwritten: list[_Group] = []

    @torch.no_grad()
    def interpolate(
        self,
        live: Mapping[str, nn.Parameter],
        anchor: Mapping[str, Tensor],
        stash: Mapping[str, Tensor],
        alpha: float,
    ) -> None:
        """Keep the weights in the stash, and overwrite them with the interpolation.

        Args:
            live: the parameters by name.
            anchor: their anchor, in page-locked memory of the CPU.
            stash: tensors like the parameters, in page-locked memory of the CPU.
            alpha: weight of the anchor.
        """
        lanes, main = self._lanes, self._lanes.main()
        groups, self._live, self._overwritten = self._groups(live), live, []
        if any(group not in groups for group in self._anchors):
            self.drop()  # other parameters are trained now
        # The memory of each group of the anchor is freed for the weights of a later group.
        room = lanes.free_bytes() // 2 + sum(_bytes(group) for group, _ in self._anchors.values())
        waiting: list[tuple[list[Tensor], Any]] = []  # weights on their way to the CPU
        for number, group in enumerate(groups):
            for ahead in groups[number : number + 2]:
                if ahead not in self._anchors:
                    self._fetch(self._anchors, ahead, anchor, main)
            parts = [local(live[name]) for name in group]
            while waiting and room < sum(_bytes(kept) for kept, _ in waiting):
                main.wait_event(waiting[0][1])  # before the memory is freed
                del waiting[0]
            kept = [part.clone() for part in parts]
            lanes.to_host.wait_stream(main)
            with lanes.on(lanes.to_host):
                _copy([stash[name] for name in group], kept)
            waiting.append((kept, lanes.to_host.record_event()))
            self._overwritten.append(group)
            lerp_(parts, self._take(self._anchors, group, main), alpha)
        for kept, _ in waiting:
            for tensor in kept:
                lanes.keep(tensor, lanes.to_host)

    @torch.no_grad()
    def restore(self, live: Mapping[str, nn.Parameter], stash: Mapping[str, Tensor]) -> None:
        """Write the weights back, also if :meth:`interpolate` has not come to its end.

        Args:
            live: the parameters by name. Their memory can be other memory than before.
            stash: from :meth:`interpolate`.
        """
        main = self.settle()
        for group in self._overwritten:
            if group in self._weights:
                kept = self._take(self._weights, group, main)
            else:
                kept = [stash[name] for name in group]
            _copy([local(live[name]) for name in group], kept)
        self._overwritten = []
        self._drop(self._weights, main)

    def settle(self) -> Any:
        """Let the present stream wait until the stash holds the weights. Return the stream."""
        main = self._lanes.main()
        main.wait_stream(self._lanes.to_host)
        return main

    def __del__(self) -> None:
        """Let no copy run in memory that is freed with this object."""
        with suppress(Exception):  # the GPU is gone when Python ends
            for store in (self._anchors, self._weights):
                self._drop(store, self._main)

    def drop(self) -> None:
        """Free the memory of tensors that were copied to the device and are not used."""
        main = self._lanes.main()
        for store in (self._anchors, self._weights):
            self._drop(store, main)

    def while_weights_return(
        self, live: Mapping[str, nn.Parameter], stash: Mapping[str, Tensor], backwards: int
    ) -> AbstractContextManager[None]:
        """Return a context for passes at the interpolated weights, the last of which hides copies.

        Args:
            live: the parameters by name.
            stash: from :meth:`interpolate`.
            backwards: number of backward passes in the context.
        """
        self._main = self._lanes.main()

        def fetch() -> None:
            # The weights must be in the stash before they are copied from there.
            self._lanes.to_device.wait_stream(self._lanes.to_host)
            self._fetch_all(self._weights, live, stash)

        return after_half(list(live.values()), backwards, fetch)

    def while_anchor_comes(self, anchor: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context for a backward pass that hides the copy of the anchor.

        Args:
            anchor: the anchor of the next interpolation.
        """
        self._main, live = self._lanes.main(), self._live
        return after_half(
            list(live.values()), 1, lambda: self._fetch_all(self._anchors, live, anchor)
        )

    @torch.no_grad()
    def _fetch_all(
        self,
        store: dict[_Group, tuple[list[Tensor], Any]],
        live: Mapping[str, nn.Parameter],
        sources: Mapping[str, Tensor],
    ) -> None:
        """Copy as many groups to the device as fit into half of the free memory.

        The other half is left to the gradients and the temporary tensors of the present pass.
        """
        room = self._lanes.free_bytes() // 2
        # The thread of the backward pass can have another present stream.
        with self._lanes.on(self._main):
            for group in self._groups(live):
                if group in store:
                    continue
                room -= _bytes(sources[name] for name in group)
                if room < 0:
                    return
                try:
                    self._fetch(store, group, sources, self._main)
                except torch.OutOfMemoryError:  # the free memory is in pieces that are too small
                    return

    def _fetch(
        self,
        store: dict[_Group, tuple[list[Tensor], Any]],
        group: _Group,
        sources: Mapping[str, Tensor],
        main: Any,
    ) -> None:
        """Begin to copy a group to the device."""
        lanes = self._lanes
        near = [torch.empty_like(sources[name], device=self.device) for name in group]
        # Earlier work of the main stream can still use this memory.
        lanes.to_device.wait_stream(main)
        with lanes.on(lanes.to_device):
            _copy(near, [sources[name] for name in group])
        store[group] = (near, lanes.to_device.record_event())

    def _take(
        self, store: dict[_Group, tuple[list[Tensor], Any]], group: _Group, main: Any
    ) -> list[Tensor]:
        """Let the main stream wait for a group, and return its tensors on the device."""
        near, arrived = store.pop(group)
        main.wait_event(arrived)
        return near

    def _drop(self, store: dict[_Group, tuple[list[Tensor], Any]], main: Any) -> None:
        for group in list(store):
            self._take(store, group, main)

    def _groups(self, live: Mapping[str, nn.Parameter]) -> list[_Group]:
        groups: list[_Group] = []
        names: list[str] = []
        size = 0
        for name, parameter in live.items():
            names.append(name)
            size += local(parameter).nbytes
            if size >= self._group_bytes:
                groups.append(tuple(names))
                names, size = [], 0
        return [*groups, tuple(names)] if names else groups


def hidden_copies(
    live: Iterable[nn.Parameter], device: torch.device | None, before: HiddenCopies | None
) -> HiddenCopies | None:
    """Return what hides the copies; ``None`` if there are none between a GPU and the CPU.

    Args:
        live: the parameters that are interpolated.
        device: device of the anchor. ``None`` is the device of each parameter.
        before: the result of an earlier call, which is returned again.
    """
    devices = {local(parameter).device for parameter in live}
    if device is None or device.type != "cpu" or len(devices) != 1:
        return None
    (own,) = devices
    if own.type != "cuda":
        return None
    is_same = before is not None and before.device == own
    return before if is_same else HiddenCopies(CudaLanes(own))


@contextmanager
def after_half(
    parameters: list[nn.Parameter], backwards: int, action: Callable[[], None]
) -> Iterator[None]:
    """Call an action in the second half of the last backward pass in a ``with`` block.

    Hooks on a few parameters count their gradients. The action is called when half of these
    parameters have their last gradient, and again at each further gradient. The action is never
    called if gradients don't reach these parameters one by one, for example under FSDP2.

    Args:
        parameters: the parameters that get gradients.
        backwards: number of backward passes in the block.
        action: a function without arguments.
    """
    # A parameter can have been frozen since the last interpolation.
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    watched = trained[:: -(-len(trained) // _HOOKS)] if trained else []
    calls = dict.fromkeys(map(id, watched), 0)

    def count(parameter: Tensor) -> None:
        calls[id(parameter)] += 1
        if sum(number == backwards for number in calls.values()) * 2 >= len(calls):
            action()

    hooks = [p.register_post_accumulate_grad_hook(count) for p in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    foreach._foreach_copy_(targets, sources, non_blocking=True)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
