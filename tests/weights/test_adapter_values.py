"""LoRA fine-tunes as values: each operation equals the same operation on the merged weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import interpolate, interpolate_into
from openvclip.errors import (
    LambdaError,
    MergeError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
)
from openvclip.merging import apply_task_vectors, average, greedy_soup, slerp, task_vector
from openvclip.weights import Adapter, LowRank, adapter_of
from openvclip.weights.low_rank import CompressionLoss
from tests.helpers import same_bits
from tests.merging.methods import MERGES
from tests.weights.lora_models import BASES, State, base, close, copied, inputs, merged, tuned

# --- one product ---------------------------------------------------------------------------------

SHAPES = [(5, 7), (7, 5), (6, 2, 2, 2), (4,)]


def update(shape: tuple[int, ...], rank: int = 3, seed: int = 0, scale: float = 1.5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.Size(shape[1:]).numel()
    up = torch.randn(shape[0], rank, generator=generator)
    return LowRank(up, torch.randn(rank, inputs, generator=generator), scale, shape)


def exact(change: LowRank) -> Tensor:
    return (change.scale * change.up.double() @ change.down.double()).reshape(change.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_float64(shape: tuple[int, ...]) -> None:
    change = update(shape)
    torch.testing.assert_close(change.product().double(), exact(change), rtol=1e-6, atol=1e-6)
    assert change.norm() == pytest.approx(float(exact(change).norm()))
    assert change.rank == 3
    rows = exact(change).reshape(shape[0], -1)[1:3]
    torch.testing.assert_close(change.rows(1, 3).double(), rows, rtol=1e-6, atol=1e-6)
    weight = torch.ones(shape, dtype=torch.bfloat16)
    merged_weight = change.merged(weight)
    assert same_bits(merged_weight, (1 + exact(change)).float().bfloat16())


@given(scales=st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_a_sum_joins_the_factors(scales: list[float]) -> None:
    changes = [update((5, 7), rank=i + 1, seed=i) for i in range(len(scales))]
    total = LowRank.total(changes, scales)
    assert total.rank == sum(change.rank for change in changes)
    expected = sum((s * exact(c) for s, c in zip(scales, changes, strict=True)), torch.zeros(5, 7))
    torch.testing.assert_close(total.product().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sum_has_the_widest_dtype_in_any_order() -> None:
    narrow, wide = update((5, 7)), update((5, 7), seed=1).to(dtype=torch.float64)
    for changes in ([narrow, wide], [wide, narrow]):
        total = LowRank.total(changes)
        assert total.up.dtype == total.down.dtype == torch.float64
        torch.testing.assert_close(total.product(), sum(map(exact, changes)))


def test_the_relative_error_compares_with_the_whole_change() -> None:
    loss = CompressionLoss({"a": 3.0, "b": 0.0}, {"a": 0.0, "b": 4.0})
    assert loss.relative == pytest.approx(3 / 5)
    assert CompressionLoss({"a": 0.0}, {"a": 0.0}).relative == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 9, 20])
def test_a_compression_is_the_best_and_tells_its_error(shape: tuple[int, ...], rank: int) -> None:
    change = LowRank.total([update(shape, 4, seed) for seed in range(3)])
    kept, lost = change.compressed(rank)
    dense = exact(change).reshape(shape[0], -1)
    values = torch.linalg.svdvals(dense)
    assert kept.rank <= max(rank, 1)
    assert kept.shape == change.shape
    assert lost == pytest.approx(float(values[rank:].norm()), abs=1e-6)
    distance = float((exact(kept).reshape(dense.shape) - dense).norm())
    assert distance == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: LowRank(torch.ones(3), torch.ones(1, 2)), WeightTypeError, "up: expected a mat"),
        (lambda: LowRank(torch.ones(3, 2), torch.ones(1, 2)), StateMismatchError, r"\[3, 2\] and"),
        (
            lambda: LowRank(torch.ones(3, 1), torch.ones(1, 2), shape=(3, 5)),
            StateMismatchError,
            r"weight of shape \[3, 5\]",
        ),
        (lambda: LowRank(torch.ones(3, 1), torch.ones(1, 2), float("nan")), MergeError, "finite"),
        (lambda: update((3, 2)).compressed(0), MergeError, "rank=0: expected a whole number"),
        (lambda: LowRank.total([]), MergeError, "0 changes and 0 weights"),
        (
            lambda: LowRank.total([update((3, 2)), update((2, 3))]),
            StateMismatchError,
            r"shapes \[\(2, 3\), \(3, 2\)\]",
        ),
        (lambda: update((3, 2)).merged(torch.ones(2, 3)), StateMismatchError, "has the shape"),
    ],
)
def test_bad_products(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


# --- whole fine-tunes ----------------------------------------------------------------------------


class Case:
    """Two fine-tunes of one base model, as adapters and as the weights that peft merges."""

    def __init__(self, kind: str) -> None:
        self.clip = copied(base(kind))
        models = [tuned(kind, seed) for seed in (1, 2)]
        self.adapters = [adapter_of(model) for model in models]
        self.merged = [merged(model) for model in models]


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def affine(parts: Mapping[float, State] | list[tuple[float, State]]) -> State:
    pairs = list(parts.items()) if isinstance(parts, Mapping) else parts
    names = pairs[0][1]
    return {n: sum((w * s[n].double() for w, s in pairs), torch.zeros(())) for n in names}  # type: ignore[misc]


def test_the_merged_weights_are_those_of_peft(case: Case) -> None:
    for adapter, expected in zip(case.adapters, case.merged, strict=True):
        close(adapter.merged(case.clip), expected)
        close(dict(adapter.on(case.clip)), expected)
        changed = {name for name in expected if not same_bits(expected[name], case.clip[name])}
        assert changed <= set(adapter.names)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_interpolation_is_that_of_the_merged_weights(case: Case, lam: float) -> None:
    adapter, clip = case.adapters[0], case.clip
    expected = affine([(lam, clip), (1 - lam, case.merged[0])])
    close(adapter.merged(clip, lam), expected)
    close(adapter.interpolated(lam, clip).merged(clip), expected)
    close(interpolate(clip, adapter, lam), expected)


def test_the_mean_is_that_of_the_merged_weights(case: Case) -> None:
    mean = Adapter.mean(case.adapters, case.clip)
    expected = affine([(0.5, state) for state in case.merged])
    close(mean.merged(case.clip), expected)
    assert mean.rank == sum(adapter.rank for adapter in case.adapters)
    whole, error = mean.compressed(mean.rank)
    assert error.relative == 0.0
    close(whole.merged(case.clip), expected)
    smaller, error = mean.compressed(2)
    assert smaller.rank <= 2
    lost = {n: (smaller.merged(case.clip)[n].double() - expected[n]).norm() for n in expected}
    total = float(torch.stack(list(lost.values())).norm())
    assert total == pytest.approx(sum(x**2 for x in error.lost.values()) ** 0.5, rel=1e-3, abs=1e-5)


def test_a_sum_keeps_the_layouts_and_modules_of_each_adapter() -> None:
    first = Adapter({"a": update((5, 7))}, {}, {"a": "transposed"}, ("head",))
    second = Adapter({"b": update((5, 7))}, {}, {"b": "embedding"}, ("head", "norm"))
    total = Adapter.total([first, second], [1.0, 1.0])
    assert total.layouts == {"a": "transposed", "b": "embedding"}
    assert total.modules_to_save == ("head", "norm")


def test_an_adapter_of_a_model_does_not_change_with_the_model() -> None:
    model = tuned("all kinds of layers")
    taken, live = adapter_of(model), adapter_of(model, copy=False)
    before = taken.merged(copied(base("all kinds of layers")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    after = taken.merged(copied(base("all kinds of layers")))
    assert all(same_bits(before[name], after[name]) for name in before)
    assert any(not torch.equal(live.updates[n].up, u.up) for n, u in taken.updates.items())


def test_task_arithmetic_is_that_of_the_merged_weights(case: Case) -> None:
    first, second = case.merged
    sum_of = Adapter.total(case.adapters, [0.7, -0.4], case.clip)
    close(sum_of.merged(case.clip), affine([(0.7, case.clip), (0.7, first), (-0.4, second)]))


METHODS: dict[str, Any] = {
    **{n: method for n, method in MERGES.items() if n != "greedy_soup"},
    "slerp": lambda clip, others: slerp(clip, others[0], 0.3),
    "interpolate": lambda clip, others: interpolate(clip, others[0], 0.3),
}


def test_merge_methods_take_adapters() -> None:
    case = Case("Hugging Face")
    for method in METHODS.values():
        close(method(case.clip, case.adapters), method(case.clip, case.merged))


def test_a_weight_may_depend_on_the_name() -> None:
    case = Case("open_clip")
    lam = {True: 0.25, False: 1.0}
    share = lambda name: lam[name.startswith("visual.")]  # noqa: E731
    expected = interpolate(case.clip, case.merged[0], share)
    close(case.adapters[0].interpolated(share).merged(case.clip), expected)
    close(case.adapters[0].merged(case.clip, share), expected)


def test_merging_into_a_model_needs_no_copy() -> None:
    case = Case("all kinds of layers")
    model = base("all kinds of layers")
    parameters = list(model.parameters())
    case.adapters[0].merge_into(model, 0.25)
    close(copied(model), affine([(0.25, case.clip), (0.75, case.merged[0])]))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    interpolate_into(model, case.clip, case.adapters[0], 0.5)
    close(copied(model), affine([(0.5, case.clip), (0.5, case.merged[0])]))


def test_entries_that_do_not_change_are_not_copied() -> None:
    case = Case("linear layers")
    merged_weights = case.adapters[0].merged(case.clip)
    same = [n for n in case.clip if merged_weights[n].data_ptr() == case.clip[n].data_ptr()]
    assert set(same) == case.clip.keys() - set(case.adapters[0].names)


def test_half_precision_is_rounded_once() -> None:
    half = {name: value.bfloat16() for name, value in copied(base("linear layers")).items()}
    adapter = adapter_of(tuned("linear layers"))
    for name, change in adapter.updates.items():
        expected = (half[name].double() + 0.75 * exact(change)).float().bfloat16()
        assert same_bits(adapter.merged(half, 0.25)[name], expected)


def test_a_part_of_a_larger_model() -> None:
    case = Case("linear layers")
    larger = {f"visual.{name}": value for name, value in case.clip.items()}
    with pytest.raises(StateMismatchError, match=r"use adapter\.prefixed\('visual\.'\)"):
        case.adapters[0].merged(larger)
    result = case.adapters[0].prefixed("visual.").merged(larger)
    close(result, {f"visual.{name}": value for name, value in case.merged[0].items()})


# --- bad input -----------------------------------------------------------------------------------


def test_what_is_missing_is_said() -> None:
    case = Case("all kinds of layers")
    adapter, other = case.adapters
    with pytest.raises(UsageError, match=r"whole values of norm\.weight .*pass base="):
        adapter.interpolated(0.5)
    with pytest.raises(MergeError, match="0 adapters and 0 scales"):
        Adapter.mean([])
    with pytest.raises(MergeError, match="2 adapters and 1 scales"):
        Adapter.total([adapter, other], [1.0])
    with pytest.raises(LambdaError, match="finite"):
        adapter.merged(case.clip, float("nan"))
    lacking = {n: v for n, v in case.clip.items() if n != "linear.weight"}
    with pytest.raises(StateMismatchError, match=r"unexpected \(1\): linear\.weight"):
        adapter.merged(lacking)
    grown = {**case.clip, "linear.weight": torch.zeros(5, 7)}
    with pytest.raises(StateMismatchError, match=r"linear\.weight: expected \[5, 7\], given"):
        interpolate(grown, adapter, 0.5)
    whole = {**case.clip, "linear.weight": torch.zeros(5, 6, dtype=torch.int8)}
    with pytest.raises(WeightTypeError, match=r"linear\.weight.*Dequantise"):
        adapter.merged({**whole, "linear.weight_scale": torch.ones(5, 1)})


@pytest.mark.parametrize(
    "call",
    [
        lambda a, clip: interpolate(a, clip, 0.5),
        lambda a, clip: average([a, a]),
        lambda a, clip: greedy_soup([clip, a], lambda _: 1.0),
        lambda a, clip: apply_task_vectors(clip, [a]),
        lambda a, clip: nn.Linear(2, 2).load_state_dict(a.merged(a)),
    ],
)
def test_an_adapter_without_its_base_is_refused(call: Callable[[Any, State], Any]) -> None:
    adapter = Adapter({"w": update((3, 2))})
    with pytest.raises(WeightTypeError, match=r"is an Adapter, .*adapter\.merged\(base\)"):
        call(adapter, {"w": torch.zeros(3, 2)})


def test_the_task_vector_of_an_adapter_is_its_change() -> None:
    adapter, clip = Adapter({"w": update((3, 2))}), {"w": torch.ones(3, 2)}
    torch.testing.assert_close(task_vector(clip, adapter)["w"], update((3, 2)).product())
    larger = dataclasses.replace(adapter, values={"w": torch.zeros(3, 2)})  # a value and a change
    torch.testing.assert_close(larger.merged(clip)["w"], update((3, 2)).product())


def test_models_without_plain_lora_are_refused() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(UsageError, match="no layers of LoRA"):
        adapter_of(nn.Linear(2, 2))
    for changes, text in (
        ({"use_dora": True}, "LoRA with DoRA"),
        ({"target_parameters": ["text_projection.weight"]}, "LoRA with target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ):
        model = tuned("Hugging Face", target_modules=["q_proj"], **changes)
        with pytest.raises(WeightTypeError, match=text):
            adapter_of(model)
    for config in (peft.LoHaConfig, peft.IA3Config, peft.LoKrConfig):
        options = {"feedforward_modules": []} if config is peft.IA3Config else {}
        model = peft.get_peft_model(
            base("linear layers"), config(target_modules=["linear"], **options)
        )
        kind = config.__name__.removesuffix("Config").upper()
        with pytest.raises(WeightTypeError, match=f"of the kind {kind}, not LoRA"):
            adapter_of(model)


def test_the_active_adapter_is_taken() -> None:
    peft = pytest.importorskip("peft")
    model = tuned("Hugging Face")
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert adapter_of(model).rank == 2
    assert adapter_of(model, "second").rank == 4
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UsageError, match="adapters default, second, and default, second active"):
        adapter_of(model)
    with pytest.raises(UsageError, match="adapter='third'"):
        adapter_of(model, "third")
    model.base_model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        adapter_of(model)


def test_the_present_scale_counts() -> None:
    model = tuned("linear layers")
    for module in (model.base_model.model.linear, model.base_model.model.plain):
        module.scale_layer(0.5)
    close(adapter_of(model).merged(copied(base("linear layers"))), merged(model))


def test_the_forward_pass_is_that_of_the_merged_weights() -> None:
    # With nn.MultiheadAttention too, whose out_proj peft changes twice.
    model = tuned("all kinds of layers")
    adapter, plain = adapter_of(model), base("all kinds of layers")
    expected = model(inputs())
    adapter.merge_into(plain)
    torch.testing.assert_close(plain(inputs()), expected, rtol=1e-4, atol=1e-4)
