"""Training on the device: optimizers, mixed precision, checkpointing, repeated runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip import (
    EMATracker,
    InterpolatedWeightRegularizer,
    SWATracker,
    encode_video,
    expand_temporal_attention,
    interpolate,
)
from openvclip.errors import UsageError
from tests.device.checks import Checks, Setup
from tests.helpers import (
    Smooth,
    assert_same_state,
    batch,
    gradients,
    random_video,
    same_bits,
    snapshot,
    tiny_clip,
)
from tests.on_device import exact_kernels

CHECKS = Checks()
STEPS = 5
Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, **o),
    "Adam": lambda p, **o: torch.optim.Adam(p, lr=0.05, **o),
    "AdamW": lambda p, **o: torch.optim.AdamW(p, lr=0.05, **o),
}
KINDS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def clip_loss(model: Any, device: str, step: int = 0) -> Tensor:
    """A loss of two clips, as a classifier of two classes has it."""
    video = random_video(2, 3, seed=step).to(device)
    features = encode_video(model, video).float()
    return functional.cross_entropy(8 * features @ features.T, torch.arange(2, device=device))


def smooth(device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return Smooth().to(device, dtype)


def smooth_loss(model: nn.Module, device: str, step: int) -> Tensor:
    x, y = batch(step, dtype=next(model.parameters()).dtype)
    return functional.cross_entropy(model(x.to(device)), y.to(device))


def regularised(model: nn.Module, optimizer: Any, **settings: Any) -> InterpolatedWeightRegularizer:
    return InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)), **settings)


@CHECKS.add(*(f"{name}-{kind}" for name in OPTIMIZERS for kind in KINDS), small=1)
def optimizers(setup: Setup, case: str) -> None:
    """Regularised steps and averages equal those of the CPU, in float64."""
    name, _, kind = case.partition("-")
    results = []
    for device, options in (("cpu", KINDS["loop"]), (setup.device, KINDS[kind])):
        model = smooth(device)
        iwr = regularised(model, OPTIMIZERS[name](model.parameters(), **options))
        swa, ema = SWATracker(model), EMATracker(model, decay=0.8)
        for step in range(STEPS):
            iwr.step(lambda m=model, d=device, s=step: smooth_loss(m, d, s), max_grad_norm=0.5)
            swa.update(model)
            ema.update(model)
        states = (model.state_dict(), swa.averaged_state_dict(), ema.averaged_state_dict())
        results.append([v.cpu().double() for state in states for v in state.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@CHECKS.add(*KINDS)
def silent_changes(setup: Setup, kind: str) -> None:
    """An optimizer that steps inside interpolated() is noticed, and its step is undone."""
    model = smooth(setup.device, torch.float32)
    optimizer = OPTIMIZERS["AdamW"](model.parameters(), **KINDS[kind])
    iwr, before = regularised(model, None), snapshot(model)
    with pytest.raises(UsageError, match="changed inside"):  # noqa: PT012
        with iwr.interpolated():
            smooth_loss(model, setup.device, 0).backward()
            optimizer.step()
        with iwr.interpolated():  # on a GPU the next block notices
            pass
    assert_same_state(model.state_dict(), before)


@CHECKS.add("float16")
def overflow(setup: Setup, name: str) -> None:
    """A step with infinite gradients is skipped: every bit of the weights is restored."""
    model = expand_temporal_attention(tiny_clip()).to(setup.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(tiny_clip(1)))
    scale = 2.0**22 if setup.small else 2.0**36  # half precision is slow on a CPU
    scaler = torch.amp.GradScaler(setup.device, init_scale=scale)
    before = snapshot(model)

    def closure() -> Tensor:
        with torch.autocast(setup.device, torch.float16):
            return clip_loss(model, setup.device)

    iwr.step(closure, scaler=scaler, max_grad_norm=1.0)
    assert scaler.get_scale() == scale / 2, "no gradient overflowed"
    assert_same_state(model.state_dict(), before)
    for _ in range(40):
        scale, moved = scaler.get_scale(), snapshot(model)
        iwr.step(closure, scaler=scaler, max_grad_norm=1.0)
        if scaler.get_scale() == scale:
            break
        assert_same_state(model.state_dict(), moved)
    assert not same_bits(model.visual.proj, moved["visual.proj"]), "no step was made"
    assert all(p.isfinite().all() for p in model.parameters())


@CHECKS.add("zero", "mask", "replicate", small=1)
def autocast(setup: Setup, boundary: Any) -> None:
    """The gradients under autocast are those of float32 in float32, up to the rounding."""
    grads = []
    for enabled in (False, True):
        model = expand_temporal_attention(tiny_clip(), boundary=boundary).to(setup.device).train()
        with exact_kernels(), torch.autocast(setup.device, torch.bfloat16, enabled=enabled):
            clip_loss(model, setup.device).backward()
        grads.append(gradients(model))
    assert {g.dtype for g in grads[1].values()} == {torch.float32}
    lengths = [torch.cat([g.flatten() for g in one.values()]) for one in grads]
    similarity = functional.cosine_similarity(*lengths, dim=0)
    assert similarity > 0.98, f"the cosine of both gradients is {similarity:.3f}"


@CHECKS.add("zero", "mask", "replicate", small=1)
def activation_checkpointing(setup: Setup, boundary: Any) -> None:
    """Recomputed layers give the same loss and the same gradients."""
    results = []
    for recompute in (False, True):
        model = expand_temporal_attention(tiny_clip(), boundary=boundary).to(setup.device).train()
        model.set_grad_checkpointing(recompute)
        with exact_kernels():
            loss = clip_loss(model, setup.device)
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


@CHECKS.add("float32", "autocast", small=1)
def repeated_runs(setup: Setup, kind: str) -> None:
    """Two runs with the same seeds give the same bits."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = expand_temporal_attention(tiny_clip()).to(setup.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(tiny_clip(1)))
        swa = SWATracker(model)
        autocast = torch.autocast(setup.device, torch.bfloat16, enabled=kind == "autocast")

        def closure(step: int, model: Any = model, autocast: Any = autocast) -> Tensor:
            with autocast:
                return clip_loss(model, setup.device, step)

        with exact_kernels():
            for step in range(1 if setup.small else STEPS):
                iwr.step(lambda step=step, closure=closure: closure(step))
                swa.update(model)
        states.append({**model.state_dict(), **{f"swa.{n}": v for n, v in
                       swa.averaged_state_dict().items()}})  # fmt: skip
    assert_same_state(*states)


