from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openvclip.errors import OpenVCLIPError, VideoOptionError, VideoShapeError
from openvclip.video import transforms


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], 9, 11, generator=generator)
    smooth = torch.nn.functional.interpolate(
        coarse.flatten(0, -4), size=shape[-2:], mode="bicubic"
    ).clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8).view(shape)


def released_reference(video, size):
    """Step by step as published: /255, mean and std, bilinear short side, floor, centre crop."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (transforms.CLIP_MEAN, transforms.CLIP_STD))
    frames = (video.float() / 255 - mean) / std
    height, width = frames.shape[-2:]
    scaled = (
        (math.floor(float(height) / width * size), size)
        if width < height
        else (size, math.floor(float(width) / height * size))
    )
    if min(height, width) != size:
        frames = torch.nn.functional.interpolate(
            frames, size=scaled, mode="bilinear", align_corners=False
        )
    top = math.ceil((frames.shape[-2] - size) / 2)
    left = math.ceil((frames.shape[-1] - size) / 2)
    return frames[..., top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(240, 320), (321, 201), (64, 64), (33, 500), (224, 301)])
@pytest.mark.parametrize("size", [224, 32, 65])
def test_released_equals_the_recipe(shape, size):
    video = pixels(5, 3, *shape)
    actual = transforms.build("released", size)(video)
    torch.testing.assert_close(actual, released_reference(video, size), atol=2e-5, rtol=0)
    assert actual.shape == (5, 3, size, size)
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("shape", [(240, 320), (320, 241), (224, 301), (100, 90)])
def test_clip_equals_clips_own_preprocessing(shape):
    image = pytest.importorskip("PIL.Image")
    video = pixels(2, 3, *shape)
    actual = transforms.build("clip")(video)
    height, width = shape
    short = min(shape)
    scaled = (int(224 * height / short), int(224 * width / short))
    for frame, result in zip(video, actual, strict=True):
        picture = image.fromarray(frame.permute(1, 2, 0).numpy())
        small = np.asarray(picture.resize(scaled[::-1], image.BICUBIC))
        top, left = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
        small = small[top : top + 224, left : left + 224]
        mean, std = np.array(transforms.CLIP_MEAN), np.array(transforms.CLIP_STD)
        grey_levels = result.permute(1, 2, 0).numpy() * std * 255 + mean * 255
        difference = np.abs(grey_levels - small)
        # both compute in fixed point and round differently
        assert difference.max() < 2.01
        assert difference.mean() < 0.02


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_rank_is_kept(name, lead):
    video = pixels(*lead, 4, 3, 40, 50)
    transform = transforms.build(name, 32)
    result = transform(video, torch.Generator().manual_seed(0))
    assert result.shape == (*lead, 4, 3, 32, 32)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    strided = video.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(transform(strided, torch.Generator().manual_seed(0)), result)


@pytest.mark.parametrize("name", ["released", "clip"])
def test_clips_do_not_depend_on_their_batch(name):
    video = pixels(2, 20, 3, 50, 41)
    transform = transforms.build(name, 32)
    assert not transform.random
    alone = torch.stack([transform(clip) for clip in video])
    torch.testing.assert_close(transform(video), alone, atol=1e-6, rtol=0)


def test_train_uses_one_crop_for_all_frames_of_a_clip():
    frame = pixels(1, 3, 70, 90)
    video = torch.stack([frame.expand(6, -1, -1, -1), frame.expand(6, -1, -1, -1)])
    transform = transforms.build("train", 32)
    assert transform.random
    result = transform(video, torch.Generator().manual_seed(5))
    for clip in result:
        assert all(torch.equal(clip[0], other) for other in clip)
    assert not torch.equal(result[0], result[1])
    again = transform(video, torch.Generator().manual_seed(5))
    assert torch.equal(result, again)


def test_train_scales_crops_and_mirrors_over_the_whole_range():
    # the value of a pixel is its column (and its row, in the second channel)
    columns = torch.arange(224).expand(224, 224)
    video = torch.stack([columns, columns.T, columns]).to(torch.uint8)[None]
    transform = transforms.build("train", 56, mean=(0, 0, 0), std=(1 / 255,) * 3)
    generator = torch.Generator().manual_seed(0)
    widths, lefts, tops, mirrored = set(), [], [], 0
    for _ in range(200):
        result = transform(video, generator)[0]
        step = (result[0, 0, -1] - result[0, 0, 0]).item() / 55
        mirrored += step < 0
        widths.add(round(224 / abs(step)))
        lefts.append(result[0, 0].min().item())
        tops.append(result[1, :, 0].min().item())
    assert min(widths) == 56
    assert max(widths) == 64
    assert len(widths) == 9
    assert 70 <= mirrored <= 130
    assert min(lefts) < 3
    assert max(lefts) > 25
    assert min(tops) < 3
    assert max(tops) > 25
    still = transforms.build("train", 56, mean=(0, 0, 0), std=(1 / 255,) * 3, hflip=False)
    assert all(
        still(video, generator)[0, 0, 0, 0] < still(video, generator)[0, 0, 0, -1]
        for _ in range(40)
    )


def test_train_without_generator_uses_the_global_one():
    video = pixels(2, 3, 40, 50)
    transform = transforms.build("train", 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = transform(video)
        torch.manual_seed(1)
        assert torch.equal(first, transform(video))
        assert not torch.equal(first, transform(video))


# --- colour jitter ---------------------------------------------------------------------------


RAW = {"mean": (0, 0, 0), "std": (1, 1, 1), "hflip": False}  # leaves the scale 0 to 1 as it is


def drawn(transform, video, seed):
    return transform(video, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(4))
def test_color_jitter_equals_torchvision(index):
    """One kind of change at a time; torchvision's functions give the factor."""
    vision = pytest.importorskip("torchvision.transforms.functional")
    changes = [
        vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation,
        vision.adjust_hue,
    ]  # fmt: skip
    video = pixels(3, 3, 40, 40, seed=index)
    reach = [0.0] * 4
    reach[index] = 0.4
    plain = transforms.build("train", 40, **RAW)
    jittered = transforms.build("train", 40, color_jitter=reach, **RAW)
    low, high = (-0.4, 0.4) if index == 3 else (0.6, 1.4)
    amounts = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        before = plain(video, generator)
        torch.randperm(4, generator=generator)  # the order
        amount = low + (high - low) * torch.rand(4, generator=generator)[index].item()
        after = drawn(jittered, video, seed)
        torch.testing.assert_close(after, changes[index](before, amount), atol=2e-5, rtol=0)
        assert (after - before).abs().max() > 1e-3
        amounts.append(amount)
    assert min(amounts) < (low + high) / 2 < max(amounts)


