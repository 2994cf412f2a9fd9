"""The attention over frames and its gradients beside float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openvclip.towers.attention import temporal_attention
from openvclip.towers.view import FrameView
from tests.device.checks import Checks, Setup
from tests.on_device import exact_kernels
from tests.towers.test_temporal_reference import equation_3

CHECKS = Checks()
BOUNDARIES = ("zero", "mask", "replicate")
BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
# Tokens in a frame: 64 * k + 64 or + 65, as in SigLIP at 384 pixels, where cuDNN's attention with a
# mask gave NaN gradients (pytorch#196678), and those of ViT-B/16, ViT-L/14 and ViT-B/32.
TOKENS = (576, 729, 197, 257, 50)


@dataclass(frozen=True)
class Inputs:
    """Queries, keys, values and the gradient of the result, in float64 on the CPU."""

    tensors: tuple[Tensor, ...]

    @staticmethod
    def random(shape: tuple[int, ...], seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
        return Inputs(tuple(drawn))

    def on(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Return leaves on a device."""
        copies = [x.to(device, dtype, copy=True) for x in self.tensors]
        return [x.requires_grad_(i < 3) for i, x in enumerate(copies)]


def result_and_gradients(tensors: list[Tensor], view: FrameView) -> list[Tensor]:
    """Return the attention and the gradients of queries, keys and values."""
    q, k, v, grad = tensors
    out = temporal_attention(q, k, v, view)
    out.backward(grad.flatten(-2))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def compare(setup: Setup, inputs: Inputs, view: FrameView, dtype: torch.dtype) -> None:
    """Compare with the same function in float64 on the CPU, of inputs rounded to ``dtype``."""
    rounded = Inputs(tuple(x.to(dtype).double() for x in inputs.tensors))
    expected = result_and_gradients(rounded.on("cpu", torch.float64), view)
    with exact_kernels():
        got = result_and_gradients(rounded.on(setup.device, dtype), view)
    for name, a, b in zip(("result", "dq", "dk", "dv"), got, expected, strict=True):
        a = a.cpu().double()
        assert a.isfinite().all(), f"{name} has {int((~a.isfinite()).sum())} NaN or infinite values"
        error = float((a - b).norm() / b.norm())
        assert error < BOUND[dtype], f"{name}: the error is {error:.1e} of it, {dtype}"


@CHECKS.add(*BOUNDARIES)
def equation_of_the_paper(setup: Setup, boundary: Any) -> None:
    """Small inputs, beside loops over frames: the reference of the other checks is right, too."""
    q, k, v, _ = Inputs.random((1, 5, 6, 2, 8)).tensors
    for window in (1, 2):
        view = FrameView(window, boundary)
        expected = [equation_3(q[0, :, :, h], k[0, :, :, h], v[0, :, :, h], window, boundary)
                    for h in range(2)]  # fmt: skip
        parts = [x.to(setup.device, torch.float32) for x in (q, k, v)]
        with exact_kernels():
            got = temporal_attention(*parts, view)[0].cpu().double()
        torch.testing.assert_close(got, torch.cat(expected, -1), rtol=1e-4, atol=1e-5)


@CHECKS.add(*(f"{boundary}-{tokens}" for tokens in TOKENS for boundary in BOUNDARIES), small=3)
def lengths_of_real_models(setup: Setup, case: str) -> None:
    """Results and gradients in bfloat16, float16 and float32 at the lengths of real models."""
    boundary, _, tokens = case.partition("-")
    if setup.small and tokens != "50":
        tokens = str(int(tokens) // 64 + 3)
    inputs = Inputs.random((1, 3, int(tokens), 2, 64))
    dtypes = (torch.float32,) if setup.small else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        compare(setup, inputs, FrameView(1, boundary), dtype)  # type: ignore[arg-type]


SHAPES = ("one frame", "two frames", "window 2", "window 3", "many clips", "head of 72", "strided")


@CHECKS.add(*SHAPES, small=2)
def shapes(setup: Setup, case: str) -> None:
    """Clips and windows of other sizes, in bfloat16."""
    shape = {"one frame": (2, 1, 20, 2, 64), "two frames": (2, 2, 20, 2, 64),
             "many clips": (40, 8, 50, 2, 64), "head of 72": (2, 4, 30, 2, 72)}  # fmt: skip
    window = int(case[-1]) if case.startswith("window") else 1
    size = shape.get(case, (2, 5, 30, 2, 64))
    inputs = Inputs.random(size if not setup.small else (2, *size[1:]))
    for boundary in BOUNDARIES:
        view = FrameView(window, boundary)  # type: ignore[arg-type]
        if case != "strided":
            compare(setup, inputs, view, torch.bfloat16)
            continue
        packed = torch.stack(inputs.tensors[:3], dim=3).to(setup.device, torch.bfloat16)
        whole = temporal_attention(*(x.contiguous() for x in packed.unbind(3)), view)
        torch.testing.assert_close(temporal_attention(*packed.unbind(3), view), whole)


@CHECKS.add(*BOUNDARIES, small=0)
def gradients_of_gradients(setup: Setup, boundary: Any) -> None:
    """The MATH kernel can be differentiated twice, on a device as on a CPU."""
    q, k, v = (x[..., :2].clone().to(setup.device).requires_grad_()
               for x in Inputs.random((1, 3, 2, 1, 8)).tensors[:3])  # fmt: skip
    view = FrameView(1, boundary)
    with sdpa_kernel([SDPBackend.MATH]):
        assert torch.autograd.gradgradcheck(lambda *x: temporal_attention(*x, view), (q, k, v))


@CHECKS.add(*BOUNDARIES, small=1)
def autocast(setup: Setup, boundary: Any) -> None:
    """Under autocast the result is close to that of float32, and gradients are float32."""
    inputs = Inputs.random((2, 4, 50, 2, 64))
    view = FrameView(1, boundary)
    expected = result_and_gradients(inputs.on("cpu", torch.float64), view)
    with torch.autocast(setup.device, torch.bfloat16):
        got = result_and_gradients(inputs.on(setup.device, torch.float32), view)
    for a, b in zip(got, expected, strict=True):
        assert float((a.cpu().double() - b).norm() / b.norm()) < 0.02
    assert {x.dtype for x in got[1:]} == {torch.float32}
