"""Expanding and restoring a model in place, its error texts, and encode_video."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from openvclip import encode_video, expand_temporal_attention, restore_spatial_attention
from openvclip.errors import ExpansionError, UnsupportedModelError, VideoShapeError
from openvclip.towers import encode_images
from tests.helpers import (
    TEXT,
    TINY_PIXELS,
    assert_same_state,
    gradients,
    random_video,
    same_bits,
    snapshot,
    tiny_clip,
    tiny_tower,
)

BOUNDARIES = ("zero", "mask", "replicate")


def images(n: int, seed: int = 0) -> Tensor:
    return random_video(1, n, seed)[0]


def pass_through(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    out = model(x)
    out.square().sum().backward()
    return out.detach(), gradients(model)


# --- images are plain CLIP ---------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"patch_dropout": 0.5}])
def test_images_give_bit_for_bit_what_they_gave(train: bool, changes: dict[str, Any]) -> None:
    tower = tiny_tower(**changes).train(train)
    batch = images(4)
    before = pass_through(tower, batch)
    with torch.no_grad():
        fast = tower(batch)
    expand_temporal_attention(tower)
    after = pass_through(tower, batch)
    with torch.no_grad():
        if "patch_dropout" not in changes:
            assert same_bits(tower(batch), fast)
    assert same_bits(after[0], before[0])
    assert_same_state(after[1], before[1])
    restore_spatial_attention(tower)
    assert same_bits(pass_through(tower, batch)[0], before[0])


# --- nothing is added --------------------------------------------------------------------------


def anatomy(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Return the class and the identities of the attributes of every module."""
    return [
        (name, type(m), {k: id(v) for k, v in vars(m).items()}) for name, m in model.named_modules()
    ]


def test_the_state_dict_keeps_its_names_and_tensors() -> None:
    model = tiny_clip()
    names = list(model.state_dict())
    live = {n: id(v) for n, v in model.state_dict(keep_vars=True).items()}
    before = snapshot(model)
    assert expand_temporal_attention(model) is model
    assert list(model.state_dict()) == names
    assert {n: id(v) for n, v in model.state_dict(keep_vars=True).items()} == live
    assert_same_state(model.state_dict(), before)
    tiny_clip(3).load_state_dict(model.state_dict())


def test_an_optimizer_made_before_still_steps() -> None:
    model = tiny_clip()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expand_temporal_attention(model)
    before = snapshot(model)
    model.encode_image(random_video(2, 3)).square().sum().backward()
    optimizer.step()
    moved = {n for n, v in model.state_dict().items() if not same_bits(v, before[n])}
    assert moved == {n for n in before if n.startswith("visual.")}


@given(st.integers(1, 3), st.sampled_from(BOUNDARIES), st.sampled_from([None, [0], slice(1, 3)]))
@settings(max_examples=10)
def test_restore_is_the_exact_inverse(window: int, boundary: Any, layers: Any) -> None:
    model = tiny_clip()
    before = anatomy(model)
    expand_temporal_attention(model, window=window, boundary=boundary, layers=layers)
    assert anatomy(model) != before
    assert restore_spatial_attention(model) is model
    assert anatomy(model) == before
    with pytest.raises(Exception, match=r"(?i)expected|too many|dim"):
        model.encode_image(random_video(1, 2))


def test_expand_again_after_restore() -> None:
    tower, video = tiny_tower(), random_video(1, 4)
    wide = expand_temporal_attention(tower, window=2)(video)
    expand_temporal_attention(restore_spatial_attention(tower), window=1)
    assert not torch.allclose(tower(video), wide)
    expand_temporal_attention(restore_spatial_attention(tower), window=2)
    assert same_bits(tower(video), wide)


def test_copies_of_an_expanded_model() -> None:
    model = expand_temporal_attention(tiny_clip(), window=2, boundary="mask")
    video = random_video(2, 3)
    expected = model.encode_image(video)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert same_bits(other.encode_image(video), expected)
        restore_spatial_attention(other)
        assert type(other.visual) is open_clip.transformer.VisionTransformer
    assert same_bits(model.encode_image(video), expected)


# --- laws --------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 100))
def test_a_static_clip_is_the_image_except_with_zeros(frames: int, window: int, seed: int) -> None:
    still = images(1, seed)
    video = still.expand(frames, -1, -1, -1)[None]
    expected = tiny_tower()(still)
    for boundary in ("mask", "replicate"):
        tower = expand_temporal_attention(tiny_tower(), window=window, boundary=boundary)  # type: ignore[arg-type]
        torch.testing.assert_close(
            tower(video)[0], expected.expand(frames, -1), rtol=1e-4, atol=1e-5
        )
    zero = expand_temporal_attention(tiny_tower(), window=window)(video)[0]
    assert (zero - expected).abs().max() > 1e-3


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from(BOUNDARIES), st.integers(0, 100))
def test_laws_of_time_and_batch(frames: int, window: int, boundary: Any, seed: int) -> None:
    tower = expand_temporal_attention(tiny_tower(), window=window, boundary=boundary)
    video = random_video(3, frames, seed)
    with torch.no_grad():
        out = tower(video)
        assert out.shape == (3, frames, 8)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(tower(video.flip(1)), out.flip(1), **close)
        torch.testing.assert_close(tower(video[[2, 0, 1]]), out[[2, 0, 1]], **close)
        torch.testing.assert_close(tower(video[1:2]), out[1:2], **close)  # no leak between clips


