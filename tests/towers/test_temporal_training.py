"""The expanded tower under activation checkpointing, autocast, half precision and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from openvclip import encode_video, expand_temporal_attention
from openvclip.towers import attention
from openvclip.towers.view import FrameView
from tests.helpers import (
    assert_same_state,
    gradients,
    random_video,
    same_bits,
    set_attention_dropout,
    tiny_clip,
    tiny_tower,
)

BOUNDARIES = ("zero", "mask", "replicate")


def mixed_loss(model: Any) -> Tensor:
    """A video batch and an image batch in one step, with clips of two lengths."""
    loss: Tensor = model(random_video(2, 4)).square().mean()
    loss = loss + model(random_video(1, 3, seed=1)[0]).square().mean()
    return loss + model(random_video(1, 2, seed=2)).square().mean()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_activation_checkpointing_with_videos_and_images_in_one_step(boundary: Any) -> None:
    results = []
    for checkpointing in (False, True):
        tower = expand_temporal_attention(tiny_tower(), boundary=boundary).train()
        tower.set_grad_checkpointing(checkpointing)
        assert tower.transformer.grad_checkpointing is checkpointing
        loss = mixed_loss(tower)
        loss.backward()
        results.append((loss.detach(), gradients(tower)))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_recomputes() -> None:
    """The two models that the test above compares do differ."""
    tower = expand_temporal_attention(tiny_tower()).train()
    tower.set_grad_checkpointing(True)
    calls = []
    tower.transformer.resblocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    tower(random_video(1, 2)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"scaled_cosine_attn": True}])
def test_autocast_is_close_to_float32(
    changes: dict[str, Any], boundary: Any, device: torch.device
) -> None:
    model = expand_temporal_attention(tiny_clip(**changes), boundary=boundary)
    video = random_video(2, 4)
    exact = encode_video(model, video)
    with torch.autocast(device.type, torch.bfloat16):
        frames = model.encode_image(video)
        rough = encode_video(model, video)
    assert frames.dtype == torch.bfloat16
    assert not torch.equal(rough.float(), exact)
    similarity = functional.cosine_similarity(rough.float(), exact, dim=-1)
    assert (similarity > 0.995).all()
    rough.float().square().sum().backward()
    assert all(g.dtype == torch.float32 for g in gradients(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_dtypes(dtype: torch.dtype) -> None:
    video = random_video(2, 4)
    exact = expand_temporal_attention(tiny_tower())(video)
    tower = expand_temporal_attention(tiny_tower()).to(dtype)
    got = tower(video.to(dtype))
    assert got.dtype == dtype
    similarity = functional.cosine_similarity(got.double(), exact.double(), dim=-1)
    assert (similarity > (0.99 if dtype == torch.bfloat16 else 1 - 1e-6)).all()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_another_default_device_changes_nothing(boundary: Any) -> None:
    tower, video = expand_temporal_attention(tiny_tower(), boundary=boundary), random_video(2, 3)
    expected = tower(video)
    expected.square().sum().backward()
    grads = gradients(tower)
    tower.zero_grad()
    with torch.device("meta"):
        got = tower(video)
        got.square().sum().backward()
    assert same_bits(got, expected)
    assert_same_state(gradients(tower), grads)


# --- torch.compile -----------------------------------------------------------------------------


class Counting:
    """A backend of torch.compile that counts the compiled graphs."""

    def __init__(self) -> None:
        self.graphs = 0
        self.inner: Callable[..., Any] = lookup_backend("aot_eager")

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.graphs += 1
        return self.inner(graph, inputs, **options)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_compiled_in_one_graph(boundary: Any) -> None:
    tower = expand_temporal_attention(tiny_tower(layers=2), boundary=boundary).train()
    video = random_video(2, 3)
    expected = tower(video)
    expected.square().sum().backward()
    grads = gradients(tower)
    tower.zero_grad()
    backend = Counting()
    compiled = torch.compile(tower, backend=backend, fullgraph=True)
    got = compiled(video)
    got.square().sum().backward()
    assert backend.graphs == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, grad in gradients(tower).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4)


def test_batch_sizes_and_lengths_need_no_new_graph_where_shapes_are_dynamic() -> None:
    tower = expand_temporal_attention(tiny_tower(layers=1))
    backend = Counting()
    compiled = torch.compile(tower, backend=backend, fullgraph=True, dynamic=True)
    graphs = []
    with torch.no_grad():
        for clips, frames in ((2, 4), (3, 4), (5, 4), (4, 6), (6, 3)):
            video = random_video(clips, frames)
            torch.testing.assert_close(compiled(video), tower(video), rtol=1e-4, atol=1e-5)
            graphs.append(backend.graphs)
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 5


def test_batch_sizes_need_one_more_graph_by_default() -> None:
    tower = expand_temporal_attention(tiny_tower(layers=1))
    backend = Counting()
    compiled = torch.compile(tower, backend=backend, fullgraph=True)
    with torch.no_grad():
        for clips in (2, 3, 5, 7):
            compiled(random_video(clips, 4))
    assert backend.graphs == 2


def test_images_and_videos_through_one_compiled_tower() -> None:
    tower = expand_temporal_attention(tiny_tower(layers=1))
    compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for x in (random_video(2, 3), random_video(1, 3)[0], random_video(2, 3)):
            torch.testing.assert_close(compiled(x), tower(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expanded", [False, True])
def test_encode_video_is_compiled_in_one_graph(expanded: bool) -> None:
    model, video = tiny_clip(), random_video(2, 3)
    if expanded:
        expand_temporal_attention(model)
    compiled = torch.compile(lambda x: encode_video(model, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), encode_video(model, video), rtol=1e-4, atol=1e-5)


def test_compiled_before_the_expansion() -> None:
    """torch.compile compiles the model again when the class of its tower changes."""
    tower = tiny_tower(layers=1)
    compiled = torch.compile(tower, backend="aot_eager")
    images = random_video(1, 3)[0]
    with torch.no_grad():
        before = compiled(images)
        expand_temporal_attention(compiled)
        assert compiled(random_video(2, 3)).shape == (2, 3, 8)
        torch.testing.assert_close(compiled(images), before)


# --- a fused kernel does the work --------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the calls of fused attention by the shape of their keys."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):
            keys = args[2] if "backward" in name else args[1]
            self.calls.append((name, list(keys.shape)))
        return func(*args, **(kwargs or {}))


FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def test_fused_attention_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = expand_temporal_attention(tiny_tower(), window=2)
    with Kernels() as kernels:
        features = tower(random_video(2, 4))
    # Keys are [B, heads, N times the frames in view, d], for 4 frames in each of 3 layers.
    seen = [[2, 2, frames * 5, 8] for frames in (3, 4, 4, 3)]
    assert kernels.calls == [(FUSED, keys) for keys in seen * 3]
    with Kernels() as kernels:
        features.sum().backward()
    assert kernels.calls == [(f"{FUSED}_backward", [2, 2, 5, 8])] * 12
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: False)
    with Kernels() as kernels:
        tower(random_video(2, 4))
    assert kernels.calls == [(FUSED, [8, 2, 5 * 5, 8])] * 3


def test_the_score_matrix_is_never_there() -> None:
    """No pass creates a tensor as large as the scores, or as keys copied for each frame."""
    t, n, window = 6, 40, 2
    x = torch.randn(1, t, n, 1, 4, requires_grad=True)
    view = FrameView(window)

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, Tensor):
                    self.largest = max(self.largest, value.numel())
            return out

    with Sizes() as sizes:
        attention.temporal_attention(x, x, x, view).sum().backward()
    assert 0 < sizes.largest <= x.numel()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_dropout_of_the_shares_keeps_their_mean(boundary: Any) -> None:
    view = FrameView(1, boundary)
    q, k, v = (torch.randn(1, 3, 4, 2, 8) for _ in range(3))
    exact = attention.temporal_attention(q, k, v, view)
    torch.manual_seed(0)
    drawn = torch.stack(
        [attention.temporal_attention(q, k, v, view, dropout_p=0.3) for _ in range(2000)]
    )
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - exact).abs()
    assert (error < 6 * drawn.std(0) / 2000**0.5).all()


def test_a_tower_with_dropout_drops_in_training_alone() -> None:
    tower = expand_temporal_attention(tiny_tower(layers=1))
    video = random_video(2, 3)
    exact = tower.eval()(video)
    set_attention_dropout(tower, 0.5)
    assert torch.equal(tower(video), exact)
    assert not torch.equal(tower.train()(video), exact)


def test_a_model_trains_on_videos() -> None:
    model = expand_temporal_attention(tiny_clip()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    head = nn.Linear(8, 2)
    video, labels = random_video(4, 3), torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(encode_video(model, video)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
