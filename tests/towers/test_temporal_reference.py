"""Temporal attention against the released implementation and against loops over Equation 3."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors import safe_open
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from openvclip import expand_temporal_attention
from openvclip.towers import attention
from openvclip.towers.attention import temporal_attention
from openvclip.towers.view import FrameView
from tests.helpers import GOLDEN, random_video, tiny_tower
from tests.on_device import placed

RELEASED = GOLDEN / "expand_temporal_view_T8.safetensors"
WINDOWS = (1, 2, 3)
BOUNDARIES = ("zero", "mask", "replicate")
FRAMES = (1, 2, 3, 8)
SETTINGS = [
    pytest.param(window, boundary, frames, id=f"{window}-{boundary}-{frames}")
    for window in WINDOWS
    for boundary in BOUNDARIES
    for frames in FRAMES
]


@pytest.fixture(params=[True, False], ids=["frame-by-frame", "all-frames"])
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """One kernel for each frame, as on a CPU, or one kernel for all frames, as on a GPU."""
    if request.param and device.type != "cpu":
        pytest.skip("a kernel of the CPU")
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: request.param)


def equation_3(q: Tensor, k: Tensor, v: Tensor, window: int, boundary: str) -> Tensor:
    """One head of one clip, ``[T, N, d]`` each, frame by frame."""
    out = torch.empty_like(q)
    last = len(q) - 1
    for t in range(len(q)):
        keys, values = [], []
        for neighbour in range(t - window, t + window + 1):
            if 0 <= neighbour <= last:
                keys.append(k[neighbour])
                values.append(v[neighbour])
            elif boundary == "zero":
                keys.append(torch.zeros_like(k[0]))
                values.append(torch.zeros_like(v[0]))
            elif boundary == "replicate":
                keys.append(k[0 if neighbour < 0 else last])
                values.append(v[0 if neighbour < 0 else last])
        scores = q[t] @ torch.cat(keys).T / math.sqrt(q.shape[-1])
        shares = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        out[t] = shares @ torch.cat(values)
    return out


def self_attention(attn: Any, x: Tensor, window: int, boundary: str) -> Tensor:
    """Multi-head self-attention of one clip's tokens ``[T, N, D]`` in float64."""
    q, k, v = (x @ attn.in_proj_weight.double().T + attn.in_proj_bias.double()).chunk(3, dim=-1)
    d = x.shape[-1] // attn.num_heads
    heads = [
        equation_3(q[..., part], k[..., part], v[..., part], window, boundary)
        for part in (slice(h * d, (h + 1) * d) for h in range(attn.num_heads))
    ]
    return _linear(attn.out_proj, torch.cat(heads, dim=-1))


def _linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.double().T + layer.bias.double()


