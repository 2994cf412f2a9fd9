"""The expanded tower under activation checkpointing, autocast, half precision and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn import functional

from openvclip import encode_video, expand_temporal_attention
from tests.helpers import gradients, random_video, same_bits, tiny_clip, tiny_tower

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
    """That the test above compares two different things."""
    tower = expand_temporal_attention(tiny_tower()).train()
    tower.set_grad_checkpointing(True)
    calls = []
    tower.transformer.resblocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    tower(random_video(1, 2)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_autocast_is_close_to_float32(boundary: Any) -> None:
    model = expand_temporal_attention(tiny_clip(), boundary=boundary)
    video = random_video(2, 4)
    exact = encode_video(model, video)
    with torch.autocast("cpu", torch.bfloat16):
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


# --- torch.compile -----------------------------------------------------------------------------


class Counting:
    """A backend that counts the graphs that it is given."""

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


def test_compiled_before_the_expansion() -> None:
    """The class of the tower changes under the compiled wrapper, which must notice."""
    tower = tiny_tower(layers=1)
    compiled = torch.compile(tower, backend="aot_eager")
    images = random_video(1, 3)[0]
    with torch.no_grad():
        before = compiled(images)
        expand_temporal_attention(compiled)
        assert compiled(random_video(2, 3)).shape == (2, 3, 8)
        torch.testing.assert_close(compiled(images), before)


# --- a fused kernel does the work --------------------------------------------------------------


def test_scaled_dot_product_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    real = functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(k.shape)
        return real(q, k, *rest, **options)

    tower = expand_temporal_attention(tiny_tower(), window=2)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    tower(random_video(2, 4))
    # B, heads, N for each frame in view, d; in each of 3 layers and of 4 frames.
    assert calls == [(2, 2, 25, 8)] * 12


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
