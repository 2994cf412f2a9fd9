"""The merge methods equal slow float64 loops written from the papers, and obey their laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openvclip import interpolate
from openvclip.errors import LambdaError
from openvclip.merging import (
    apply_task_vectors,
    dare,
    lines,
    model_stock,
    slerp,
    task_vector,
    ties,
)
from tests.helpers import assert_same_state, same_bits

State = dict[str, Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
few_examples = settings(max_examples=15, deadline=None)


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "visual.transformer.resblocks.0.w": random(5, 3),
        "visual.transformer.resblocks.1.w": random(4, 2, 3),
        "visual.transformer.resblocks.2.b": random(7),
        "visual.proj": random(3, 3),
        "scale": random(1)[0],
        "steps": torch.tensor(seed),
    }


def floats(of: State) -> list[str]:
    return [name for name, value in of.items() if value.is_floating_point()]


def numbers(tensor: Tensor) -> list[float]:
    flat: list[float] = tensor.double().flatten().tolist()
    return flat


def assert_near(got: Tensor, expected: list[float], like: Tensor) -> None:
    """Compare up to the rounding of the entry's dtype and of the float32 arithmetic."""
    exact = torch.tensor(expected, dtype=torch.float64).reshape(like.shape)
    eps = torch.finfo(like.dtype).eps
    tight = eps if like.dtype.itemsize < 4 else 8 * eps
    assert got.dtype == like.dtype
    torch.testing.assert_close(got.double(), exact, rtol=tight, atol=max(tight / 4, 1e-15))


# --- slerp -------------------------------------------------------------------------------------


