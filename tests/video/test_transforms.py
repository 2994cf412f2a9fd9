from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openvclip.errors import OpenVCLIPError, VideoShapeError
from openvclip.video import VideoOptionError, transforms


def pixels(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape[:-2], 9, 11, generator=generator)
    smooth = torch.nn.functional.interpolate(
        coarse.flatten(0, -4), size=shape[-2:], mode="bicubic"
    ).clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8).view(shape)


def released_reference(video, size):
    """facts.json word for word: /255, mean and std, bilinear short side, floor, centre crop."""
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
    found = transforms.build("released", size)(video)
    torch.testing.assert_close(found, released_reference(video, size), atol=2e-5, rtol=0)
    assert found.shape == (5, 3, size, size)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("shape", [(240, 320), (320, 241), (224, 301), (100, 90)])
def test_clip_equals_clips_own_preprocessing(shape):
    image = pytest.importorskip("PIL.Image")
    video = pixels(2, 3, *shape)
    found = transforms.build("clip")(video)
    height, width = shape
    short = min(shape)
    scaled = (int(224 * height / short), int(224 * width / short))
    for frame, result in zip(video, found, strict=True):
        picture = image.fromarray(frame.permute(1, 2, 0).numpy())
        small = np.asarray(picture.resize(scaled[::-1], image.BICUBIC))
        top, left = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
        small = small[top : top + 224, left : left + 224]
        mean, std = np.array(transforms.CLIP_MEAN), np.array(transforms.CLIP_STD)
        grey_levels = result.permute(1, 2, 0).numpy() * std * 255 + mean * 255
        difference = np.abs(grey_levels - small)
        # both compute in fixed point, with roundings of their own
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
    ],
)
def test_wrong_settings(arguments):
    with pytest.raises(VideoOptionError) as caught:
        transforms.build(**arguments)
    assert isinstance(caught.value, (OpenVCLIPError, ValueError))
