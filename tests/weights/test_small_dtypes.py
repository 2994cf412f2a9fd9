"""float8 and complex weights: computed in float32 or complex64, and rounded once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openvclip import (
    EMATracker,
    InterpolatedWeightRegularizer,
    LAWATracker,
    SWATracker,
    interpolate,
    interpolate_into,
)
from openvclip.errors import NonFiniteWeightsError, UsageError
from openvclip.weights import weights_hash
from openvclip.weights.numerics import non_finite_names
from tests.helpers import same_bits
from tests.merging.methods import MERGES

FLOAT8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]


def values_of(dtype: torch.dtype) -> Tensor:
    """All finite values that a dtype of 8 bits holds, in float64."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return codes[codes.isfinite()]


def random(dtype: torch.dtype, seed: int, shape: tuple[int, ...] = (40, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return (values.abs() + 0.1 if dtype == torch.float8_e8m0fnu else values).to(dtype)


def assert_nearest(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Each value is the nearest one that the dtype holds. Ties may go either way."""
    assert result.dtype == dtype
    distance = (exact.flatten()[:, None] - values_of(dtype)).abs().min(dim=1).values
    mine = (exact.flatten() - result.double().flatten()).abs()
    assert bool((mine <= distance * (1 + 1e-6)).all())


class Model(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value)
        self.other = nn.Parameter(torch.ones(3))


# --- float8 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_interpolation_of_float8(dtype: torch.dtype, lam: float) -> None:
    # Report 19 (ComfyUI#4989)
    a, b = random(dtype, 1), random(dtype, 2)
    exact = lam * a.double() + (1 - lam) * b.double()
    result = interpolate({"w": a}, {"w": b}, lam)["w"]
    assert_nearest(result, exact, dtype)
    if lam in (0.0, 1.0):
        assert same_bits(result, a if lam else b)
    assert same_bits(interpolate({"w": a}, {"w": a}, lam)["w"], a)
    wide = interpolate({"w": a}, {"w": b}, lam, dtype=torch.float64)["w"]
    torch.testing.assert_close(wide, exact, rtol=1e-6, atol=1e-6)
    mixed = interpolate({"w": a}, {"w": b.bfloat16()}, lam)["w"]
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-6, atol=1e-6)
    model = nn.Module()
    model.register_buffer("w", b.clone())
    interpolate_into(model, {"w": a}, {"w": b}, lam)
    assert same_bits(model.w, result)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("method", MERGES)
def test_merges_of_float8_are_those_of_float32_rounded_once(
    dtype: torch.dtype, method: str
) -> None:
    first, *others = [{"w": random(dtype, seed)} for seed in range(3)]
    wide_first, *wide_others = [{"w": state["w"].float()} for state in (first, *others)]
    wide = MERGES[method](wide_first, wide_others)["w"]
    assert same_bits(MERGES[method](first, others)["w"], wide.to(dtype))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_trackers_of_float8(dtype: torch.dtype) -> None:
    model = Model(random(dtype, 0))
    trackers = [SWATracker(model), EMATracker(model, decay=0.5), LAWATracker(model, k=2)]
    trackers.append(SWATracker(model, device="cpu"))
    models = [random(dtype, seed) for seed in (1, 2, 3)]
    for value in models:
        model.w.data.copy_(value)
        for tracker in trackers:
            tracker.update(model)
    a, b, c = (value.double() for value in models)
    expected = ((a + b + c) / 3, a / 4 + b / 4 + c / 2, (b + c) / 2, (a + b + c) / 3)
    for tracker, mean in zip(trackers, expected, strict=True):
        result = tracker.averaged_state_dict()["w"]
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double().to(mean.device), mean, rtol=1e-6, atol=1e-6)
        with tracker.applied(model):
            assert_nearest(model.w.data, mean, dtype)
        assert same_bits(model.w, models[-1])


@pytest.mark.parametrize("dtype", FLOAT8)
def test_regulariser_of_float8(dtype: torch.dtype) -> None:
    live, anchor = random(dtype, 1), random(dtype, 2)
    for original in (anchor, anchor.float()):
        model = Model(live.clone())
        iwr = InterpolatedWeightRegularizer(
            model, anchor={"w": original, "other": torch.zeros(3)}, interval=(0.25, 0.25)
        )
        with iwr.interpolated():
            exact = 0.25 * anchor.double() + 0.75 * live.double()
            assert_nearest(model.w.data, exact, dtype)
        assert same_bits(model.w, live)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_that_is_not_finite(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    broken = codes[~codes.view(dtype).double().isfinite()].view(dtype)
    assert len(broken)
    assert non_finite_names({"ok": random(dtype, 0), "bad": broken[:1]}) == ["bad"]
    swa = SWATracker(Model(broken.clone()))
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(w\)"):
        swa.update(Model(broken.clone()))


def test_the_hash_of_float8_is_that_of_its_bytes() -> None:
    hashes = {weights_hash({"w": random(dtype, 0)}) for dtype in FLOAT8}
    assert len(hashes) == len(FLOAT8)


# --- complex -------------------------------------------------------------------------------------


def complex_values(dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, dtype=torch.complex64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_weights(dtype: torch.dtype) -> None:
    # Report 27
    a, b = complex_values(dtype, 1), complex_values(dtype, 2)
    exact = 0.25 * a.to(torch.complex128) + 0.75 * b.to(torch.complex128)
    tolerance = {torch.complex32: 1e-3, torch.complex64: 1e-6, torch.complex128: 1e-14}[dtype]

    def assert_exact(value: Tensor) -> None:
        wide = value.detach().to(torch.complex128)
        torch.testing.assert_close(wide, exact, rtol=tolerance, atol=tolerance)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a lost imaginary part is a warning of PyTorch
        warnings.filterwarnings("ignore", message="ComplexHalf")
        assert_exact(interpolate({"w": a}, {"w": b}, 0.25)["w"])
        model = Model(b.clone())
        swa, ema, lawa = SWATracker(model), EMATracker(model, decay=0.75), LAWATracker(model)
        anchor = {"w": a, "other": torch.ones(3)}
        iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(0.25, 0.25))
        with iwr.interpolated():
            assert_exact(model.w)
        for value in (b, b, a, b):
            model.w.data.copy_(value)
            for tracker in (swa, lawa):
                tracker.update(model)
        for value in (b, a):
            model.w.data.copy_(value)
            ema.update(model)
        for tracker in (swa, ema, lawa):
            assert_exact(tracker.averaged_state_dict()["w"])


def test_a_regulariser_knows_its_complex_anchor_again() -> None:
    def fingerprint(value: Tensor) -> Any:
        iwr = InterpolatedWeightRegularizer(Model(value))
        return iwr.state_dict()["anchor_fingerprint"]

    value = complex_values(torch.complex64, 0)
    assert fingerprint(value) == fingerprint(value.clone())
    assert fingerprint(value) != fingerprint(value.conj().resolve_conj())


def test_imaginary_parts_are_not_lost() -> None:
    real, imaginary = torch.ones(4, 3), complex_values(torch.complex64, 0)
    model = Model(real.clone())
    anchor = {"w": imaginary, "other": torch.ones(3)}
    with pytest.raises(UsageError, match=r"real, but complex in theta_a or theta_b \(w\)"):
        interpolate_into(model, anchor, {"w": real, "other": torch.ones(3)}, 0.5)
    with pytest.raises(UsageError, match=r"complex in 1 entries \(w\)"):
        InterpolatedWeightRegularizer(model, anchor=anchor)
    with pytest.raises(UsageError, match=r"1 entries of out are real"):
        interpolate({"w": imaginary}, {"w": imaginary}, 0.5, out={"w": torch.empty(4, 3)})
    mixed = interpolate({"w": real}, {"w": imaginary}, 0.5)["w"]
    torch.testing.assert_close(mixed, (real + imaginary) / 2)