def slerp64(a: list[float], b: list[float], lam: float) -> list[float]:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    if size == 0.0 or abs(dot / size) > 0.9995:
        return [lam * x + (1 - lam) * y for x, y in zip(a, b, strict=True)]
    omega = math.acos(dot / size)
    f, g = (math.sin(t * omega) / math.sin(omega) for t in (lam, 1 - lam))
    return [f * x + g * y for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("dtype", FLOATS)
@few_examples
@given(seed=st.integers(0, 99), lam=st.floats(0.0, 1.0))
def test_slerp_equals_the_formula(dtype: torch.dtype, seed: int, lam: float) -> None:
    a, b = state(seed, dtype), state(seed + 1, dtype)
    got = slerp(a, b, lam)
    for name in floats(b):
        assert_near(got[name], slerp64(numbers(a[name]), numbers(b[name]), lam), b[name])
    assert same_bits(got["steps"], b["steps"])


def test_slerp_is_linear_where_there_is_no_arc() -> None:
    v = torch.tensor([3.0, 4.0])
    for a, b in ((v, 2 * v), (v, -v), (v, 0 * v), (0 * v, 0 * v), (v, v + 1e-3)):
        got = slerp({"w": a}, {"w": b}, 0.25)["w"]
        assert same_bits(got, interpolate({"w": a}, {"w": b}, 0.25)["w"])
    mask = torch.tensor([0.0, -math.inf])
    assert slerp({"w": mask}, {"w": mask}, 0.25)["w"].tolist() == [0.0, -math.inf]


def test_slerp_keeps_the_length_where_a_straight_line_cuts_the_corner() -> None:
    a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    assert slerp(a, b, 0.5)["w"].norm().item() == pytest.approx(2.0)
    assert interpolate(a, b, 0.5)["w"].norm().item() == pytest.approx(2.0**0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_slerp_has_bitwise_ends_and_lam_weighs_theta_a(dtype: torch.dtype) -> None:
    a, b = state(0, dtype), state(1, dtype)
    assert_same_state(slerp(a, b, 1.0), {**a, "steps": b["steps"]})
    assert_same_state(slerp(a, b, 0.0), b)
    by_name = slerp(a, b, lambda name: 1.0 if name == "scale" else 0.0)
    assert_same_state(by_name, {**b, "scale": a["scale"]})


@few_examples
@given(st.integers(0, 99), st.floats(0.0, 1.0))
def test_slerp_swapped_is_one_minus_lam(seed: int, lam: float) -> None:
    a, b = state(seed, torch.float64), state(seed + 1, torch.float64)
    one, other = slerp(a, b, lam), slerp(b, a, 1.0 - lam)
    for name in floats(a):
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


# --- task vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_task_vectors_add_negate_and_scale(dtype: torch.dtype) -> None:
    base, one, two = (state(seed, dtype) for seed in range(3))
    vectors = [task_vector(base, tuned) for tuned in (one, two)]
    assert list(vectors[0]) == floats(base)
    assert all(
        v.dtype == (dtype if dtype.itemsize > 2 else torch.float32) for v in vectors[0].values()
    )
    for scale, (f, g) in ((0.4, (0.4, 0.4)), (-1.0, (-1.0, -1.0)), ([0.3, -0.7], (0.3, -0.7))):
        got = apply_task_vectors(base, vectors, scale)
        for name in floats(base):
            columns = zip(*(numbers(s[name]) for s in (base, one, two)), strict=True)
            assert_near(
                got[name], [x + f * (y - x) + g * (z - x) for x, y, z in columns], base[name]
            )
        assert same_bits(got["steps"], base["steps"])
    back = apply_task_vectors(base, vectors[:1])
    for name in floats(base):
        assert_near(back[name], numbers(one[name]), one[name])


def test_one_scaled_task_vector_is_interpolation() -> None:
    base, tuned = state(0, torch.float64), state(1, torch.float64)
    scales = {name: 0.1 * i for i, name in enumerate(base)}
    got = apply_task_vectors(base, [task_vector(base, tuned)], scales.__getitem__)
    expected = interpolate(base, tuned, lambda name: 1.0 - scales[name])
    for name in floats(base):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_equal_infinities_make_no_change() -> None:
    base = {"mask": torch.tensor([-math.inf, 0.0, math.inf])}
    tuned = {"mask": torch.tensor([-math.inf, 1.0, math.inf])}
    assert task_vector(base, tuned)["mask"].tolist() == [0.0, 1.0, 0.0]
    for merged in (
        ties(base, [tuned], density=1.0),
        dare(base, tuned, drop=0.0),
        apply_task_vectors(base, [task_vector(base, tuned)]),
    ):
        assert merged["mask"].tolist() == [-math.inf, 1.0, math.inf]


# --- TIES --------------------------------------------------------------------------------------


def trimmed64(vector: list[float], density: float) -> list[float]:
    if density == 0.0:
        return [0.0] * len(vector)
    largest = sorted((abs(x) for x in vector), reverse=True)[: max(1, int(density * len(vector)))]
    return [x if abs(x) >= largest[-1] else 0.0 for x in vector]


def merged64(vectors: list[list[float]], base: list[float], scale: float) -> list[float]:
    """The steps 2 and 3 of TIES-Merging (elect signs, average), weight by weight."""
    out = []
    for start, column in zip(base, zip(*vectors, strict=True), strict=True):
        total = sum(column)
        sign = (total > 0) - (total < 0)
        agreeing = [x for x in column if x != 0 and ((x > 0) - (x < 0)) == sign]
        out.append(start + scale * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return out


@pytest.mark.parametrize("trim", ["tensor", "model"])
@few_examples
@given(
    seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), n=st.integers(1, 4)
)
def test_ties_equals_the_algorithm(trim: Any, seed: int, density: float, n: int) -> None:
    base, *tuned = (state(1000 * seed + i, torch.float64) for i in range(n + 1))
    got = ties(base, tuned, density=density, scale=0.7, trim=trim)
    names = floats(base)
    sizes = [base[name].numel() for name in names]
    vectors = [
        [
            [y - x for x, y in zip(numbers(base[name]), numbers(end[name]), strict=True)]
            for name in names
        ]
        for end in tuned
    ]
    if trim == "tensor":
        vectors = [[trimmed64(part, density) for part in vector] for vector in vectors]
    else:
        wholes = [trimmed64([x for part in vector for x in part], density) for vector in vectors]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        vectors = [[w[i : i + k] for i, k in zip(starts, sizes, strict=True)] for w in wholes]
    for i, name in enumerate(names):
        expected = merged64([vector[i] for vector in vectors], numbers(base[name]), 0.7)
        assert_near(got[name], expected, base[name])


@few_examples
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_ties_with_ties_and_zeros(deltas: list[list[int]]) -> None:
    """Small whole numbers give exact ties of signs, equal magnitudes and zero changes."""
    base = {"w": torch.arange(6.0)}
    tuned = [{"w": base["w"] + torch.tensor(d)} for d in deltas]
    got = ties(base, tuned, density=0.5)["w"]
    trimmed = [trimmed64([float(x) for x in d], 0.5) for d in deltas]
    assert_near(got, merged64(trimmed, base["w"].tolist(), 1.0), base["w"])


def test_ties_by_hand() -> None:
    """The columns are: equal signs, a larger negative value, a tie, a trimmed change."""
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([2.0, -9.0, 3.0, 1.0])}, {"w": torch.tensor([4.0, 5.0, -3.0, 0.5])}]
    assert ties(base, tuned, density=0.75)["w"].tolist() == [3.0, -9.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_of_one_whole_model_is_that_model(dtype: torch.dtype) -> None:
    base, tuned = state(0, dtype), state(1, dtype)
    got = ties(base, [tuned], density=1.0)
    for name in floats(base):
        assert_near(got[name], numbers(tuned[name]), tuned[name])


# --- DARE --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_dare_drops_or_rescales_each_change(dtype: torch.dtype) -> None:
    base, tuned = state(0, dtype), state(1, dtype)
    got = dare(base, tuned, drop=0.5, seed=3)
    dropped = 0
    for name in floats(base):
        rescaled = [
            x + (y - x) / 0.5
            for x, y in zip(numbers(base[name]), numbers(tuned[name]), strict=True)
        ]
        gone = (got[name] == base[name]).flatten().tolist()
        expected = [
            x if g else k for x, k, g in zip(numbers(base[name]), rescaled, gone, strict=True)
        ]
        assert_near(got[name], expected, base[name])
        dropped += sum(gone)
    assert 10 < dropped < 40  # of 56


def test_the_expectation_of_dare_is_the_fine_tuned_model() -> None:
    """The mean of n draws has a standard deviation of |delta| sqrt(p / ((1 - p) n))."""
    base, tuned = {"w": torch.zeros(50).double()}, {"w": torch.linspace(-2, 2, 50).double()}
    draws = torch.stack([dare(base, tuned, drop=0.8, seed=seed)["w"] for seed in range(2000)])
    deviation = tuned["w"].abs() * math.sqrt(0.8 / (0.2 * 2000))
    assert ((draws.mean(dim=0) - tuned["w"]).abs() <= 4.5 * deviation).all()
    assert (draws == 0).double().mean().item() == pytest.approx(0.8, abs=0.01)


def test_what_dare_drops_depends_on_seed_and_name_alone() -> None:
    base, tuned = state(0), state(1)
    torch.manual_seed(1)
    one = dare(base, tuned, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = dare(dict(reversed(base.items())), {f"module.{n}": v for n, v in tuned.items()}, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(dict(reversed(other.items())), one)
    for name in base:
        assert same_bits(dare({name: base[name]}, {name: tuned[name]}, seed=5)[name], one[name])
    assert not same_bits(dare(base, tuned, seed=6)["visual.proj"], one["visual.proj"])
    alike = {"a": torch.ones(64), "b": torch.ones(64)}
    drawn = dare({n: 0 * v for n, v in alike.items()}, alike, drop=0.5)
    assert not torch.equal(drawn["a"], drawn["b"])


def test_dare_without_drops_is_the_fine_tuned_model() -> None:
    base, tuned = state(0), state(1)
    got = dare(base, tuned, drop=0.0)
    for name in floats(base):
        assert_near(got[name], numbers(tuned[name]), tuned[name])


# --- Model Stock -------------------------------------------------------------------------------


def stock64(base: list[float], tuned: list[list[float]]) -> list[float]:
    deltas = [[y - x for x, y in zip(base, end, strict=True)] for end in tuned]
    n, cosines = len(tuned), []
    for i in range(n):
        for j in range(i + 1, n):
            dot = sum(x * y for x, y in zip(deltas[i], deltas[j], strict=True))
            size = math.hypot(*deltas[i]) * math.hypot(*deltas[j])
            cosines.append(dot / size if size else 0.0)
    cosine = sum(cosines) / len(cosines)
    t = n * cosine / (1 + (n - 1) * cosine) if cosine > 0 else 0.0
    return [
        t * sum(c) / n + (1 - t) * x for x, c in zip(base, zip(*tuned, strict=True), strict=True)
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@few_examples
@given(seed=st.integers(0, 99), n=st.integers(2, 4), shared=st.floats(0.0, 3.0))
def test_model_stock_equals_the_formula(
    dtype: torch.dtype, seed: int, n: int, shared: float
) -> None:
    base, drift = state(1000 * seed, dtype), state(1000 * seed + 1)
    tuned = []
    for i in range(n):
        noise = state(1000 * seed + 2 + i)
        tuned.append({k: (v + shared * drift[k] + noise[k]).to(v.dtype) for k, v in base.items()})
    got = model_stock(base, tuned)
    for name in floats(base):
        expected = stock64(numbers(base[name]), [numbers(end[name]) for end in tuned])
        assert_near(got[name], expected, base[name])


def test_model_stock_of_equal_opposed_and_unmoved_models() -> None:
    base, tuned = state(0, torch.float64), state(1, torch.float64)
    same = model_stock(base, [tuned, dict(tuned), dict(tuned)])
    away = {n: 2 * v - tuned[n] for n, v in base.items()}
    for name in floats(base):
        torch.testing.assert_close(same[name], tuned[name], rtol=1e-12, atol=1e-12)
    assert_same_state(model_stock(base, [tuned, away]), base)
    assert_same_state(model_stock(base, [tuned, base]), base)


# --- LiNeS -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_lines_scales_by_depth(dtype: torch.dtype) -> None:
    base, one, two = (state(seed, dtype) for seed in range(3))
    alpha, beta = 0.2, 0.6
    for tuned in ([one], [one, two]):
        got = lines(base, tuned if len(tuned) > 1 else one, alpha=alpha, beta=beta)
        for name in floats(base):
            block = int(name.split(".")[3]) + 1 if "resblocks" in name else 1
            scale = alpha + beta * (block - 1) / (3 - 1)
            columns = zip(*(numbers(s[name]) for s in (base, *tuned)), strict=True)
            expected = [x + scale * sum(y - x for y in ys) for x, *ys in columns]
            assert_near(got[name], expected, base[name])


@few_examples
@given(st.integers(0, 99), st.floats(-1.0, 2.0))
def test_lines_with_equal_ends_is_plain_scaling(seed: int, alpha: float) -> None:
    base, tuned = state(seed, torch.float64), state(seed + 1, torch.float64)
    got = lines(base, tuned, alpha=alpha, beta=0.0)
    expected = apply_task_vectors(base, [task_vector(base, tuned)], alpha)
    for name in floats(base):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_lines_on_a_part_of_a_model_needs_the_number_of_blocks() -> None:
    base, tuned = state(0), state(1)
    whole = lines(base, tuned, alpha=0.1, beta=0.9)
    for name in base:
        part = lines({name: base[name]}, {name: tuned[name]}, alpha=0.1, beta=0.9, blocks=3)
        assert same_bits(part[name], whole[name])
    with pytest.raises(LambdaError, match="by_depth found no blocks"):
        lines({"w": torch.zeros(1)}, {"w": torch.ones(1)}, alpha=0.1, beta=0.9)
