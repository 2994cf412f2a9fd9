"""Interpolation of many tensors: pieces, special values, and pairs that are not checked again."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openvclip import interpolate
from openvclip.weights import lerp as lerp_module
from openvclip.weights.lerp import lerp
from tests.helpers import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 3.0, 3e38, -3e38)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pieces that are checked for NaN and infinity, in pieces of 16 elements."""
    sizes: list[int] = []
    probe = lerp_module.finite_probe

    def counted(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return probe(tensor)

    monkeypatch.setattr(lerp_module, "finite_probe", counted)
    monkeypatch.setattr(lerp_module, "_PIECE", 16)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    special=st.lists(
        st.tuples(st.integers(0, 400), st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)),
        max_size=3,
    ),
    lams=st.lists(st.integers(1, 15), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_equals_the_equation_for_all_sizes_and_values(
    dtype: torch.dtype,
    sizes: list[int],
    special: list[tuple[int, float, float]],
    lams: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    whole_a, whole_b = (torch.randn(sum(sizes)).to(dtype) for _ in range(2))
    for place, x, y in special:
        if len(whole_a):
            largest = torch.finfo(dtype).max
            for whole, value in ((whole_a, x), (whole_b, y)):
                beyond = math.isfinite(value) and abs(value) > largest
                whole[place % len(whole)] = math.copysign(largest, value) if beyond else value
    out = torch.full_like(whole_a, 7.0)
    parts = [tensor.split(sizes) for tensor in (out, whole_a, whole_b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lerp_module, "_PIECE", 16)
        for lam in lams:  # from the second on, finite pairs are known
            lerp([(*tensors, lam / 16) for tensors in zip(*parts, strict=True)])
            require_equation(out, whole_a, whole_b, lam / 16)


def require_equation(out: Tensor, a: Tensor, b: Tensor, lam: float) -> None:
    """Require the equation in float64, rounded once. Equal values stay as they are."""
    wide = lam * a.double() + (1.0 - lam) * b.double()
    expected = torch.where(a == b, a, wide.to(a.dtype))
    finite = torch.isfinite(expected)
    assert same_bits(out[~finite].isnan(), expected[~finite].isnan())
    infinite = expected.isinf()
    assert torch.equal(out[infinite], expected[infinite])
    torch.testing.assert_close(out[finite], expected[finite])
    same = finite & (a == b)
    assert same_bits(out[same].abs(), a[same].abs())


def test_a_finite_pair_is_checked_once(probes: list[int]) -> None:
    a, b, out = torch.zeros(40), torch.ones(40), torch.empty(40)
    lerp([(out, a, b, 0.25)])
    assert sum(probes) == 40
    for lam in (0.5, 0.75):
        lerp([(out, a, b, lam)])
        assert torch.equal(out, torch.full((40,), 1.0 - lam))
    assert sum(probes) == 40


@pytest.mark.parametrize("lam", [-0.5, 1.5])
def test_an_extrapolation_is_always_checked(probes: list[int], lam: float) -> None:
    """The difference of such values is finite, but not the result."""
    a, b, out = torch.full((4,), -1.5e38), torch.full((4,), 1.5e38), torch.empty(4)
    lerp([(out, a, b, 0.5)])
    checked = len(probes)
    lerp([(out, a, b, lam)])
    assert len(probes) > checked


@pytest.mark.parametrize("changed", [0, 1], ids=["a", "b"])
@pytest.mark.parametrize("memory", ["same", "other"])
def test_a_pair_with_one_recorded_change_is_checked_again(changed: int, memory: str) -> None:
    pair = [torch.zeros(40), torch.ones(40)]
    out = torch.empty(40)
    lerp([(out, *pair, 0.25)])
    pair[1 - changed].data[3] = -math.inf  # not recorded
    if memory == "same":
        pair[changed][3] = -math.inf
    else:
        pair[changed].data = torch.full((40,), -math.inf)
    lerp([(out, *pair, 0.25)])
    assert out[3] == -math.inf


@pytest.mark.parametrize("order", [0, 1])
def test_a_known_pair_does_not_hide_another_pair_with_the_same_tuned_model(order: int) -> None:
    a, mask = torch.zeros(40), torch.full((40,), -math.inf)
    tuned = torch.ones(40)
    lerp([(torch.empty(40), a, tuned, 0.5)])
    out, other = torch.empty(40), torch.empty(40)
    jobs = [(out, a, tuned, 0.5), (other, mask, tuned, 0.5)]
    lerp(jobs[::-1] if order else jobs)
    assert torch.equal(out, torch.full((40,), 0.5))
    assert torch.equal(other, mask)


@settings(max_examples=20, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=6),
    sizes=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    changed=st.integers(0, 5),
)
def test_a_change_of_one_pair_of_many_is_noticed(
    dtypes: list[torch.dtype], sizes: list[int], changed: int
) -> None:
    """The tensors of all dtypes are compared at once."""
    pairs = [
        [torch.full((size,), value, dtype=dtype) for value in (-1.0, 1.0)]
        for dtype, size in zip(dtypes, sizes, strict=False)
    ]
    jobs = [(torch.empty_like(a), a, b, 0.25) for a, b in pairs]
    lerp(jobs)
    a, b = pairs[changed % len(pairs)]
    largest = torch.finfo(a.dtype).max
    a.data.fill_(-largest)  # not recorded; the difference overflows
    b.data.fill_(largest)
    lerp(jobs)
    for out, x, y, lam in jobs:
        torch.testing.assert_close(out, (lam * x.double() + (1 - lam) * y.double()).to(out.dtype))


def test_a_pair_with_infinities_is_never_remembered(probes: list[int]) -> None:
    mask, out = torch.full((20,), -math.inf), torch.empty(20)
    for lam in (0.2, 0.4, 0.6):
        lerp([(out, mask, mask.clone(), lam)])
        assert out.eq(-math.inf).all()


def test_a_mask_with_infinities_does_not_make_other_pairs_unknown(probes: list[int]) -> None:
    mask, a, b = torch.full((20,), -math.inf), torch.zeros(40), torch.ones(40)
    other, out, masked = mask.clone(), torch.empty(40), torch.empty(20)
    jobs = [(masked, mask, other, 0.5), (out, a, b, 0.5)]
    lerp(jobs)
    first = sum(probes)
    lerp(jobs)
    assert (first, sum(probes)) == (60, 80)  # the mask alone is checked again
    assert torch.equal(masked, mask)
    assert torch.equal(out, torch.full((40,), 0.5))


def test_a_known_pair_within_autocast_of_another_half_precision() -> None:
    a, b = torch.zeros(40, dtype=torch.float16), torch.ones(40, dtype=torch.float16)
    out = torch.empty_like(a)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):  # the second call compares elements of the known pair
            lerp([(out, a, b, 0.5)])
    assert torch.equal(out, torch.full_like(out, 0.5))


@pytest.mark.parametrize("how", ["fused optimizer", "data", "numpy"])
def test_a_pair_with_changes_that_pytorch_does_not_record(how: str) -> None:
    model = torch.nn.Linear(30, 40, bias=False)
    original = torch.full((40, 30), 3e38)
    tuned = model.state_dict()["weight"]
    out = torch.empty(40, 30)
    lerp([(out, original, tuned, 0.5)])
    if how == "fused optimizer":
        model.weight.grad = torch.full((40, 30), 3e38)
        torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step()
    elif how == "data":
        tuned.data.fill_(-3e38)
    else:
        tuned.numpy()[:] = -3e38
    lerp([(out, original, tuned, 0.5)])
    assert out.abs().max() < 1e32  # the difference of the two tensors is infinite


@torch.inference_mode()
def test_inference_tensors_are_checked_each_time(probes: list[int]) -> None:
    a, b, out = torch.zeros(20), torch.ones(20), torch.empty(20)
    for _ in range(2):
        lerp([(out, a, b, 0.5)])
    assert sum(probes) == 40


def test_nothing_is_kept_alive() -> None:
    a, b = torch.zeros(20), torch.ones(20)
    lerp([(torch.empty(20), a, b, 0.5)])
    gc.collect()  # pairs of other tests
    known = len(lerp_module._known)
    del b
    gc.collect()
    assert len(lerp_module._known) == known - 1


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_that_are_not_contiguous(inference: bool) -> None:
    with torch.inference_mode(inference):
        a, b = torch.randn(9, 40).t(), torch.randn(40, 18)[:, ::2]
        a[39, 8] = b[39, 8] = -math.inf
        out = torch.empty(9, 40).t()
        lerp([(out, a, b, 0.25)])
        torch.testing.assert_close(out, 0.25 * a + 0.75 * b)


def test_pieces_of_their_real_size() -> None:
    a, b = torch.randn(2, 3 * 2**19 + 5).unbind()
    for place in (2**19 - 1, 2**19, len(a) - 1):
        a[place] = b[place] = math.inf
    out = interpolate({"w": a}, {"w": b}, 0.7)["w"]
    broken = ~torch.isfinite(a)
    assert out[broken].eq(math.inf).all()
    assert same_bits(out[~broken], torch.lerp(b, a, 0.7)[~broken])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_equal_complex_infinities_stay(dtype: torch.dtype) -> None:
    values = [complex(math.inf, 0), complex(1, -math.inf), complex(-math.inf, math.inf), 1 + 2j]
    a, b = torch.tensor(values, dtype=dtype), torch.tensor(values, dtype=dtype)
    for left in (a, a.conj().clone().conj()):
        out = torch.empty(4, dtype=dtype)
        lerp([(out, left, b, 0.25)])
        assert torch.equal(torch.view_as_real(out), torch.view_as_real(b))
