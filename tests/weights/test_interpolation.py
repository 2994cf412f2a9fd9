"""interpolate: Equation 6, the ends, dtypes and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import interpolate, interpolate_into
from openvclip.errors import (
    ExtrapolationWarning,
    LambdaError,
    StateMismatchError,
    WeightTypeError,
)
from tests.helpers import Net, assert_same_state, bits, same_bits, snapshot

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ODD = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-7, -1.5, 6e4]
WEIGHTS = st.floats(0.0, 1.0, width=32)
VALUES = st.floats(-1e4, 1e4, width=32)


def equation_6(a: Tensor, b: Tensor, lam: float) -> Tensor:
    """The equation in float64, element by element."""
    out = [
        lam * x + (1.0 - lam) * y
        for x, y in zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True)
    ]
    return torch.tensor(out, dtype=torch.float64).reshape(a.shape)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
    }


# --- the equation ------------------------------------------------------------------------------


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=20), WEIGHTS)
def test_equals_the_equation(pairs: list[tuple[float, float]], lam: float) -> None:
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    got = interpolate({"w": a}, {"w": b}, lam)["w"]
    assert got.dtype == torch.float32
    bound = 4 * torch.finfo(torch.float32).eps * (a.abs() + b.abs()).double() + 1e-37
    assert ((got.double() - equation_6(a, b, lam)).abs() <= bound).all()


def test_lam_weighs_clip() -> None:
    clip, tuned = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert interpolate(clip, tuned, 0.25)["w"].tolist() == [0.75, 0.75]
    assert interpolate(tuned, clip, 0.25)["w"].tolist() == [0.25, 0.25]


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_swapping_the_ends_is_one_minus_lam(seed: int, lam: float) -> None:
    a, b = state(seed, torch.float64), state(seed + 1, torch.float64)
    one, other = interpolate(a, b, lam), interpolate(b, a, 1.0 - lam)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-13, atol=1e-13)


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_a_model_with_itself_is_bitwise_itself(seed: int, lam: float) -> None:
    for dtype in FLOATS:
        a = state(seed, dtype)
        assert_same_state(interpolate(a, dict(a), lam), a)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lam", [0, 1, 0.0, 1.0])
def test_ends_are_bitwise(dtype: torch.dtype, lam: float) -> None:
    a = {"w": torch.tensor(ODD).to(dtype), "n": torch.full((8,), math.nan, dtype=dtype)}
    b = {"w": torch.tensor(ODD[::-1]).to(dtype), "n": torch.arange(8.0).to(dtype)}
    assert_same_state(interpolate(a, b, lam), a if lam else b)


@given(
    st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2), min_size=1, max_size=20),
    st.sampled_from([0.0, 1.0]),
)
def test_ends_are_bitwise_for_every_bit_pattern(
    patterns: list[tuple[int, ...]], lam: float
) -> None:
    a, b = (torch.tensor(column, dtype=torch.int32) for column in zip(*patterns, strict=True))
    ends = {"w": a.view(torch.float32)}, {"w": b.view(torch.float32)}
    assert_same_state(interpolate(*ends, lam), ends[0] if lam else ends[1])
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(len(a)))})
    interpolate_into(model, *ends, lam)
    assert_same_state(model.state_dict(), ends[0] if lam else ends[1])


@pytest.mark.parametrize("lam", [0.25, 0.5, 0.75])
def test_infinities_follow_the_equation(lam: float) -> None:
    """A mask of -inf that both models hold must not turn into NaN."""
    a = torch.tensor([-math.inf, math.inf, 1.0, -math.inf, 3e38, 2.0])
    b = torch.tensor([-math.inf, 1.0, -math.inf, -math.inf, -3e38, 4.0])
    got = interpolate({"w": a}, {"w": b}, lam)["w"]
    torch.testing.assert_close(got.double(), equation_6(a, b, lam), rtol=1e-6, atol=0)
    live = nn.ParameterDict({"w": nn.Parameter(torch.zeros(6))})
    interpolate_into(live, {"w": a}, {"w": b}, lam)
    assert same_bits(live["w"], got)


@settings(max_examples=20, deadline=None)
@given(
    place=st.integers(0, 1200 * 1000 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
def test_an_infinity_is_found_anywhere_in_a_large_entry(
    place: int, dtype: torch.dtype, transposed: bool
) -> None:
    """Large entries are computed in pieces. One infinity among a million values must be found."""
    a, b = torch.zeros(1200, 1000, dtype=dtype), torch.ones(1200, 1000, dtype=dtype)
    for entry in (a, b):
        entry.view(-1)[place] = -math.inf
    if transposed:
        a, b = a.T, b.T
    got = interpolate({"w": a}, {"w": b}, 0.25)["w"]
    expected = torch.where(a.isinf(), -math.inf, 0.75)
    assert torch.equal(got.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(lam=WEIGHTS, seed=st.integers(0, 1000))
def test_half_precision_is_rounded_once(dtype: torch.dtype, lam: float, seed: int) -> None:
    """The exact value is rounded correctly, up to the rounding of the float32 arithmetic."""
    a, b = state(seed, dtype)["w"], state(seed + 1, dtype)["w"]
    got = interpolate({"w": a}, {"w": b}, lam)["w"]
    assert got.dtype == dtype
    exact = equation_6(a, b, lam)
    slack = 1e-6 * (a.abs() + b.abs()).double()
    assert ((exact - slack).to(dtype) <= got).all()
    assert (got <= (exact + slack).to(dtype)).all()


def test_arithmetic_in_half_precision_would_fail_the_test_above() -> None:
    a, b = state(3, torch.bfloat16)["w"], state(4, torch.bfloat16)["w"]
    naive = 0.3 * a + 0.7 * b
    assert not torch.equal(naive, interpolate({"w": a}, {"w": b}, 0.3)["w"])


# --- entries that are not floating point -------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_integers_and_booleans_come_from_theta_b(lam: float) -> None:
    a = {"n": torch.tensor(3), "flag": torch.tensor([True, False]), "w": torch.zeros(1)}
    b = {"n": torch.tensor(8), "flag": torch.tensor([False, False]), "w": torch.ones(1)}
    for dtype in (None, torch.float16):
        got = interpolate(a, b, lam, dtype=dtype)
        assert same_bits(got["n"], b["n"])
        assert same_bits(got["flag"], b["flag"])
        assert got["n"].data_ptr() != b["n"].data_ptr()


def test_complex_entries_are_interpolated() -> None:
    a, b = torch.tensor([1 + 2j, 0j]), torch.tensor([3 - 2j, 4j])
    got = interpolate({"w": a}, {"w": b}, 0.25)["w"]
    torch.testing.assert_close(got, torch.tensor([2.5 - 1j, 3j]))


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_a", "of_b", "expected"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float16, torch.float64),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_mixed_dtypes(
    of_a: torch.dtype, of_b: torch.dtype, expected: torch.dtype, lam: float
) -> None:
    a, b = state(0, of_a), state(1, of_b)
    got = interpolate(a, b, lam)
    for name in got:
        assert got[name].dtype == expected
        reference = equation_6(a[name], b[name], lam)
        torch.testing.assert_close(got[name].double(), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_dtype_argument(lam: float) -> None:
    a, b = state(0), state(1)
    exact = interpolate(a, b, lam)
    for dtype in FLOATS[:2]:
        got = interpolate(a, b, lam, dtype=dtype)
        assert all(same_bits(got[name], exact[name].to(dtype)) for name in got)
    halves = {n: v.half() for n, v in a.items()}, {n: v.half() for n, v in b.items()}
    wide = interpolate(*halves, lam, dtype=torch.float32)["w"]
    torch.testing.assert_close(
        wide.double(), equation_6(halves[0]["w"], halves[1]["w"], lam), rtol=1e-6, atol=1e-6
    )


# --- names -------------------------------------------------------------------------------------


def test_mismatch_is_one_error_with_everything() -> None:
    a = {"x.weight": torch.zeros(2, 3), "gone": torch.zeros(1), "also": torch.zeros(1)}
    b = {"x.weight": torch.zeros(3, 2), "new": torch.zeros(1)}
    with pytest.raises(StateMismatchError) as caught:
        interpolate(a, b, 0.5)
    assert str(caught.value) == (
        "theta_a and theta_b do not fit together: theta_a defines the expected names and shapes.\n"
        "Both state dicts must come from the same architecture. Prefixes of wrappers (module., "
        "_orig_mod.) are already removed from the names.\n"
        "  missing (2): also, gone\n"
        "  unexpected (1): new\n"
        "  shape of x.weight: expected [2, 3], given [3, 2]"
    )
    assert caught.value.missing == ["also", "gone"]
    assert caught.value.unexpected == ["new"]
    assert caught.value.mismatched == [("x.weight", (2, 3), (3, 2))]


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module._orig_mod.{}",
    ],
)
def test_prefixes_of_wrappers_are_stripped(wrap: str) -> None:
    plain, other = state(0), state(1)
    wrapped = {wrap.format(name): value for name, value in other.items()}
    expected = interpolate(plain, other, 0.3)
    assert_same_state(interpolate(plain, wrapped, 0.3), expected)
    assert_same_state(interpolate(wrapped, plain, 0.3), interpolate(other, plain, 0.3))


def test_wrappers_inside_a_name_and_somebodys_own_module() -> None:
    a = {"visual._orig_mod.w": torch.zeros(1), "text.module.w": torch.zeros(1)}
    b = {"visual.w": torch.ones(1), "text.module.w": torch.ones(1)}
    assert list(interpolate(a, b, 0.5)) == ["visual.w", "text.module.w"]
    partly = {"module.w": torch.zeros(1), "head": torch.zeros(1)}
    assert list(interpolate(partly, partly, 0.5)) == ["module.w", "head"]


def test_names_that_collide_without_prefixes() -> None:
    twice = {"w": torch.zeros(1), "_orig_mod.w": torch.ones(1)}
    with pytest.raises(StateMismatchError, match="Several names become the same") as caught:
        interpolate(twice, twice, 0.5)
    assert caught.value.unexpected == ["_orig_mod.w", "w"]


def test_order_of_names_does_not_matter() -> None:
    a, b = state(0), state(1)
    turned = dict(reversed(a.items()))
    assert_same_state(interpolate(turned, b, 0.3), interpolate(a, b, 0.3))


# --- inputs and outputs share nothing ----------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_inputs_are_neither_changed_nor_aliased(lam: float) -> None:
    a, b = snapshot(Net(0)), snapshot(Net(1))
    for s in (a, b):
        s["view"] = torch.arange(3.0).expand(4, 3)
        s["turned"] = torch.arange(6.0).reshape(2, 3).T
        s["nhwc"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        s["tied"] = s["body.weight"]
    before = [{n: v.clone() for n, v in s.items()} for s in (a, b)]
    got = interpolate(a, b, lam)
    pointers = {v.untyped_storage().data_ptr() for s in (a, b) for v in s.values()}
    addresses = [value.untyped_storage().data_ptr() for value in got.values()]
    assert pointers.isdisjoint(addresses)
    assert len(set(addresses)) == len(addresses)
    for value in got.values():
        assert value.is_contiguous()
        value.zero_()
    for s, copies in zip((a, b), before, strict=True):
        assert_same_state(s, copies)


def test_the_output_has_no_graph() -> None:
    a = {"w": nn.Parameter(torch.zeros(2))}
    b = {"w": nn.Parameter(torch.ones(2))}
    for lam in (0.0, 0.5, 1.0):
        value = interpolate(a, b, lam)["w"]
        assert type(value) is Tensor
        assert not value.requires_grad


# --- lam ---------------------------------------------------------------------------------------


def test_lam_by_name() -> None:
    a, b = state(0), state(1)
    seen: list[str] = []

    def lam(name: str) -> float:
        seen.append(name)
        return 1.0 if name == "scale" else 0.25

    got = interpolate({f"module.{n}": v for n, v in a.items()}, b, lam)
    assert seen == ["w", "scale"]
    assert same_bits(got["scale"], a["scale"])
    assert same_bits(got["w"], interpolate(a, b, 0.25)["w"])


@pytest.mark.parametrize("lam", [-0.5, 1.5])
def test_extrapolation_warns_once_and_follows_the_equation(lam: float) -> None:
    a, b = state(0, torch.float64), state(1, torch.float64)
    with pytest.warns(ExtrapolationWarning, match=r"outside \[0, 1\].*lam weighs theta_a") as seen:
        got = interpolate(a, b, lam)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    torch.testing.assert_close(got["w"], equation_6(a["w"], b["w"], lam))


@pytest.mark.parametrize("lam", [math.nan, math.inf, -math.inf, "half", 10**400, None, [0.5]])
def test_lam_that_is_no_number(lam: object) -> None:
    with pytest.raises(LambdaError, match="lam"):
        interpolate(state(0), state(1), lam)  # type: ignore[arg-type]
    with pytest.raises(LambdaError, match=r"lam\('w'\)"):
        interpolate(state(0), state(1), lambda _: lam)  # type: ignore[arg-type,return-value]


def test_lam_as_a_tensor() -> None:
    a, b = state(0), state(1)
    assert_same_state(interpolate(a, b, torch.tensor(0.25)), interpolate(a, b, 0.25))


# --- arguments of other types ------------------------------------------------------------------


def test_a_module_instead_of_its_state() -> None:
    with pytest.raises(WeightTypeError, match=r"theta_b: .* got a Net; pass its \.state_dict\(\)"):
        interpolate(Net().state_dict(), Net(), 0.5)  # type: ignore[arg-type]


def test_a_training_checkpoint_instead_of_its_weights() -> None:
    checkpoint = {"state_dict": state(0), "epoch": 3}
    with pytest.raises(WeightTypeError, match=r"'state_dict' holds a dict .*ckpt\['state_dict'\]"):
        interpolate(checkpoint, state(0), 0.5)  # type: ignore[arg-type]


def test_a_list_instead_of_a_mapping() -> None:
    with pytest.raises(WeightTypeError, match=r"theta_a: expected a mapping .* got list"):
        interpolate([torch.zeros(1)], state(0), 0.5)  # type: ignore[arg-type]


def test_bits_tell_zeros_and_nans_apart() -> None:
    assert not torch.equal(bits(torch.tensor(0.0)), bits(torch.tensor(-0.0)))
    assert same_bits(torch.tensor(math.nan), torch.tensor(math.nan))
