"""FROSTER's residual feature distillation equals its equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import openvclip
from openvclip.errors import RegularizationError, UsageError, VideoShapeError
from openvclip.towers import encode_frames
from openvclip.training import FeatureDistillation, OriginalCLIP
from tests.helpers import assert_same_state, random_video, randomise, snapshot, tiny_clip
from tests.training.regulariser_models import NAMES, expanded, slow_gap, slow_projected, words

WIDTH = 5


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def made(width: int, **changes: Any) -> FeatureDistillation:
    """Return new projectors on the device of the tests."""
    return FeatureDistillation(width, **changes).to(torch.empty(0).device)


def distillation(**changes: Any) -> FeatureDistillation:
    module = made(WIDTH, **changes).double()
    randomise(module, 3, scale=1.0)  # as after some steps: the last layer is not zero
    return module


@settings(max_examples=15, deadline=None)
@given(
    clips=st.integers(1, 3),
    frames=st.integers(1, 3),
    texts=st.integers(0, 3),
    weight=st.floats(0, 5),
    residual=st.floats(0, 1),
)
def test_the_loss_and_its_gradients_are_those_of_the_equation(
    clips: int, frames: int, texts: int, weight: float, residual: float
) -> None:
    module = distillation(weight=weight, residual=residual)
    images, names = features(clips, frames, seed=1), features(texts, seed=2)
    inputs = [images.requires_grad_(), names.requires_grad_()]
    first, second = features(clips, frames, seed=3), features(texts, seed=4)
    pair = (names, second) if texts else (None, None)
    loss = module.loss(images, first, *pair)
    parts = module.images, module.texts
    expected = torch.zeros((), dtype=torch.float64)
    for part, z, z0 in ((parts[0], images, first), (parts[1], names, second)):
        rows = list(zip(z.reshape(-1, WIDTH), z0.reshape(-1, WIDTH), strict=True))
        for row, original in rows:
            changed = slow_projected(row, part.first.weight, part.last.weight, residual)
            expected = expected + slow_gap(changed, original) / len(rows)
    expected = weight * expected
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    wanted = [*inputs, *module.parameters()]
    found, reference = (
        torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        for total in (loss, expected)
    )
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_projectors_begin_as_the_paper_says() -> None:
    module = made(400)
    assert (module.weight, module.images.residual, module.texts.residual) == (2.0, 0.1, 0.1)
    for part in (module.images, module.texts):
        assert not part.last.weight.any()
        assert part.first.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
        assert [name for name, _ in part.named_parameters()] == ["first.weight", "last.weight"]
    assert not torch.equal(module.images.first.weight, module.texts.first.weight)
    z, z0 = torch.randn(2, 3, 400), torch.randn(2, 3, 400)
    plain = 2 * (1 - torch.cosine_similarity(z, z0, dim=-1)).mean()
    torch.testing.assert_close(module.loss(z, z0), plain)
    assert module.loss(z, 7 * z).item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(module.loss(3 * z, 5 * z0), plain)  # the lengths do not count


def test_the_first_layers_come_from_their_own_seed() -> None:
    first = snapshot(FeatureDistillation(6, seed=4))
    torch.manual_seed(9)
    assert_same_state(first, snapshot(FeatureDistillation(6, seed=4)))
    other = FeatureDistillation(6, seed=5)
    assert not torch.equal(other.images.first.weight, first["images.first.weight"])


def test_the_projectors_are_averaged_like_any_module() -> None:
    module = made(WIDTH)
    average = openvclip.SWATracker(module)
    states = []
    for step in range(3):
        randomise(module, step)
        average.update(module)
        states.append(snapshot(module))
    for name, value in average.averaged_state_dict().items():
        torch.testing.assert_close(value, torch.stack([s[name] for s in states]).mean(0))


def test_half_precision_features_are_compared_in_float32() -> None:
    module = made(8)
    z = torch.randn(4, 8)
    with torch.autocast(z.device.type, torch.bfloat16):
        loss = module.loss(z.bfloat16(), z)
    assert loss.dtype == torch.float32
    assert 0 <= loss.item() < 1e-4  # the rounding of the features alone


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((features(2), features(3)), r"images has shape \[2, 5\] and original_images .* \[3, 5\]"),
        ((features(2)[:, :4], features(2)[:, :4]), r"with 5 \(width\) as the last number"),
        ((features(2), features(2), features(2)), "original_texts is None"),
        ((features(2), features(2), None, features(2)), "texts is None"),
    ],
)
def test_features_that_do_not_fit_are_refused(arguments: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        distillation().loss(*arguments)


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"residual": float("nan")}, {"width": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RegularizationError, match=next(iter(wrong))):
        FeatureDistillation(**{"width": 4, **wrong})


def test_the_original_clip_is_frozen_and_encodes_each_frame_alone() -> None:
    model = expanded().train()
    original = OriginalCLIP(model)
    video = random_video(2, 3)
    plain = torch.stack([tiny_clip().encode_image(clip, normalize=True) for clip in video])
    randomise(model)  # training changes the model, not the copy
    torch.testing.assert_close(original.frames(video), plain)
    torch.testing.assert_close(original.frames(video[:, 0]), plain[:, 0])
    tokens = words(NAMES)
    torch.testing.assert_close(original.texts(tokens), tiny_clip().encode_text(tokens, True))
    torch.testing.assert_close(original.scale, tiny_clip().logit_scale.exp().detach())
    assert not original.frames(video).requires_grad
    assert not any(p.requires_grad for p in original.model.parameters())
    assert not original.model.training
    with pytest.raises(VideoShapeError):
        original.frames(video[0, 0])
    shared = tiny_clip()
    assert OriginalCLIP(shared, copy=False).model is shared


def test_frame_features_of_an_expanded_model_fit() -> None:
    model = expanded()
    original, video = OriginalCLIP(model), random_video(2, 3)
    module = made(8)
    loss = module.loss(encode_frames(model, video), original.frames(video))
    assert loss.item() > 1e-4  # other frames are in view
    loss.backward()
    assert module.images.last.weight.grad is not None
    assert module.images.last.weight.grad.any()
    assert model.visual.proj.grad.any()  # type: ignore[union-attr, operator]