@pytest.mark.parametrize(("layers", "window", "reach"), [([0], 1, 1), ([2], 2, 2), (None, 1, 3)])
def test_a_frame_reaches_as_far_as_its_layers_and_windows(
    layers: list[int] | None, window: int, reach: int
) -> None:
    tower = expand_temporal_attention(tiny_tower(), window=window, layers=layers)
    video = random_video(1, 9)
    other = video.clone()
    other[0, 4] += 1.0
    with torch.no_grad():
        changed = (tower(video) - tower(other))[0].abs().amax(-1) > 1e-6
    assert changed.tolist() == [abs(t - 4) <= reach for t in range(9)]


# --- encode_video ------------------------------------------------------------------------------


@pytest.mark.parametrize("expanded", [False, True])
def test_encode_video_gives_unit_vectors_on_request(expanded: bool) -> None:
    # Report 44: with cosines, the mean of unit vectors ranks as the classifier does not.
    model, video = tiny_clip(), random_video(3, 4)
    if expanded:
        expand_temporal_attention(model)
    mean = encode_video(model, video)
    assert (mean.norm(dim=-1) < 0.999).all()
    unit = encode_video(model, video, normalize=True)
    for row, expected in zip(unit.double(), mean.double(), strict=True):
        torch.testing.assert_close(row, expected / expected.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("boundary", ["zero", "replicate"])
def test_images_are_encoded_as_by_plain_clip(boundary: Any) -> None:
    # Report 42: the features of clips of one frame differ with boundary="zero".
    model, images = tiny_clip(), random_video(3, 1)[:, 0]
    expected = model.encode_image(images)
    expand_temporal_attention(model, boundary=boundary)
    assert same_bits(encode_images(model, images), expected)
    assert same_bits(encode_images(model.visual, images), expected)
    for wrong, text in {
        images[0]: r"Got \[3, 8, 8\]; expected images .* image\[None\]",
        images[:0]: "without clips",
        images.permute(0, 2, 3, 1): r"permute them: images\.permute\(0, 3, 1, 2\)",
        images[:, :1]: "with 1 channels on axis 1",
        images[..., :6]: "8 x 6 pixels",
        images.double(): "dtype float64",
        (images * 9).int(): "dtype int32",
    }.items():
        with pytest.raises(VideoShapeError, match=text):
            encode_images(model, wrong)


def test_encode_video_is_the_mean_of_normalised_frames() -> None:
    model = expand_temporal_attention(tiny_clip())
    video = random_video(2, 4)
    frames = model.encode_image(video)
    assert frames.shape == (2, 4, 8)
    expected = torch.stack([sum(f / f.norm() for f in clip) / 4 for clip in frames])  # type: ignore[misc]
    torch.testing.assert_close(encode_video(model, video), expected)
    normalised = model.encode_image(video, normalize=True)
    torch.testing.assert_close(normalised.norm(dim=-1), torch.ones(2, 4))


def test_encode_video_of_a_plain_model_is_frame_by_frame() -> None:
    model, video = tiny_clip(), random_video(2, 4)
    got = encode_video(model, video)
    for b in range(2):
        singles = [model.encode_image(video[b, t][None], normalize=True)[0] for t in range(4)]
        torch.testing.assert_close(got[b], torch.stack(singles).mean(0))
    assert (encode_video(expand_temporal_attention(model), video) - got).abs().max() > 1e-3


def test_clips_of_any_length_in_one_process() -> None:
    model = expand_temporal_attention(tiny_clip(), boundary="mask")
    video = random_video(1, 8)
    outputs = {t: model.encode_image(video[:, :t]) for t in (8, 1, 3, 8, 2)}
    assert {t: out.shape[1] for t, out in outputs.items()} == {t: t for t in outputs}
    assert same_bits(outputs[8], model.encode_image(video))


def test_encode_video_needs_encode_image() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no encode_image"):
        encode_video(nn.Linear(2, 2), random_video(1, 1))


# --- refusals ----------------------------------------------------------------------------------


def test_a_second_expansion_and_a_restore_of_nothing() -> None:
    model = tiny_clip()
    with pytest.raises(ExpansionError, match="not expanded, so there is nothing to restore"):
        restore_spatial_attention(model)
    expand_temporal_attention(model)
    expected = model.encode_image(random_video(1, 3))
    with pytest.raises(ExpansionError, match=r"expanded already\. Call restore_spatial_attention"):
        expand_temporal_attention(model, window=2)
    assert same_bits(model.encode_image(random_video(1, 3)), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"window": 0}, "window=0: expected a number of frames on either side, 1 or more"),
        ({"window": -1}, "window=-1"),
        ({"window": True}, "window=True"),
        ({"window": 1.5}, "window=1.5"),
        ({"window": "1"}, "window='1'"),
        ({"boundary": "foo"}, "boundary='foo': expected one of 'zero', 'mask', 'replicate'"),
        ({"layers": [3]}, "expected indices from -3 to 2; the tower has 3 layers"),
        ({"layers": [-4]}, "layers"),
        ({"layers": ["0"]}, "layers"),
        ({"layers": 1}, "layers=1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], text: str) -> None:
    model = tiny_clip()
    before = anatomy(model)
    with pytest.raises(ExpansionError, match=text):
        expand_temporal_attention(model, **arguments)
    assert anatomy(model) == before


def test_models_that_can_not_be_expanded() -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 64}
    resnet = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=dict(TEXT))
    with pytest.raises(
        UnsupportedModelError, match=r"ModifiedResNet, which can't be expanded"
    ) as e:
        expand_temporal_attention(resnet)
    assert "open_clip's VisionTransformer" in str(e.value)
    with pytest.raises(UnsupportedModelError, match="is a Linear"):
        expand_temporal_attention(nn.Linear(2, 2))
    two = nn.ModuleList([tiny_tower(), tiny_tower()])
    with pytest.raises(UnsupportedModelError, match="holds 2 towers"):
        expand_temporal_attention(two)


