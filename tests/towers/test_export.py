"""Expanded models in other formats: TorchScript, ``torch.export`` and ONNX; ``torch.func``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from openvclip import encode_video, expand_temporal_attention
from openvclip.errors import UsageError, VideoShapeError
from openvclip.towers import attention
from openvclip.towers.view import FrameView
from tests.helpers import gradients, random_video, tiny_clip, tiny_tower
from tests.prompting.towers import vifi, vita
from tests.towers import test_temporal_hf as hf
from tests.towers import test_temporal_timm as timm
from tests.towers.test_temporal_reference import equation_3

BOUNDARIES = ("zero", "mask", "replicate")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ANY_SIZE = {0: Dim("B", min=1), 1: Dim("T", min=1)}
SIZES = ((1, 1), (1, 3), (3, 1), (2, 2), (2, 6))


class Encoder(nn.Module):
    """``encode_video`` as a module, as users write it to export a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, video: Tensor) -> Tensor:
        return encode_video(self.model, video)


MODELS: dict[str, Callable[[], Any]] = {
    "open_clip-zero": lambda: expand_temporal_attention(tiny_clip(layers=2)),
    "siglip-mask": lambda: _expanded(timm.CASES["siglip"], "mask", 2),
    "eva02-replicate": lambda: _expanded(timm.CASES["eva02"], "replicate", 1),
    "CLIPModel-mask": lambda: _expanded(hf.CASES["CLIPModel-sdpa"], "mask", 1),
    "vifi-replicate": lambda: vifi(
        expand_temporal_attention(tiny_clip(layers=2), boundary="replicate")
    ),
}


def _expanded(case: Any, boundary: str, window: int) -> Any:
    return case.expanded(boundary=boundary, window=window)


class Attention(nn.Module):
    def __init__(self, view: FrameView) -> None:
        super().__init__()
        self.view = view

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.temporal_attention(q, k, v, self.view)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own: deprecations, and notes about constants
        yield


def saved_and_loaded(module: nn.Module, video: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, video, check_trace=False), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


# Report 25 (pytorch#75935): torch.jit.save raised "Could not export _FramesInTurn".
@pytest.mark.parametrize("name", ["eva02-replicate", "vifi-replicate"])
def test_a_traced_model_is_saved_and_takes_clips_of_every_size(name: str) -> None:
    encoder = Encoder(MODELS[name]())
    loaded = saved_and_loaded(encoder, random_video(2, 4))
    for clips, frames in ((2, 4), *SIZES):
        video = random_video(clips, frames, seed=frames)
        torch.testing.assert_close(loaded(video), encoder(video), **CLOSE)


def test_a_traced_model_with_prompts_of_a_fixed_length() -> None:
    encoder = Encoder(vita(expand_temporal_attention(tiny_clip(layers=2)), frames=3))
    loaded = saved_and_loaded(encoder, random_video(2, 3))
    for clips in (1, 2, 5):
        video = random_video(clips, 3, seed=clips)
        torch.testing.assert_close(loaded(video), encoder(video), **CLOSE)


def test_a_traced_tower_has_the_gradients_of_the_tower() -> None:
    video = random_video(2, 4)
    tower = expand_temporal_attention(tiny_tower(layers=2), window=2, boundary="replicate")
    traced = torch.jit.trace(tower, video, check_trace=False)
    tower(video).square().sum().backward()
    expected = gradients(tower)
    tower.zero_grad()
    traced(video).square().sum().backward()
    for name, gradient in gradients(tower).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_clip, lambda: vifi(tiny_clip())])
def test_scripting_says_what_to_use_instead(make: Callable[[], Any]) -> None:
    model = make()
    if make is tiny_clip:
        expand_temporal_attention(model)
    with pytest.raises(UsageError, match=r"torch.export.export\(model, \(video,\)\)"):
        torch.jit.script(model)
    with pytest.raises(VideoShapeError, match=r"torch.fx.symbolic_trace does not support"):
        torch.fx.symbolic_trace(model.visual)


# torch.export refused fewer than 3 frames and 2 clips: "Constraints violated (T)".
def test_an_exported_tower_takes_one_clip_and_one_frame() -> None:
    tower = expand_temporal_attention(tiny_tower(layers=1), boundary="mask")
    module = torch.export.export(tower, (random_video(2, 4),), dynamic_shapes=[ANY_SIZE]).module()
    for clips, frames in SIZES:
        video = random_video(clips, frames, seed=frames)
        torch.testing.assert_close(module(video), tower(video), **CLOSE)


# --- onnxruntime -------------------------------------------------------------------------------


def run_onnx(model: bytes, *inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    values = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, values)[0])


