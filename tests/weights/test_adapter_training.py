"""IWR and averages of LoRA fine-tunes equal those of the merged weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional

from openvclip import EMATracker, InterpolatedWeightRegularizer, LAWATracker
from openvclip.errors import (
    EmptyAverageError,
    NonFiniteWeightsError,
    OpenVCLIPError,
    RegularizationError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
)
from openvclip.integrations.steps import load_average, state_of_average
from openvclip.weights import (
    Adapter,
    AdapterEMATracker,
    AdapterSWATracker,
    AdapterTracker,
    LowRank,
    adapter_of,
    lora_anchor,
)
from openvclip.weights.factor_gradients import unscaled_factors
from openvclip.weights.product_sums import ProductSum
from tests.helpers import same_bits
from tests.weights.lora_models import (
    State,
    base,
    close,
    copied,
    inputs,
    randomise,
    tuned,
)

KINDS = ["linear layers", "all kinds of layers", "transposed", "biases"]
# peft computes the gradient of nn.MultiheadAttention's out_proj for one of the two changes that it
# adds, so the laws of gradients are shown without this layer.
TRAINED = {
    "all kinds of layers": {"target_modules": ["linear", "embedding", "conv"]},
}


def loss_of(output: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return functional.mse_loss(output, target)


def double(kind: str) -> Any:
    """A model of peft in float64, whose factors are those of :func:`tuned` at a zero update."""
    return tuned(kind, **TRAINED.get(kind, {})).double()


# --- the regulariser -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_the_interpolated_weights_are_those_of_the_merged_model(kind: str, alpha: float) -> None:
    model = tuned(kind)
    clip = copied(base(kind))
    # Without the original weights, a bias that is trained whole has its present value as anchor.
    anchor = lora_anchor(model, clip if kind == "linear layers" else None)
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor)
    before = copied(model)
    expected = adapter_of(model).merged(clip, alpha)
    with iwr.interpolated(alpha):
        close(adapter_of(model).merged(clip), expected)
        output = model(inputs())
    plain = base(kind)
    plain.load_state_dict(expected)
    torch.testing.assert_close(output, plain(inputs()), rtol=1e-4, atol=1e-4)
    after = copied(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(same_bits(before[name], after[name]) for name in trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["", "lora_A", "lora_B"])
def test_the_gradient_is_that_of_the_merged_weights(kind: str, frozen: str) -> None:
    """The chain rule applied by hand: g(theta) + C g(theta~), pulled back to the factors."""
    alpha, weight = 0.4, 0.5
    model = double(kind)
    if frozen:
        for name, parameter in model.named_parameters():
            if f"{frozen}." in name or frozen.replace("_", "_embedding_") in name:
                parameter.requires_grad_(False)
    clip = {name: value.double() for name, value in copied(base(kind)).items()}
    if (kind, frozen) == ("biases", "lora_B"):  # the change of the bias has no other factor
        with pytest.raises(UsageError, match=r"2 changes of the adapter are frozen \(linear\.bias"):
            lora_anchor(model)
        return
    anchor = lora_anchor(model, clip)
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, weight=weight)
    with iwr.interpolated(alpha):
        (weight * loss_of(model(inputs()))).backward()
    loss_of(model(inputs())).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    measured = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    assert measured.keys() == trained.keys()

    # The same on whole weights: theta is a function of the factors, and g is taken at theta~.
    adapter = adapter_of(model, copy=False)
    theta = adapter.merged(clip)
    theta_tilde = adapter.merged(clip, alpha)
    g = whole_gradient(kind, theta)
    g_tilde = whole_gradient(kind, theta_tilde)
    total = {n: g[n] + weight * g_tilde[n] for n in adapter.names}
    for parameter in trained.values():
        parameter.grad = None
    linear_in_theta(model, total).backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(measured[name], parameter.grad, rtol=1e-9, atol=1e-12)


def whole_gradient(kind: str, theta: State) -> State:
    model = base(kind).double()
    weights = {n: v.clone().requires_grad_() for n, v in theta.items() if v.is_floating_point()}
    loss_of(functional_call(model, weights, (inputs(),))).backward()
    return {n: v.grad if v.grad is not None else torch.zeros_like(v) for n, v in weights.items()}


def linear_in_theta(model: nn.Module, total: State) -> Tensor:
    """``sum(total * theta(factors))``, whose gradient pulls ``total`` back to the factors."""
    result = torch.zeros((), dtype=torch.float64)
    for name, module in model.named_modules():
        short = name.removeprefix("base_model.model.")
        if not hasattr(module, "lora_A") or f"{short}.weight" not in total:
            continue
        result = result + (total[f"{short}.weight"] * module.get_delta_weight("default")).sum()
        if "default" in module.lora_B and module.lora_B["default"].bias is not None:
            bias = module.lora_B["default"].bias * module.scaling["default"]
            result = result + (total[f"{short}.bias"] * bias).sum()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            short = name.removeprefix("base_model.model.").replace("base_layer.", "")
            short = short.replace("modules_to_save.default.", "")
            result = result + (total[short] * parameter).sum()
    return result


def test_a_factor_that_is_frozen_later_is_not_scaled() -> None:
    """lora_B was frozen after the anchor was taken: its product is not interpolated any more."""
    model = double("linear layers")
    iwr = InterpolatedWeightRegularizer(model, anchor=lora_anchor(model), weight=1.0)
    for name, parameter in model.named_parameters():
        if "lora_B." in name:
            parameter.requires_grad_(False)
    factors = {n: p for n, p in model.named_parameters() if "lora_A." in n}

    def gradients() -> State:
        loss_of(model(inputs())).backward()
        result = {n: p.grad.clone() for n, p in factors.items() if p.grad is not None}
        model.zero_grad()
        return result

    expected = gradients()
    with iwr.interpolated(0.6):
        measured = gradients()
    assert measured.keys() == expected.keys() == factors.keys()
    for name, value in expected.items():
        torch.testing.assert_close(measured[name], value)


def test_a_step_is_that_of_the_loop() -> None:
    def run(by_hand: bool) -> State:
        model = double("linear layers")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        iwr = InterpolatedWeightRegularizer(
            model, optimizer, anchor=lora_anchor(model), interval=(0.0, 0.6), weight=0.5
        )
        for _ in range(3):
            if not by_hand:
                iwr.step(lambda: loss_of(model(inputs())))
                continue
            optimizer.zero_grad()
            alpha = iwr.draw_alpha()
            with iwr.interpolated(alpha):
                (iwr.weight * loss_of(model(inputs()))).backward()
            loss_of(model(inputs())).backward()
            optimizer.step()
        return copied(model)

    close(run(by_hand=False), run(by_hand=True), 1e-12)


def test_gradients_of_a_plain_pass_are_not_changed() -> None:
    model = double("linear layers")
    loss_of(model(inputs())).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    iwr = InterpolatedWeightRegularizer(model, anchor=lora_anchor(model))
    with iwr.interpolated(0.5):
        pass
    loss_of(model(inputs())).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected[name])


def test_the_anchor_holds_no_copy_of_the_base() -> None:
    model = tuned("all kinds of layers")
    anchor = lora_anchor(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert anchor.keys() < trained.keys()
    assert all(n.endswith("lora_A.default.weight") or "lora_embedding_A" in n
               for n in trained.keys() - anchor.keys())  # fmt: skip
    original = base("all kinds of layers")
    for name, value in anchor.items():
        if ".lora_" in name:
            assert not value.any()
        else:
            short = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            assert same_bits(value, original.state_dict()[short])


def test_what_the_regulariser_can_not_do() -> None:
    model = tuned("linear layers")
    iwr = InterpolatedWeightRegularizer(model, anchor=lora_anchor(model))
    with (
        pytest.raises(RegularizationError, match=r"alpha=1\.0: both factors"),
        iwr.interpolated(1.0),
    ):
        pass
    with pytest.raises(WeightTypeError, match=r"anchor=openvclip\.weights\.lora_anchor\(model\)"):
        InterpolatedWeightRegularizer(model)
    with pytest.raises(UsageError, match="no layers of LoRA"):
        lora_anchor(nn.Linear(2, 2))
    pissa = tuned("linear layers", init_lora_weights="pissa", bias="none")
    with pytest.raises(WeightTypeError, match="changes the weights of the base model"):
        lora_anchor(pissa)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="No factor of LoRA requires gradients"):
        lora_anchor(model)


# --- averages ------------------------------------------------------------------------------------

Weights = Callable[[int], list[float]]


def uniform(count: int) -> list[float]:
    return [1.0 / count] * count


def exponential(decay: float) -> Weights:
    def weights(count: int) -> list[float]:
        shares = [1.0]
        for _ in range(count - 1):
            shares = [decay * share for share in shares] + [1.0 - decay]
        return shares

    return weights


TRACKERS: dict[str, tuple[Callable[..., AdapterTracker], Weights]] = {
    "SWA": (AdapterSWATracker, uniform),
    "EMA": (lambda model, **s: AdapterEMATracker(model, decay=0.7, **s), exponential(0.7)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("count", [1, 2, 7])  # as factors, and as a dense sum
def test_averages_are_those_of_the_merged_weights(kind: str, name: str, count: int) -> None:
    make, weights = TRACKERS[name]
    model, clip = tuned(kind), copied(base(kind))
    tracker = make(model, every=2)
    states = []
    for seed in range(count):
        randomise(model, seed)
        assert not tracker.update(model)
        assert tracker.update(model)
        states.append(adapter_of(model).merged(clip))
    assert tracker.n_averaged == count
    shares = weights(count)
    expected = {
        n: sum((w * s[n].double() for w, s in zip(shares, states, strict=True)), torch.zeros(()))
        for n in clip
    }
    average = tracker.averaged_adapter()
    close(average.merged(clip), expected)
    assert tracker.error().relative == 0.0
    before = copied(model)
    plain = base(kind)
    plain.load_state_dict(average.merged(clip))
    with tracker.applied(model) as same:
        assert same is model
        torch.testing.assert_close(model(inputs()), plain(inputs()), rtol=1e-4, atol=1e-4)
    after = copied(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(same_bits(before[n], after[n]) for n in trained)


def test_a_warm_up_is_that_of_the_average_of_whole_weights() -> None:
    model, plain = tuned("wide"), base("wide")
    clip = copied(plain)
    tracker = AdapterEMATracker(model, decay=0.3, warmup=True)
    whole = EMATracker(plain, decay=0.3, warmup=True)
    for seed in range(6):
        randomise(model, seed)
        tracker.update(model)
        plain.load_state_dict(adapter_of(model).merged(clip))
        whole.update(plain)
    close(tracker.averaged_adapter().merged(clip), whole.averaged_state_dict())


def test_weights_that_are_not_finite_are_averaged_only_if_wanted() -> None:
    model = tuned("wide")
    trackers = [AdapterSWATracker(model), AdapterSWATracker(model, check_finite=False)]
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(NonFiniteWeightsError):
        trackers[0].update(model)
    assert trackers[1].update(model)


def test_what_was_left_out_shrinks_with_the_sum() -> None:
    products = ProductSum(max_rank=1)
    torch.manual_seed(0)
    products.add(LowRank(torch.randn(6, 4), torch.randn(4, 5)), 1.0)
    assert products.lost > 0
    lost = products.value(1.0)[1]
    products.scale(-0.5)
    assert products.value(1.0)[1] == pytest.approx(0.5 * lost)


def test_factors_without_any_anchor_are_not_scaled() -> None:
    a, b = (f"layer.lora_{part}.default.weight" for part in "AB")
    assert unscaled_factors([a, b], [b]) == [a]
    assert unscaled_factors([a, b], [a]) == [b]
    assert unscaled_factors([a, b], []) == unscaled_factors([a, b], [a, b]) == []


@pytest.mark.parametrize("name", TRACKERS)
def test_a_bounded_rank_bounds_the_memory_and_tells_the_error(name: str) -> None:
    torch.manual_seed(0)
    model = tuned("wide", r=2)
    exact, bounded = TRACKERS[name][0](model), TRACKERS[name][0](model, max_rank=4)
    largest = 0
    for seed in range(12):
        randomise(model, seed)
        exact.update(model)
        bounded.update(model)
        largest = max(largest, bounded.nbytes)
    average = bounded.averaged_adapter()
    assert average.rank <= 4
    assert largest <= 8 * (40 + 40) * 4
    clip = copied(base("wide"))
    distance = (
        exact.averaged_adapter().merged(clip)["wide.weight"] - average.merged(clip)["wide.weight"]
    )
    error = bounded.error()
    assert 0 < float(distance.norm()) <= error.lost["wide.weight"] * (1 + 1e-4)
    assert 0 < error.relative < 1
    assert "% of the change was left out (largest: wide.weight" in str(error)
    # A run whose products have a small rank loses nothing.
    tracker = TRACKERS[name][0](model, max_rank=4)
    for _ in range(6):
        tracker.update(model)
    assert tracker.error().relative < 1e-6


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("max_rank", [None, 2])
def test_a_resumed_average_is_bitwise_the_same(name: str, max_rank: int | None) -> None:
    model = tuned("all kinds of layers")
    make = TRACKERS[name][0]
    straight, first = make(model, max_rank=max_rank), make(model, max_rank=max_rank)
    for seed in range(6):
        if seed == 3:
            resumed, file = make(model), io.BytesIO()
            torch.save(state_of_average(first), file)
            file.seek(0)
            load_average(resumed, torch.load(file, weights_only=True), model)
            first = resumed
        randomise(model, seed)
        straight.update(model)
        first.update(model)
    expected, result = straight.averaged_adapter(), first.averaged_adapter()
    for entry, change in expected.updates.items():
        assert same_bits(change.up, result.updates[entry].up)
        assert same_bits(change.down, result.updates[entry].down)
    assert all(same_bits(value, result.values[n]) for n, value in expected.values.items())
    assert (first.max_rank, first.n_averaged) == (max_rank, 6)


def test_the_state_dict_of_an_average_is_that_of_a_file_of_peft() -> None:
    model = tuned("linear layers")
    tracker = AdapterSWATracker(model)
    for seed in range(2):
        randomise(model, seed)
        tracker.update(model)
    state = tracker.averaged_state_dict()
    for name, update in tracker.averaged_adapter().updates.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        product = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(product, update.product())


def test_the_average_does_not_change_with_the_training() -> None:
    model = tuned("linear layers")
    tracker = AdapterSWATracker(model)
    tracker.update(model)
    before = {n: u.product() for n, u in tracker.averaged_adapter().updates.items()}
    randomise(model, 5)
    average: Adapter = tracker.averaged_adapter()
    assert all(torch.equal(before[n], u.product()) for n, u in average.updates.items())


def test_what_trackers_refuse() -> None:
    model = tuned("linear layers")
    with pytest.raises(UsageError, match="max_rank=0: expected"):
        AdapterSWATracker(model, max_rank=0)
    with pytest.raises(UsageError, match="every=0"):
        AdapterSWATracker(model, every=0)
    with pytest.raises(UsageError, match=r"decay=1\.0"):
        AdapterEMATracker(model, decay=1.0)
    tracker = AdapterEMATracker(model, start=1)
    assert not tracker.update(model)
    with pytest.raises(EmptyAverageError, match="after 1 steps"):
        tracker.averaged_adapter()
    with pytest.raises(EmptyAverageError), tracker.applied(model):
        pass
    tracker.update(model)
    with torch.no_grad():
        model.base_model.model.linear.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(linear\.weight \(up\)\)"):
        tracker.update(model)
    assert tracker.n_averaged == 1
    with pytest.raises(StateMismatchError, match="does not train the entries"):
        tracker.update(tuned("biases"))
    with pytest.raises(StateMismatchError, match="does not train the entries"):
        tracker.check_model(tuned("biases"))
    tracker.check_model(model)
    with pytest.raises(StateMismatchError, match="not the state of a AdapterSWATracker"):
        AdapterSWATracker(model).load_state_dict(tracker.state_dict())
    with pytest.raises(StateMismatchError, match="saved average does not fit"):
        AdapterEMATracker(tuned("biases")).load_state_dict(tracker.state_dict())


@pytest.mark.parametrize("entry", ["lost", "dense", "up", "down", "scale", None])
@pytest.mark.parametrize("wrong", ["x", [1], object()])
def test_a_damaged_state_changes_nothing(entry: str | None, wrong: object) -> None:
    tracker = AdapterSWATracker(tuned("biases"))
    tracker.update(tuned("biases"))
    good = tracker.state_dict()
    (name, *_), sums = good["sums"], good["sums"]
    damaged = wrong if entry is None else {**sums[name], entry: wrong}
    with pytest.raises(OpenVCLIPError):
        tracker.load_state_dict({**good, "steps": 7, "sums": {**sums, name: damaged}})
    assert tracker.state_dict()["steps"] == 1
    assert tracker.averaged_adapter().names
    tracker.load_state_dict(good)


def test_a_saved_value_of_another_shape_is_refused() -> None:
    tracker = AdapterSWATracker(tuned("all biases"))
    tracker.update(tuned("all biases"))
    good = tracker.state_dict()
    name = next(iter(good["values"]))
    longer = {**good["values"], name: torch.zeros(99)}
    with pytest.raises(StateMismatchError, match=r"99"):
        tracker.load_state_dict({**good, "values": longer})
    tracker.load_state_dict(good)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_what_does_not_work_on_factors_is_refused_by_name(alone: None) -> None:
    """Latest weight averaging of both factors, and sharded factors."""
    model = tuned("wide")
    with pytest.raises(WeightTypeError, match=r"Or use .*AdapterSWATracker or .*AdapterEMATracker"):
        LAWATracker(model, k=2)
    fully_shard(model)
    with pytest.raises(UsageError, match=r"sharded \(fully_shard\), .*DistributedDataParallel"):
        adapter_of(model)
    with pytest.raises(UsageError, match=r"sharded \(fully_shard\), .*DistributedDataParallel"):
        AdapterSWATracker(model).update(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=lora_anchor(model))
    with pytest.raises(UsageError, match="Under fully_shard, freeze lora_A and train lora_B only"):
        iwr.step(lambda: model.base_model.model.wide(torch.ones(1, 40)).square().sum())
