"""The reader on real footage: frames and pixels of the released path. Local data, not committed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from openvclip.video import read_clip, transforms
from tests.helpers import GOLDEN


def test_frames_and_pixels_of_the_released_path(clips, golden_sampling):
    av = pytest.importorskip("av")
    pixels = load_file(str(GOLDEN / "released_pixels.safetensors"))
    transform = transforms.build("released")
    assert len(golden_sampling) == 73
    for name, entry in golden_sampling.items():
        path = clips / name
        clip = read_clip(path, views=3)
        wanted = {index for view in entry["indices"] for allowed in view for index in allowed[:1]}
        decoded = {}
        with av.open(str(path), metadata_errors="ignore") as container:
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                    decoded[index] = picture.permute(2, 0, 1)
                if index == max(wanted):
                    break
        for view, expected in zip(clip, entry["indices"], strict=True):
            for frame, allowed in zip(view, expected, strict=True):
                assert torch.equal(frame, decoded[allowed[0]]), name

        with torch.no_grad():
            pooled = torch.nn.functional.adaptive_avg_pool2d(transform(clip).flatten(0, 1), 7)
        error = (pooled.unflatten(0, (3, 8)) - pixels[name].float()).abs().max()
        assert error < 2e-3, name


@pytest.mark.parametrize("sampler", ["uniform", "dense"])
def test_the_other_samplers_read_every_clip(sampler, clips, golden_sampling):
    generator = torch.Generator().manual_seed(0)
    for name in golden_sampling:
        clip = read_clip(clips / name, num_frames=4, sampler=sampler, generator=generator)
        assert clip.shape[:3] == (1, 4, 3)
        assert clip.dtype == torch.uint8
        assert clip.float().std() > 1, name