def _norm(layer: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()


@torch.no_grad()
def slow_tower(
    tower: VisionTransformer, video: Tensor, windows: list[int], boundary: str
) -> Tensor:
    """Features ``[B, T, D]`` of open_clip's plain ViT (class token, GELU), clip by clip."""
    features = []
    for clip in video.double():
        patches = functional.conv2d(clip, tower.conv1.weight.double(), stride=tower.patch_size)
        tokens = patches.flatten(2).transpose(1, 2)
        first = tower.class_embedding.double().expand(len(clip), 1, -1)
        x = torch.cat([first, tokens], dim=1) + tower.positional_embedding.double()
        x = _norm(tower.ln_pre, x)
        for block, window in zip(tower.transformer.resblocks, windows, strict=True):
            x = x + self_attention(block.attn, _norm(block.ln_1, x), window, boundary)
            hidden = _linear(block.mlp.c_fc, _norm(block.ln_2, x))
            x = x + _linear(block.mlp.c_proj, functional.gelu(hidden))
        features.append(_norm(tower.ln_post, x)[:, 0] @ tower.proj.double())
    return torch.stack(features)


# --- the released implementation ---------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_the_released_implementation(checkpointing: bool) -> None:
    with safe_open(RELEASED, "pt") as file:
        tensors = {name: placed(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    assert meta["activation"] == "quick_gelu"
    tower = VisionTransformer(
        image_size=int(meta["image_size"]),
        patch_size=int(meta["patch"]),
        width=int(meta["width"]),
        layers=int(meta["layers"]),
        heads=int(meta["heads"]),
        mlp_ratio=4.0,
        output_dim=int(meta["embed_dim"]),
        act_layer=QuickGELU,
    ).eval()
    prefix = "weights."
    tower.load_state_dict(
        {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    )
    tower.set_grad_checkpointing(checkpointing)
    assert tensors["input"].shape[1] == int(meta["T"]) == 8
    expand_temporal_attention(tower)
    error = (tower(tensors["input"]) - tensors["output"]).abs().max()
    assert error < 1e-4
    plain = tower(tensors["input"].flatten(0, 1)).unflatten(0, (2, 8))
    assert (plain - tensors["output"]).abs().max() > 0.01  # so that the test can fail


# --- Equation 3 --------------------------------------------------------------------------------


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("window", "boundary", "frames"), SETTINGS)
def test_attention_equals_equation_3(window: int, boundary: Any, frames: int, trains: bool) -> None:
    generator = torch.Generator().manual_seed(window + 10 * frames)
    shape = (2, frames, 4, 3, 5)  # clips, frames, tokens, heads, width of a head
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    got = temporal_attention(q.requires_grad_(trains), k, v, FrameView(window, boundary))
    assert got.requires_grad == trains
    assert got.shape == (2, frames, 4, 15)
    for b in range(2):
        for h in range(3):
            expected = equation_3(q[b, :, :, h], k[b, :, :, h], v[b, :, :, h], window, boundary)
            torch.testing.assert_close(
                got[b, :, :, 5 * h : 5 * (h + 1)], expected, rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize(("window", "boundary", "frames"), SETTINGS)
def test_tower_equals_equation_3(window: int, boundary: Any, frames: int) -> None:
    tower = tiny_tower()
    video = random_video(2, frames)
    expected = slow_tower(tower, video, [window] * 3, boundary)
    expand_temporal_attention(tower, window=window, boundary=boundary)
    for mode in (False, True):
        tower.train(mode)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(tower(video).double(), expected, rtol=1e-4, atol=2e-5)


def test_the_settings_differ_from_each_other() -> None:
    """If two settings gave the same result, the tests above would not tell them apart."""
    tower, video = tiny_tower(), random_video(1, 4)
    outputs = [slow_tower(tower, video, [w] * 3, b) for w in WINDOWS for b in BOUNDARIES]
    outputs.append(slow_tower(tower, video, [0] * 3, "zero"))
    for i, output in enumerate(outputs):
        for earlier in outputs[:i]:
            assert (output - earlier).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "windows"),
    [
        ([0], [2, 0, 0]),
        ([-1], [0, 0, 2]),
        ([0, 2], [2, 0, 2]),
        ((1, -2), [0, 2, 0]),
        (slice(1, None), [0, 2, 2]),
        (slice(None, None, 2), [2, 0, 2]),
        (slice(-1, None), [0, 0, 2]),
        (range(2), [2, 2, 0]),
        ([], [0, 0, 0]),
        (None, [2, 2, 2]),
    ],
)
def test_layers(layers: Any, windows: list[int]) -> None:
    tower, video = tiny_tower(), random_video(1, 5)
    expected = slow_tower(tower, video, windows, "zero")
    expand_temporal_attention(tower, window=2, layers=layers)
    torch.testing.assert_close(tower(video).double(), expected, rtol=1e-4, atol=2e-5)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("window", "frames"), [(1, 1), (1, 3), (2, 2), (3, 2), (2, 5)])
def test_gradcheck(window: int, frames: int, boundary: Any) -> None:
    q, k, v = (
        torch.randn(1, frames, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    view = FrameView(window, boundary)
    assert torch.autograd.gradcheck(lambda *qkv: temporal_attention(*qkv, view), (q, k, v))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_of_gradients_by_the_kernel_that_has_them(boundary: Any) -> None:
    """Of the kernels of PyTorch's attention, only MATH can be differentiated twice."""
    q, k, v = (torch.randn(1, 3, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    view = FrameView(1, boundary)
    with sdpa_kernel([SDPBackend.MATH]):
        assert gradgradcheck(lambda *qkv: temporal_attention(*qkv, view), (q, k, v))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_equal_those_of_the_loops(boundary: Any) -> None:
    q, k, v = (torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(6, 2, 3, dtype=torch.float64)
    (equation_3(q, k, v, 2, boundary) * weight).sum().backward()
    expected = [x.grad.clone() for x in (q, k, v) if x.grad is not None]
    for x in (q, k, v):
        x.grad = None
    one_head = [x[None, :, :, None] for x in (q, k, v)]
    got = temporal_attention(*one_head, FrameView(2, boundary))  # type: ignore[call-arg]
    (got[0] * weight).sum().backward()
    for x, wanted in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, wanted, rtol=1e-11, atol=1e-12)