# Report 48: with boundary="replicate" onnxruntime failed in ScatterElements, and the exporter with
# dynamo=False did not export any boundary.
@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_equals_pytorch(name: str) -> None:
    pytest.importorskip("onnx")
    encoder, video, buffer = Encoder(MODELS[name]()), random_video(2, 3), io.BytesIO()
    torch.onnx.export(encoder, (video,), buffer, dynamo=False)
    torch.testing.assert_close(run_onnx(buffer.getvalue(), video), encoder(video), **CLOSE)


def test_onnxruntime_takes_clips_of_every_size() -> None:
    pytest.importorskip("onnxscript")
    module = Attention(FrameView(1, "replicate"))
    example = tuple(torch.randn(3, 2, 3, 4, 2, 8))
    program = torch.onnx.export(
        module, example, dynamo=True, dynamic_shapes=[ANY_SIZE] * 3, verbose=False, optimize=False
    )
    assert program is not None
    model = program.model_proto.SerializeToString()
    for clips, frames in SIZES:
        inputs = tuple(torch.randn(3, clips, frames, 4, 2, 8))
        torch.testing.assert_close(run_onnx(model, *inputs), module(*inputs), **CLOSE)


# --- the kernel --------------------------------------------------------------------------------


class Masks(TorchFunctionMode):
    """Collects the attention masks of all calls of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


# pytorch#196678: with a mask, cuDNN's attention can return NaN gradients on H100 and H200. PyTorch
# may choose this kernel on a GPU. Without a mask in the call, that cannot happen.
@pytest.mark.parametrize("frames", range(1, 8))
@pytest.mark.parametrize("window", [1, 2, 3])
def test_no_kernel_gets_a_mask(monkeypatch: pytest.MonkeyPatch, window: int, frames: int) -> None:
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: False)  # as on a GPU
    generator = torch.Generator().manual_seed(frames)
    q, k, v = torch.randn(3, 2, frames, 4, 2, 8, generator=generator, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    slow = [x.clone().requires_grad_() for x in (q, k, v)]
    with Masks() as masks:
        out = attention.temporal_attention(*inputs, FrameView(window, "mask"))
    assert masks.masks == [None] * min(frames, 2 * window + 1)
    heads = [
        [equation_3(*(x[b, :, :, h] for x in slow), window, "mask") for h in range(2)]
        for b in range(2)
    ]
    expected = torch.stack([torch.stack(clip, dim=2).flatten(2) for clip in heads])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(inputs, slow, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


# --- torch.func --------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_by_frame", [True, False])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_functional_transforms(
    monkeypatch: pytest.MonkeyPatch, boundary: Any, frame_by_frame: bool
) -> None:
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: frame_by_frame)
    expand = partial(expand_temporal_attention, boundary=boundary)
    towers = [expand(tiny_tower(seed, layers=1)) for seed in (0, 1)]
    tower, video = towers[0], random_video(3, 4)
    expected = tower(video)
    parameters = dict(tower.named_parameters())
    assert torch.equal(functional_call(tower, parameters, (video,)), expected)
    clip_by_clip = vmap(lambda clip: tower(clip[None])[0])(video)
    torch.testing.assert_close(clip_by_clip, expected, **CLOSE)
    stacked = vmap(lambda *state: functional_call(tower, state, (video,)))(
        *stack_module_state(towers)  # type: ignore[arg-type]
    )
    torch.testing.assert_close(stacked, torch.stack([t(video) for t in towers]), **CLOSE)

    def loss(weights: dict[str, Tensor], clip: Tensor) -> Tensor:
        out: Tensor = functional_call(tower, weights, (clip[None],))
        return out.square().sum()

    per_clip = vmap(grad(loss), in_dims=(None, 0))(parameters, video)
    expected.square().sum().backward()
    for name, gradient in gradients(tower).items():
        torch.testing.assert_close(per_clip[name].sum(0), gradient, rtol=1e-3, atol=1e-4)


def test_inference_mode_and_default_devices() -> None:
    with torch.inference_mode():
        inside = expand_temporal_attention(tiny_clip())
        video = random_video(2, 3)
        features = encode_video(inside, video)
    model = expand_temporal_attention(tiny_clip())
    with torch.no_grad():
        assert torch.equal(encode_video(model, random_video(2, 3)), features)
    for boundary in BOUNDARIES:
        tower = expand_temporal_attention(tiny_tower(), boundary=boundary)
        expected = tower(random_video(2, 3))
        clips = random_video(2, 3)
        with torch.device("meta"):  # the default device for new tensors
            assert torch.equal(tower(clips), expected)