def test_color_jitter_changes_in_the_drawn_order():
    vision = pytest.importorskip("torchvision.transforms.functional")
    video = pixels(2, 3, 40, 40)
    plain = transforms.build("train", 40, **RAW)
    jittered = transforms.build("train", 40, color_jitter=(0.8, 0.8, 0.8, 0.5), **RAW)
    orders = set()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        expected = plain(video, generator)
        order = torch.randperm(4, generator=generator).tolist()
        draws = torch.rand(4, generator=generator).tolist()
        for index in order:
            name = ("brightness", "contrast", "saturation", "hue")[index]
            amount = draws[index] - 0.5 if name == "hue" else 0.2 + 1.6 * draws[index]
            expected = getattr(vision, f"adjust_{name}")(expected, amount)
        torch.testing.assert_close(drawn(jittered, video, seed), expected, atol=1e-4, rtol=0)
        orders.add(tuple(order))
    assert len(orders) > 5


def test_color_jitter_is_one_for_a_clip():
    frame = pixels(1, 3, 50, 60)
    video = torch.stack([frame.expand(5, -1, -1, -1)] * 2)
    transform = transforms.build("train", 32, color_jitter=0.5)
    assert transform.color_jitter == (0.5, 0.5, 0.5, 0.0)
    first, second = transform(video, torch.Generator().manual_seed(1))
    assert all(torch.equal(first[0], other) for other in first)
    assert not torch.equal(first, second)
    # without jitter no further number is drawn, so older runs can be repeated
    plain, off = transforms.build("train", 32), transforms.build("train", 32, color_jitter=0)
    assert torch.equal(drawn(plain, video, 4), drawn(off, video, 4))


def test_color_jitter_in_chunks(monkeypatch):
    video = pixels(7, 3, 40, 50)
    transform = transforms.build("train", 32, color_jitter=(0.5, 0.5, 0.5, 0.2))
    whole = drawn(transform, video, 2)
    monkeypatch.setattr(transforms, "_CHUNK", 2 * 3 * 40 * 50)
    assert torch.equal(drawn(transform, video, 2), whole)


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
def test_mean_and_std(name):
    grey = torch.full((2, 3, 20, 20), 51, dtype=torch.uint8)
    result = transforms.build(name, 16, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5))(grey)
    for channel, value in enumerate((0.1, 0.0, -0.2)):
        torch.testing.assert_close(result[:, channel], torch.full((2, 16, 16), value))


@pytest.mark.parametrize(
    ("video", "text"),
    [
        (torch.zeros(2, 3, 8, 8), r"torch.float32 \[2, 3, 8, 8\]; expected torch.uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[3, 8, 8\]; expected"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"\[2, 4, 8, 8\]; expected"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "one of its dimensions is empty"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), "one of its dimensions is empty"),
    ],
)
def test_wrong_videos(video, text):
    with pytest.raises(VideoShapeError, match=text):
        transforms.build("released", 8)(video)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "best"},
        {"name": "clip", "size": 0},
        {"name": "clip", "size": 1.5},
        {"name": "clip", "std": (0, 1, 1)},
        {"name": "clip", "mean": (0.5,)},
        {"name": "train", "color_jitter": -0.1},
        {"name": "train", "color_jitter": float("nan")},
        {"name": "train", "color_jitter": (0.4, 0.4, 0.4)},
        {"name": "train", "color_jitter": (0.4, 0.4, 0.4, 0.6)},
        {"name": "released", "color_jitter": 0.4},
    ],
)
def test_wrong_settings(arguments):
    with pytest.raises(VideoOptionError) as caught:
        transforms.build(**arguments)
    assert isinstance(caught.value, (OpenVCLIPError, ValueError))


