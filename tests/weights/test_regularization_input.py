"""InterpolatedWeightRegularizer: valid and invalid anchors, losses and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from openvclip import InterpolatedWeightRegularizer
from openvclip.errors import LossError, RegularizationError, StateMismatchError, UsageError
from tests.helpers import Net, Smooth, assert_same_state, batch, cross_entropy, same_bits, snapshot

# --- the anchor --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", "state_dict", "parameters"])
def test_the_live_weights_as_anchor_are_a_snapshot(how: str) -> None:
    model = Smooth()
    original = snapshot(model)
    anchor = {
        "none": None,
        "state_dict": model.state_dict(),
        "parameters": dict(model.named_parameters()),
    }[how]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=anchor)
    for step in range(3):
        iwr.step(lambda step=step: cross_entropy(model, step))  # type: ignore[misc]
    assert not same_bits(model.second.weight, original["second.weight"])
    iwr.load_state_dict(iwr.state_dict() | {"interval": (1.0, 1.0)})
    with iwr.interpolated() as alpha:
        assert alpha == 1.0
        assert_same_state(model.state_dict(), original)


def test_parameters_that_the_anchor_lacks() -> None:
    model = Smooth()
    anchor = {n: v for n, v in snapshot(Smooth(1)).items() if n != "scale"}
    with pytest.raises(StateMismatchError, match="missing='skip'") as caught:
        InterpolatedWeightRegularizer(model, anchor=anchor)
    assert caught.value.missing == ["scale"]
    assert caught.value.unexpected == []
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, missing="skip", interval=(0.5, 0.5))
    before = snapshot(model)
    with iwr.interpolated():
        assert same_bits(model.scale, before["scale"])
        assert not same_bits(model.second.weight, before["second.weight"])
    with pytest.raises(StateMismatchError):  # no parameter has an anchor
        InterpolatedWeightRegularizer(model, anchor={}, missing="skip")


def test_frozen_parameters_and_buffers_may_be_absent_from_the_anchor_or_differ() -> None:
    model = Net()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    InterpolatedWeightRegularizer(model, anchor=trained)
    InterpolatedWeightRegularizer(model, anchor=trained | {"frozen.weight": torch.zeros(9)})


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_names_and_shapes_that_do_not_fit(missing: str) -> None:
    anchor = snapshot(Smooth()) | {"other": torch.zeros(1), "first.bias": torch.zeros(7)}
    with pytest.raises(StateMismatchError) as caught:
        InterpolatedWeightRegularizer(Smooth(), anchor=anchor, missing=missing)  # type: ignore[arg-type]
    assert caught.value.unexpected == ["other"]
    assert caught.value.mismatched == [("first.bias", (6,), (7,))]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str) -> None:
    model = Smooth()
    anchor = {prefix + name: value for name, value in snapshot(Smooth(1)).items()}
    iwr = InterpolatedWeightRegularizer(nn.DataParallel(model), anchor=anchor, interval=(1.0, 1.0))
    with iwr.interpolated():
        assert same_bits(model.second.weight, anchor[prefix + "second.weight"])


def test_a_model_whose_only_child_is_called_module() -> None:
    class Box(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Smooth()

    model = Box()
    anchor = snapshot(model)
    InterpolatedWeightRegularizer(model, anchor=anchor)


def test_tied_parameters_move_once() -> None:
    model = Smooth()
    model.extra = nn.Linear(4, 6)  # type: ignore[assignment]
    model.extra.weight = model.first.weight
    anchor = snapshot(model)
    for value in anchor.values():
        value.zero_()
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(0.5, 0.5))
    before = model.first.weight.detach().clone()
    with iwr.interpolated():
        torch.testing.assert_close(model.first.weight.detach(), 0.5 * before)
    assert same_bits(model.first.weight, before)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"interval": (0.6, 0.0)}, r"interval=\(0.6, 0.0\): expected .*0 <= low <= high <= 1"),
        ({"interval": (-0.1, 0.5)}, "interval"),
        ({"interval": (0.0, 1.1)}, "interval"),
        ({"interval": (0.0, float("nan"))}, "interval"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": float("nan")}, "weight"),
        ({"every": 0}, "every=0"),
        ({"share": 0.0}, r"share=0.0: expected a number in \(0, 1\]"),
        ({"share": 1.01}, "share=1.01"),
        ({"share": float("nan")}, "share=nan"),
        ({"missing": "ignore"}, "missing='ignore'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], text: str) -> None:
    with pytest.raises(RegularizationError, match=text):
        InterpolatedWeightRegularizer(Smooth(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda model: 1.5, "returned float; expected the loss, a scalar tensor"),
        (lambda model: None, "returned NoneType"),
        (lambda model: model(batch()[0]), r"shape \[6, 2\]; expected a scalar"),
        (lambda model: cross_entropy(model).detach(), "no graph"),
    ],
)
@pytest.mark.parametrize("call", [1, 2])
def test_a_loss_that_is_none(loss: Any, text: str, call: int) -> None:
    model = Smooth()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)))
    losses = [cross_entropy, loss] if call == 2 else [loss]
    with pytest.raises(LossError, match=text):
        iwr.step(lambda: losses.pop(0)(model))
    assert losses == []
    assert_same_state(model.state_dict(), before)


def test_calls_in_the_wrong_state() -> None:
    model = Smooth()
    with pytest.raises(UsageError, match="needs an optimizer"):
        InterpolatedWeightRegularizer(model).step(lambda: cross_entropy(model))
    with pytest.raises(UsageError, match="No parameter"):
        InterpolatedWeightRegularizer(Smooth().requires_grad_(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    iwr = InterpolatedWeightRegularizer(model, optimizer)
    before = snapshot(model)
    with iwr.interpolated():
        with pytest.raises(UsageError, match="within interpolated"):
            iwr.step(lambda: cross_entropy(model))
        with pytest.raises(UsageError, match="can't be nested"), iwr.interpolated():
            pass
    assert_same_state(model.state_dict(), before)
    with iwr.interpolated():
        pass


# --- a wider anchor, another optimizer ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_anchor_of_a_half_precision_model_is_rounded_once(dtype: torch.dtype) -> None:
    model, anchor = Smooth(0).to(dtype), snapshot(Smooth(1))
    before = snapshot(model)
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(0.3, 0.3))
    with iwr.interpolated() as alpha:
        for name, value in model.state_dict().items():
            exact = torch.lerp(before[name].float(), anchor[name], alpha)
            assert same_bits(value, exact.to(dtype)), name
    assert_same_state(model.state_dict(), before)


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = torch.optim.SGD(Smooth().parameters(), lr=0.1)
    with pytest.raises(UsageError, match="none of the model's trained parameters"):
        InterpolatedWeightRegularizer(Smooth(), other)


@pytest.mark.parametrize("interval", [0.6, "ab", (0.1,), (0.1, 0.2, 0.3), (None, 0.5)])
def test_intervals_that_are_none(interval: Any) -> None:
    with pytest.raises(RegularizationError, match=r"expected \(low, high\)"):
        InterpolatedWeightRegularizer(Smooth(), interval=interval)


@pytest.mark.parametrize(
    "settings", [{"weight": "a"}, {"every": 1.5}, {"weight": None}, {"share": "a"}]
)
def test_settings_of_the_wrong_type(settings: dict[str, Any]) -> None:
    with pytest.raises(RegularizationError, match="expected"):
        InterpolatedWeightRegularizer(Smooth(), **settings)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_clipping_bounds_the_norm_of_the_combined_gradient(
    with_scaler: bool, device: torch.device
) -> None:
    """With SGD at lr 1, a step is the negative clipped gradient, whose direction is Equation 9."""
    model, reference = Smooth(), Smooth()
    anchor = snapshot(Smooth(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=anchor, interval=(0.4, 0.4))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0) if with_scaler else None
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    iwr.step(lambda: 50 * cross_entropy(model), scaler=scaler, max_grad_norm=0.01)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    (50 * cross_entropy(reference)).backward()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(0.4 * anchor[name] + 0.6 * p)
    (0.5 * 50 * cross_entropy(reference)).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    assert gradient.norm() > 1
    torch.testing.assert_close(moved, -0.01 * gradient / gradient.norm(), rtol=1e-4, atol=1e-7)