def test_a_foreign_attention_leaves_the_tower_as_it_was() -> None:
    model = tiny_clip()
    model.visual.transformer.resblocks[2].attn = nn.Identity()
    before = anatomy(model)
    with pytest.raises(UnsupportedModelError, match=r"Layer 2 .* attention of type Identity"):
        expand_temporal_attention(model)
    assert anatomy(model) == before


@pytest.mark.parametrize(
    ("video", "text"),
    [
        (torch.zeros(3, TINY_PIXELS, TINY_PIXELS), r"shape \[3, 8, 8\]; expected a video"),
        (torch.zeros(1, 1, 2, 3, 8, 8), r"expected a video \[B, T, C, H, W\]"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), "dtype uint8; expected normalised"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.long), "dtype int64"),
        (torch.zeros(2, 0, 3, 8, 8), r"without frames \(T = 0\)"),
        (torch.zeros(1, 2, 8, 8, 3), r"permute it: video.permute\(0, 1, 4, 2, 3\)"),
        (torch.zeros(1, 3, 2, 8, 8), r"2 channels on axis 2; expected \[B, T, 3, H, W\]"),
        (torch.zeros(1, 2, 3, 16, 8), "16 x 8 pixels .* the model takes 8 x 8"),
    ],
)
def test_videos_that_are_none(video: Tensor, text: str) -> None:
    model, plain = expand_temporal_attention(tiny_clip()), tiny_clip()
    for call in (model.encode_image, partial(encode_video, model), partial(encode_video, plain)):
        with pytest.raises(VideoShapeError, match=text):
            call(video)


def test_a_list_of_clips() -> None:
    model: Any = expand_temporal_attention(tiny_clip())
    clips = [torch.zeros(8, 3, 8, 8), torch.zeros(16, 3, 8, 8)]
    for call in (model.encode_image, model.visual, partial(encode_video, model)):
        with pytest.raises(VideoShapeError, match=r"Got a list of 2 clips with 8, 16 frames"):
            call(clips)


def test_a_model_of_ones_own_may_change_the_frames_before_its_tower() -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = tiny_clip()

        def encode_image(self, x: Tensor) -> Tensor:
            return self.clip.encode_image(functional.interpolate(x.float(), size=(8, 8)))

    large = random_video(1, 2, pixels=16).double()
    assert encode_video(Resizing(), large).shape == (1, 8)


def test_images_given_to_encode_video() -> None:
    for model in (tiny_clip(), expand_temporal_attention(tiny_clip())):
        with pytest.raises(VideoShapeError, match=r"encode_images\(model, images\)"):
            encode_video(model, images(2))


def test_a_video_of_another_float_dtype_is_named_and_autocast_is_left_alone(
    device: torch.device,
) -> None:
    video = random_video(1, 2)
    for model in (expand_temporal_attention(tiny_clip()), tiny_clip()):
        with pytest.raises(
            VideoShapeError, match=r"dtype float64; the model's weights are float32"
        ):
            encode_video(model, video.double())
        with torch.autocast(device.type, torch.bfloat16):
            assert encode_video(model, video.bfloat16()).isfinite().all()
    half = expand_temporal_attention(tiny_clip()).bfloat16()
    with pytest.raises(VideoShapeError, match=r"video\.to\(torch\.bfloat16\)"):
        half.encode_image(video)


def test_a_batch_of_no_clips_is_named() -> None:
    model = expand_temporal_attention(tiny_clip())
    with pytest.raises(VideoShapeError, match=r"without clips \(B = 0\)"):
        encode_video(model, random_video(0, 2))


@pytest.mark.parametrize("options", [{"window": 0}, {"boundary": "loop"}, {"layers": [99]}])
def test_settings_out_of_range_are_value_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        expand_temporal_attention(tiny_clip(), **options)