@CHECKS.add("cpu", "device", small=1)
def anchor_device(setup: Setup, home: str) -> None:
    """The place of the original CLIP changes no bit."""
    states = []
    for where in (None, "cpu" if home == "cpu" else setup.device):
        model = expand_temporal_attention(tiny_clip()).to(setup.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        anchor = snapshot(tiny_clip(1))
        iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=anchor, anchor_device=where)
        with exact_kernels():
            for step in range(1 if setup.small else STEPS):
                iwr.step(lambda m=model, s=step: clip_loss(m, setup.device, s))
        states.append(model.state_dict())
    assert_same_state(*states)


@CHECKS.add()
def averages_of_mixed_dtypes(setup: Setup) -> None:
    """An average is used by a model with weights of two dtypes, and is taken back."""
    model = tiny_clip().to(setup.device)
    for name, parameter in model.named_parameters():
        if "ln_" not in name:
            parameter.data = parameter.data.bfloat16()
    before, swa = snapshot(model), SWATracker(model)
    swa.update(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    swa.update(model)
    expected, now = swa.averaged_state_dict(), snapshot(model)
    with swa.applied(model):
        assert_same_state(model.state_dict(), {n: expected[n].to(v.dtype) for n, v in now.items()})
        assert not same_bits(model.visual.proj, before["visual.proj"])
    assert_same_state(model.state_dict(), now)


@CHECKS.add("float32", "bfloat16")
def interpolation(setup: Setup, name: str) -> None:
    """Equation 6 on the device is the one in float64, rounded once; its ends are bitwise."""
    dtype = getattr(torch, name)
    a, b = (tiny_clip(seed).to(setup.device, dtype).state_dict() for seed in (0, 1))
    for lam in (0.0, 0.3, 1.0):
        got = interpolate(a, b, lam)
        if lam in (0.0, 1.0):
            assert_same_state(got, a if lam else b)
            continue
        for key, value in got.items():
            exact = lam * a[key].cpu().double() + (1 - lam) * b[key].cpu().double()
            tolerance = 2e-6 if dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(value.cpu().double(), exact, rtol=tolerance, atol=tolerance)
            assert value.device.type == torch.device(setup.device).type
