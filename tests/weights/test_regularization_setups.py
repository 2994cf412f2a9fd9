"""InterpolatedWeightRegularizer: device of the anchor, float16, shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.weights.anchor import empty_stash, to_anchor_device
from tests.helpers import Net, Smooth, assert_same_state, batch, cross_entropy, same_bits, snapshot

# --- anchor_device -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_kept_on_the_cpu_changes_no_bit(dtype: torch.dtype) -> None:
    models = []
    for device in (None, "cpu", torch.device("cpu")):
        model = Net(0).to(dtype)
        iwr = InterpolatedWeightRegularizer(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.1),
            anchor=snapshot(Net(1)),
            anchor_device=device,
        )
        for step in range(3):
            iwr.step(lambda m=model, step=step: cross_entropy(m, step, dtype))  # type: ignore[misc]
        models.append(model.state_dict())
    assert_same_state(models[1], models[0])
    assert_same_state(models[2], models[0])


def test_entries_that_are_interpolated_one_by_one_change_no_bit() -> None:
    """With one wider anchor, no entry uses the foreach path, as with an anchor elsewhere."""
    together, apart = Smooth(0), Smooth(0)
    anchor = snapshot(Smooth(1))
    wider = anchor | {"scale": anchor["scale"].double()}
    first, second = (
        InterpolatedWeightRegularizer(model, anchor=theta, interval=(0.3, 0.3))
        for model, theta in ((together, anchor), (apart, wider))
    )
    before = snapshot(together)
    with first.interpolated(), second.interpolated():
        for name in before.keys() - {"scale"}:
            value = together.state_dict()[name]
            assert not same_bits(before[name], value), name
            assert same_bits(apart.state_dict()[name], value), name


def test_nothing_is_page_locked_or_copied_where_all_is_on_the_cpu() -> None:
    value, beside = torch.rand(3), torch.rand(3)
    assert to_anchor_device(value, torch.device("cpu"), beside, copy=False) is value
    assert not empty_stash(beside, torch.device("cpu")).is_pinned()


class Copies(TorchFunctionMode):
    """Report some tensors as page-locked, and record which copies are asynchronous."""

    def __init__(self, pinned: Iterable[Tensor]) -> None:
        super().__init__()
        self.pinned = {id(tensor) for tensor in pinned}
        self.asked: list[tuple[set[int], bool]] = []  # for each copy: its tensors, and non_blocking

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.is_pinned:
            return id(args[0]) in self.pinned
        if kwargs and "non_blocking" in kwargs:
            flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            self.asked.append(({id(x) for x in flat}, kwargs["non_blocking"]))
        return func(*args, **(kwargs or {}))

    def of(self, tensors: Iterable[Tensor]) -> list[bool]:
        """Return ``non_blocking`` of each copy from or to any of these tensors."""
        wanted = {id(tensor) for tensor in tensors}
        return [free for copied, free in self.asked if wanted & copied]


@pytest.mark.parametrize("anchor_pinned", [False, True])
@pytest.mark.parametrize("stash_pinned", ["none", "all but one", "all"])
def test_copies_are_not_waited_for_where_the_memory_is_page_locked(
    anchor_pinned: bool, stash_pinned: str
) -> None:
    model = Smooth(0)
    wider = {
        n: v.double() for n, v in snapshot(Smooth(1)).items()
    }  # so entries are copied one by one
    iwr = InterpolatedWeightRegularizer(model, anchor=wider, anchor_device="cpu")
    before = snapshot(model)
    with iwr.interpolated():
        pass  # allocates the stash
    anchor, stash = list(iwr._weights.anchor.values()), list(iwr._weights.stash.values())
    pinned = {"none": [], "all but one": stash[1:], "all": stash}[stash_pinned]
    with Copies([*pinned, *(anchor if anchor_pinned else [])]) as copies, iwr.interpolated():
        assert not same_bits(model.state_dict()["first.weight"], before["first.weight"])
    assert copies.of(stash) == [stash_pinned == "all"] * 2  # one copy to the stash, one back
    assert copies.of(anchor) == [anchor_pinned] * len(anchor)
    assert_same_state(model.state_dict(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_cpu_keeps_page_locked_memory_and_changes_no_bit(dtype: torch.dtype) -> None:
    models = []
    for device in (None, "cpu"):
        model = Net(0).to("cuda", dtype)
        iwr = InterpolatedWeightRegularizer(
            model,
            torch.optim.AdamW(model.parameters(), lr=0.1),
            anchor=snapshot(Net(1)),
            anchor_device=device,
        )

        def loss(step: int, model: nn.Module = model) -> Tensor:
            x, y = batch(step, dtype=dtype)
            return functional.cross_entropy(model(x.cuda()), y.cuda())

        for step in range(5):
            iwr.step(lambda step=step: loss(step))  # type: ignore[misc]
        models.append(model.state_dict())
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt), iwr.interpolated():
            raise KeyboardInterrupt
        assert_same_state(model.state_dict(), before)
        copies = [*iwr._weights.anchor.values(), *iwr._weights.stash.values()]
        assert bool(iwr._weights.stash) == (device == "cpu")
        assert {tensor.is_pinned() for tensor in copies} == {device == "cpu"}
        assert {tensor.device.type for tensor in copies} == {device or "cuda"}
    assert_same_state(models[1], models[0])


# --- float16 -----------------------------------------------------------------------------------


def test_float16_gradients_that_overflow_are_skipped_until_the_scale_fits(
    device: torch.device,
) -> None:
    model = Smooth()
    iwr = InterpolatedWeightRegularizer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), anchor=snapshot(Smooth(1))
    )
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)
    before = snapshot(model)

    def closure() -> Tensor:
        with torch.autocast(device.type, torch.float16):
            return cross_entropy(model)

    scales = []
    for _ in range(30):
        moved = snapshot(model)
        scale = scaler.get_scale()
        iwr.step(closure, scaler=scaler, max_grad_norm=1.0)
        if scaler.get_scale() < scale:
            assert_same_state(model.state_dict(), moved)
        scales.append(scaler.get_scale())
    assert scales[0] == 2.0**23  # a gradient near 1 times 2^24 overflows in float16
    assert scales[-1] == scales[-2]
    assert not same_bits(model.second.weight, before["second.weight"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_skipped_steps_count_like_others_for_alpha_and_the_average(device: torch.device) -> None:
    model, steps = Smooth(), 16
    iwr = InterpolatedWeightRegularizer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), anchor=snapshot(Smooth(1))
    )
    swa, scaler = SWATracker(model), torch.amp.GradScaler(device.type, init_scale=2.0**24)

    def closure() -> Tensor:
        with torch.autocast(device.type, torch.float16):
            return cross_entropy(model)

    skipped, total = 0, {n: torch.zeros(p.shape).double() for n, p in model.named_parameters()}
    for _ in range(steps):
        scale = scaler.get_scale()
        iwr.step(closure, scaler=scaler)
        assert swa.update(model)
        skipped += scaler.get_scale() < scale
        for name, parameter in model.named_parameters():
            total[name] += parameter.detach()
    assert 0 < skipped < steps
    probe = InterpolatedWeightRegularizer(Smooth())
    for _ in range(steps):
        with probe.interpolated():
            pass
    assert torch.equal(iwr.state_dict()["generator"], probe.state_dict()["generator"])
    for name, value in swa.averaged_state_dict().items():
        torch.testing.assert_close(value.double(), total[name] / steps, rtol=1e-6, atol=1e-7)


# --- shared parameters -------------------------------------------------------------------------


class Tied(nn.Module):
    """``[B, 4] -> [B, 2]`` with one weight in two layers, under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_shared_parameters_are_those_of_equation_7(compiled: bool) -> None:
    model, anchor, alpha, c = Tied(0), snapshot(Tied(1)), 0.4, 0.8
    x, y = batch(dtype=torch.float64)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    second = {n: alpha * anchor[n] + (1.0 - alpha) * p for n, p in theta.items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (x,)), y)

    (loss(theta) + c / (1.0 - alpha) * loss(second)).backward()

    called: Any = torch.compile(model, backend="eager") if compiled else model
    iwr = InterpolatedWeightRegularizer(
        called,
        torch.optim.SGD(model.parameters(), lr=0.0),
        anchor=anchor,
        interval=(alpha, alpha),
        weight=c,
    )
    iwr.step(lambda: functional.cross_entropy(called(x), y))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theta[name].grad, rtol=1e-10, atol=1e-12)
