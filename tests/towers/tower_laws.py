"""Laws that hold for every expanded tower, as functions of a :class:`Case`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from openvclip.errors import ExpansionError, VideoShapeError
from tests.helpers import (
    GOLDEN,
    assert_same_state,
    gradients,
    random_video,
    same_bits,
    snapshot,
)
from tests.on_device import placed

RELEASED = GOLDEN / "expand_temporal_view_T8.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A tiny model of 2 layers with random weights, made for frames of 8 x 8 pixels.

    Attributes:
        make: a new model in eval mode, the same at each call.
        features: features ``[n, D]`` of images and ``[B, T, D]`` of videos.
        checkpoint: turns activation checkpointing on.
    """

    name: str
    make: Callable[[], Any]
    features: Callable[[Any, Tensor], Tensor]
    checkpoint: Callable[[Any], None]

    def expanded(self, **settings: Any) -> Any:
        return expand_temporal_attention(self.make(), **settings)


def images(n: int = 4) -> Tensor:
    return random_video(1, n)[0]


def anatomy(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Return the class and the identities of the attributes of every module."""
    return [
        (name, type(m), {k: id(v) for k, v in vars(m).items()}) for name, m in model.named_modules()
    ]


def _pass(case: Case, model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    out = case.features(model, x)
    out.square().sum().backward()
    return out.detach(), gradients(model)


def images_are_bit_for_bit_what_they_were(case: Case) -> None:
    for train in (False, True):
        model = case.make().train(train)
        before = _pass(case, model, images())
        expand_temporal_attention(model)
        after = _pass(case, model, images())
        assert same_bits(after[0], before[0])
        assert_same_state(after[1], before[1])
        restore_spatial_attention(model)
        assert same_bits(_pass(case, model, images())[0], before[0])


def the_state_dict_keeps_its_names_and_tensors(case: Case) -> None:
    model = case.make()
    live = {n: id(v) for n, v in model.state_dict(keep_vars=True).items()}
    before = snapshot(model)
    assert expand_temporal_attention(model) is model
    assert {n: id(v) for n, v in model.state_dict(keep_vars=True).items()} == live
    assert_same_state(model.state_dict(), before)
    case.make().load_state_dict(model.state_dict())


def an_optimizer_made_before_still_steps(case: Case) -> None:
    model = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expand_temporal_attention(model)
    before = snapshot(model)
    case.features(model, random_video(2, 3)).square().sum().backward()
    optimizer.step()
    moved = [n for n, v in model.state_dict().items() if not same_bits(v, before[n])]
    assert len(moved) > 20


def restore_is_the_exact_inverse(case: Case) -> None:
    for settings in ({}, {"window": 2, "boundary": "mask"}, {"layers": [0]}):
        model = case.make()
        before = anatomy(model)
        expand_temporal_attention(model, **settings)
        assert anatomy(model) != before
        assert restore_spatial_attention(model) is model
        assert anatomy(model) == before


def a_second_expansion_raises(case: Case) -> None:
    model = case.make()
    with pytest.raises(ExpansionError, match="not expanded, so there is nothing to restore"):
        restore_spatial_attention(model)
    expand_temporal_attention(model)
    expanded = anatomy(model)
    with pytest.raises(ExpansionError, match="expanded already"):
        expand_temporal_attention(model, window=2)
    assert anatomy(model) == expanded
    with pytest.raises(ExpansionError, match="expected indices from -2 to 1; the tower has 2"):
        expand_temporal_attention(case.make(), layers=[2])


def a_static_clip_is_the_image(case: Case) -> None:
    model, still = case.make(), images(2)
    with torch.no_grad():
        expected = case.features(model, still)
        for boundary in ("mask", "replicate", "zero"):
            expand_temporal_attention(model, window=2, boundary=boundary)
            got = case.features(model, still[:, None].expand(-1, 3, -1, -1, -1))
            restore_spatial_attention(model)
            assert got.shape == (2, 3, expected.shape[-1])
            if boundary == "zero":
                assert (got[:, 1] - expected).abs().max() > 1e-4
                continue
            for t in range(3):
                torch.testing.assert_close(got[:, t], expected, **CLOSE)


def clips_are_independent_and_time_can_be_reversed(case: Case) -> None:
    for boundary in ("zero", "mask", "replicate"):
        model = case.expanded(boundary=boundary)
        video = random_video(3, 4)
        with torch.no_grad():
            out = case.features(model, video)
            torch.testing.assert_close(case.features(model, video.flip(1)), out.flip(1), **CLOSE)
            torch.testing.assert_close(case.features(model, video[[2, 0]]), out[[2, 0]], **CLOSE)


def a_frame_reaches_as_far_as_its_layers_and_windows(case: Case) -> None:
    video = random_video(1, 7)
    other = video.clone()
    other[0, 3] += 1.0
    for layers, window, reach in (([0], 1, 1), (slice(1, None), 2, 2), (None, 1, 2), ([], 1, 0)):
        model = case.expanded(layers=layers, window=window)
        with torch.no_grad():
            difference = case.features(model, video) - case.features(model, other)
        changed = difference[0].abs().amax(-1) > 1e-6
        assert changed.tolist() == [abs(t - 3) <= reach for t in range(7)]


def copies_are_expanded_too(case: Case) -> None:
    model, video = case.expanded(window=2, boundary="mask"), random_video(2, 3)
    expected = case.features(model, video)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(case.features(other, video), expected)
        restore_spatial_attention(other)
        assert same_bits(case.features(other, images()), case.features(case.make(), images()))
    assert same_bits(case.features(model, video), expected)


def checkpointing_takes_videos_and_images_in_one_step(case: Case) -> None:
    results = []
    for checkpointing in (False, True):
        model = case.expanded().train()
        if checkpointing:
            case.checkpoint(model)
        calls: list[int] = []
        first = next(m for m in model.modules() if hasattr(m, "view"))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = case.features(model, random_video(2, 4)).square().mean()
        loss = loss + case.features(model, images()).square().mean()
        loss = loss + case.features(model, random_video(1, 2)).square().mean()
        loss.backward()
        assert len(calls) == (6 if checkpointing else 3)
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad)


def autocast_is_close_to_float32(case: Case) -> None:
    model, video = case.expanded(), random_video(2, 4)
    exact = encode_video(model, video)
    with torch.autocast(video.device.type, torch.bfloat16):
        rough = encode_video(model, video)
    assert not torch.equal(rough.float(), exact)
    assert (functional.cosine_similarity(rough.float(), exact, dim=-1) > 0.99).all()
    rough.float().square().sum().backward()
    assert all(g.dtype == torch.float32 for g in gradients(model).values())


def encode_video_pools_the_frames(case: Case) -> None:
    model, video = case.make(), random_video(2, 3)
    with torch.no_grad():
        plain = encode_video(model, video)
        for b in range(2):
            singles = functional.normalize(case.features(model, video[b]), dim=-1)
            torch.testing.assert_close(plain[b], singles.mean(0), **CLOSE)
        expand_temporal_attention(model)
        frames = functional.normalize(case.features(model, video), dim=-1)
        pooled = encode_video(model, video)
        torch.testing.assert_close(pooled, frames.mean(1), **CLOSE)
        assert (pooled - plain).abs().max() > 1e-4


def what_is_no_video_is_refused(case: Case) -> None:
    model, plain = case.expanded(), case.make()
    bad: list[tuple[Any, str]] = [
        (torch.zeros(3, 8, 8), r"expected a video \[B, T, C, H, W\]"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), "dtype uint8; expected normalised"),
        (torch.zeros(2, 0, 3, 8, 8), r"without frames \(T = 0\)"),
        (torch.zeros(1, 2, 8, 8, 3), r"permute it: video.permute\(0, 1, 4, 2, 3\)"),
        (torch.zeros(1, 2, 3, 9, 8), "9 x 8 pixels .* the model takes"),
    ]
    for video, text in bad:
        with pytest.raises(VideoShapeError, match=text):
            case.features(model, video)
        for either in (model, plain):
            with pytest.raises(VideoShapeError, match=text):
                encode_video(either, video)
    clips: Any = [torch.zeros(8, 3, 8, 8), torch.zeros(16, 3, 8, 8)]
    calls = [partial(function, model) for function in (encode_video, case.features)]
    for call in (*calls, partial(encode_video, plain)):
        with pytest.raises(VideoShapeError, match=r"2 clips with 8, 16 frames.*by length"):
            call(clips)


LAWS: list[Callable[[Case], None]] = [
    images_are_bit_for_bit_what_they_were,
    the_state_dict_keeps_its_names_and_tensors,
    an_optimizer_made_before_still_steps,
    restore_is_the_exact_inverse,
    a_second_expansion_raises,
    a_static_clip_is_the_image,
    clips_are_independent_and_time_can_be_reversed,
    a_frame_reaches_as_far_as_its_layers_and_windows,
    copies_are_expanded_too,
    checkpointing_takes_videos_and_images_in_one_step,
    autocast_is_close_to_float32,
    encode_video_pools_the_frames,
    what_is_no_video_is_refused,
]


def compiled_in_one_graph(case: Case) -> None:
    """Compare with torch.compile. It takes seconds, so it is not one of the :data:`LAWS`."""
    torch._dynamo.reset()
    model = case.expanded()
    compiled = torch.compile(lambda x: case.features(model, x), backend="aot_eager", fullgraph=True)
    for x in (random_video(2, 3), images(2)):
        _, expected = _pass(case, model, x)
        model.zero_grad()
        out = compiled(x)
        torch.testing.assert_close(out, case.features(model, x), **CLOSE)
        out.square().sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)


def slow_features(
    case: Case, video: Tensor, slow: Callable[..., Any], **settings: Any
) -> tuple[Tensor, Tensor]:
    """Features of a video by the expanded model and by a slow reference, in float64.

    The reference is the plain model, fed a clip's frames as a batch of images, in which
    ``slow(attention, tokens [T, N, D], *args, **kwargs)`` takes the place of each attention.
    """
    video = video.double()
    expanded = case.expanded(**settings).double()
    got = case.features(expanded, video)
    names = [name for name, module in expanded.named_modules() if hasattr(module, "view")]
    plain = case.make().double()
    for name in names:
        attention = plain.get_submodule(name)
        attention.forward = lambda *a, _attention=attention, **k: slow(_attention, *a, **k)
    return got, torch.stack([case.features(plain, clip) for clip in video])


equation_3_settings = pytest.mark.parametrize(
    ("window", "boundary"), [(1, "zero"), (2, "mask"), (2, "replicate")]
)


def equals_equation_3(
    case: Case, slow: Callable[..., Any], window: int, boundary: Any, tolerance: float
) -> None:
    """Compare with :func:`slow_features`; ``slow`` also takes ``settings=(window, boundary)``."""
    slow = partial(slow, settings=(window, boundary))
    with torch.no_grad():
        got, expected = slow_features(
            case, random_video(2, 4), slow, window=window, boundary=boundary
        )
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 10)


def golden() -> tuple[dict[str, Tensor], dict[str, int]]:
    """A released tower: ``input``, ``output`` and its ``weights.*``; and its sizes.

    It is a CLIP with QuickGELU, under the names of open_clip's visual tower.
    """
    with safe_open(RELEASED, "pt") as file:
        tensors = {name: placed(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    assert meta["activation"] == "quick_gelu"
    names = ("image_size", "patch", "width", "layers", "heads", "embed_dim")
    return tensors, {name: int(meta[name]) for name in names}
