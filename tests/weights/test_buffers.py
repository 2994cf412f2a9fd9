"""Buffers that a forward pass updates: a step leaves what the pass at the weights makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer
from openvclip.weights.buffers import keeping_buffers
from tests.helpers import Net, assert_same_state, batch, cross_entropy, same_bits, snapshot


class Codebook(nn.Module):
    """Vector quantisation whose codebook moves in the forward pass, written through ``.data``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, 4))
        self.register_buffer("started", torch.tensor(False))
        self.codes: Tensor
        self.started: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.started:
            self.codes.data.copy_(x[:3].detach())
            self.started.data.fill_(True)
        nearest = torch.cdist(x, self.codes).argmin(dim=1)
        if self.training:
            for code in range(3):
                mean = x[nearest == code].detach().mean(dim=0).nan_to_num()
                self.codes.data[code].mul_(0.9).add_(mean, alpha=0.1)
        return x + (self.codes[nearest] - x).detach()


class Counter(nn.Module):
    """Replaces its buffer instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return x - self.mean


class Cache(nn.Module):
    """A table that grows with the input, and a number that says how long the table is."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.register_buffer("table", torch.zeros(0, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("table", x.detach().clone(), persistent=False)
        return x + self.table[: len(x)]


class Late(nn.Module):
    """Registers a buffer in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unset", None)
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().mean(dim=0))
        if self.unset is None:
            self.unset = x.detach().std(dim=0)
        return (x - self.first) / (self.unset + self.one)


class Sequences(nn.Module):
    """Instance norm with running statistics, which needs ``[B, C, L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 2, 2)).flatten(1)


def _old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(4, 4))


def _quantised() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(
            nn.Linear(4, 4),
            quantization.default_qat_qconfig.activation(),
            quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver),
        )


def _observer() -> nn.Module:
    observer = pytest.importorskip("torch.ao.quantization.observer")
    return nn.Sequential(observer.PerChannelMinMaxObserver(ch_axis=1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm without momentum": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch norm in eval mode": lambda: nn.BatchNorm1d(4).eval(),
    "instance norm": Sequences,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "old spectral norm": _old_spectral_norm,
    "fake quantisation": _quantised,
    "an observer that is resized": _observer,
    "codebook": Codebook,
    "replaced": Counter,
    "a growing cache": Cache,
    "registered late": Late,
}


class Around(nn.Module):
    """``[B, 4] -> [B, 2]``, with a layer between two linear layers."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.middle = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))


def far_anchor(model: nn.Module) -> dict[str, Tensor]:
    return {n: 3 * p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_buffers()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("loop", ["step", "block first", "block last"])
def test_buffers_are_those_of_plain_training(kind: str, loop: str) -> None:
    # Reports 08 (davda54/sam#17) and 38: both passes moved the statistics, 0.68 for 0.33.
    model, plain = Around(LAYERS[kind]), Around(LAYERS[kind])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    iwr = InterpolatedWeightRegularizer(
        model, optimizer, anchor=far_anchor(model), interval=(0.5, 0.5)
    )

    def second(step: int) -> None:
        with iwr.interpolated():
            cross_entropy(model, step).backward()

    for step in range(3):
        cross_entropy(plain, step).backward()
        if loop == "step":
            iwr.step(lambda step=step: cross_entropy(model, step))  # type: ignore[misc]
        else:
            if loop == "block first":
                second(step)
            cross_entropy(model, step).backward()
            if loop == "block last":
                second(step)
            optimizer.zero_grad()
        assert_same_state(buffers(model), buffers(plain))
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert module.training == other.training
        assert module._non_persistent_buffers_set == other._non_persistent_buffers_set


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_the_first_step_has_the_statistics_of_a_plain_step_at_any_learning_rate(lr: float) -> None:
    # Report 08 (davda54/sam#17).
    model, plain = Net(), Net()
    iwr = InterpolatedWeightRegularizer(
        model, torch.optim.SGD(model.parameters(), lr=lr), anchor=far_anchor(model)
    )
    iwr.step(lambda: cross_entropy(model))
    cross_entropy(plain)
    assert_same_state(buffers(model), buffers(plain))


def test_buffers_around_the_model_are_kept_if_the_wrapper_is_known() -> None:
    model = nn.Linear(4, 4)
    wrapper, plain = (nn.Sequential(m, nn.BatchNorm1d(4)) for m in (model, nn.Linear(4, 4)))
    plain[0].load_state_dict(model.state_dict())
    iwr = InterpolatedWeightRegularizer(
        model,
        torch.optim.SGD(wrapper.parameters(), lr=0.0),
        wrapper=wrapper,
        anchor=far_anchor(model),
    )
    iwr.step(lambda: wrapper(batch()[0]).square().sum())
    plain(batch()[0])
    assert_same_state(buffers(wrapper), buffers(plain))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_buffers_of_a_compiled_model(backend: str) -> None:
    model, plain = Net(), Net()
    compiled: Any = torch.compile(model, backend=backend)
    iwr = InterpolatedWeightRegularizer(
        compiled, torch.optim.SGD(model.parameters(), lr=0.0), anchor=far_anchor(model)
    )
    for step in range(2):
        iwr.step(lambda step=step: cross_entropy(compiled, step))  # type: ignore[misc]
        cross_entropy(plain, step)
    assert_same_state(buffers(model), buffers(plain))


def test_the_buffers_stay_the_same_objects_after_an_error() -> None:
    model = Net()
    objects, before = dict(model.named_buffers()), snapshot(model)
    iwr = InterpolatedWeightRegularizer(model, anchor=far_anchor(model))
    with pytest.raises(ZeroDivisionError), iwr.interpolated():  # noqa: PT012
        model(batch()[0])
        model.norm.running_mean = torch.full((6,), torch.nan)
        raise ZeroDivisionError
    assert_same_state(model.state_dict(), before)
    assert all(model.get_buffer(name) is buffer for name, buffer in objects.items())


@pytest.mark.parametrize(
    "buffer",
    [
        torch.arange(3).expand(2, 3),  # nothing can write to it
        torch.empty(0, 4),
        torch.tensor(True),
        torch.tensor([float("nan"), -0.0]),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(4).to(torch.float8_e4m3fn),
        torch.empty(3, device="meta"),
    ],
    ids=lambda value: f"{value.dtype}, {value.layout}, {value.device.type}",
)
def test_buffers_of_any_kind(buffer: Tensor) -> None:
    module = nn.Module()
    module.register_buffer("entry", buffer)
    with keeping_buffers([module]):
        pass
    assert module.entry is buffer


def test_buffers_made_in_inference_mode() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("entry", torch.ones(2))
    with keeping_buffers([module]):
        pass


def test_flags_stay_where_no_buffer_was_replaced() -> None:
    """Numbers that a loop keeps on its modules are its own."""
    model = Net()
    model.norm.calls = 0  # type: ignore[assignment]
    with keeping_buffers([model]):
        model(batch()[0])
        model.norm.calls += 1  # type: ignore[operator]
        model.eval()
    assert model.norm.calls == 1
    assert not model.training
    assert same_bits(model.norm.running_mean, torch.zeros(6))  # type: ignore[arg-type]
    assert functional.relu(model(batch()[0])).shape == (6, 2)