@pytest.mark.parametrize("shape", [(60, 90), (91, 60)])
@pytest.mark.parametrize("name", ["released", "clip"])
def test_three_crops_are_the_ends_and_the_middle_of_the_long_side(shape, name):
    video = pixels(2, 4, 3, *shape)
    actual = transforms.build(name, 32, short_side=40, crops=3)(video)
    assert actual.shape == (2, 3, 4, 3, 32, 32)
    alone = transforms.build(name, 32, short_side=40)(video)
    assert torch.equal(actual[:, 1], alone)
    for clip, crops in zip(video, actual, strict=True):
        for frame, frame_crops in zip(clip, crops.transpose(0, 1), strict=True):
            whole = resized_whole(name, frame, 40)
            across = shape[0] > shape[1]
            short = (whole.shape[-1] if across else whole.shape[-2]) - 32
            long = (whole.shape[-2] if across else whole.shape[-1]) - 32
            for place, crop in zip((0, None, long), frame_crops, strict=True):
                if place is None:
                    continue
                top, left = (place, short // 2) if across else (short // 2, place)
                expected = whole[..., top : top + 32, left : left + 32]
                torch.testing.assert_close(crop, expected, atol=2e-5, rtol=0)


def resized_whole(name, frame, short):
    """A frame with its short side at ``short``, normalised and not cropped."""
    height, width = frame.shape[-2:]
    scaled = (
        (math.floor(height / width * short), short)
        if width < height
        else (short, math.floor(width / height * short))
    )
    mode = "bilinear" if name == "released" else "bicubic"
    whole = torch.nn.functional.interpolate(
        frame[None] if name == "clip" else frame[None].float(),
        size=scaled,
        mode=mode,
        antialias=name == "clip",
        align_corners=False,
    )[0].float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (transforms.CLIP_MEAN, transforms.CLIP_STD))
    return (whole / 255 - mean) / std


def test_a_short_side_of_ones_own():
    video = pixels(3, 3, 80, 100)
    whole = released_reference(video, 40)  # the whole height, the middle 40 of the width
    actual = transforms.build("released", 32, short_side=40)(video)
    torch.testing.assert_close(actual, whole[..., 4:36, 4:36], atol=2e-5, rtol=0)
    fixed = transforms.build("train", 40, short_side=40, hflip=False)
    places = {
        tuple(fixed(video, torch.Generator().manual_seed(seed)).flatten()[:20].tolist())
        for seed in range(150)
    }
    assert len(places) == 11  # 50 - 40 + 1 places in the width, the height has no room
    same = transforms.build("train", 32, short_side=(32, 37))
    usual = transforms.build("train", 32)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(same(video, generators[0]), usual(video, generators[1]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "train", "crops": 3}, "crops=3 with 'train'"),
        ({"name": "clip", "crops": 2}, "crops=2 with 'clip': expected 1, or 3"),
        ({"name": "clip", "short_side": 200}, r"at least the size of the crop \(224\)"),
        ({"name": "train", "short_side": (256, 230)}, "the two ends of a range"),
        ({"name": "released", "short_side": (224, 256)}, "only 'train' accepts a range"),
    ],
)
def test_crops_and_short_sides_that_do_not_fit(arguments, text):
    with pytest.raises(VideoOptionError, match=text):
        transforms.build(**arguments)


# Report 45: float frames are never guessed at; the error says how to convert them.
@pytest.mark.parametrize(
    ("video", "advice"),
    [
        (torch.full((2, 3, 8, 8), 200.0), r"0 and 255: pass video\.round\(\)\.to\(torch.uint8\)"),
        (torch.full((2, 3, 8, 8), 0.5), r"0 and 1: pass \(video \* 255\)\.round\(\)\.to"),
        (torch.full((2, 3, 8, 8), 0.5, dtype=torch.float16), r"float16.*0 and 1: pass \(video"),
        (torch.full((2, 3, 8, 8), 7), r"int64.*0 and 255: pass video\.to\(torch.uint8\)"),
        (torch.full((2, 3, 8, 8), -1.5), "between -1.5 and -1.5; pass the pixels before the norm"),
        (torch.full((2, 3, 8, 8), math.nan), "between nan and nan; pass the pixels before"),
        (torch.zeros(2, 8, 9, 3), r"video\.movedim\(-1, -3\)"),
        (torch.zeros(2, 8, 9, 3, dtype=torch.uint8), r"video\.movedim\(-1, -3\)"),
        (torch.zeros(3, 4, 8, 9, dtype=torch.uint8), r"video\.transpose\(-3, -4\)"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), "Pass the pixels before"),
        (torch.zeros(2, 3, 8, 9, dtype=torch.complex64), "Pass the pixels before"),
    ],
)
@pytest.mark.parametrize("name", transforms.TRANSFORMS)
def test_frames_that_are_refused_with_advice(name, video, advice):
    with pytest.raises(VideoShapeError, match=advice):
        transforms.build(name, 4)(video)
