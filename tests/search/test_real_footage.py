"""Real video files are indexed, searched by sentences, pictures and clips, and cut."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from openvclip import VideoCLIP, expand_temporal_attention
from openvclip.search import Clip, Index, WindowOptions, cut_moments
from openvclip.video import Sampling
from openvclip.video.excerpts import pictures_at, stream_facts
from tests.helpers import CLIPS, needs_clips

pytest.importorskip("av")


def shapes_clip() -> VideoCLIP:
    from examples.shapes.model import create_model

    model, tokenizer = create_model()
    return VideoCLIP(expand_temporal_attention(model), tokenizer, sampling=Sampling(num_frames=4))


def random_vit() -> VideoCLIP:
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 1  # of its 12, to save time
    torch.manual_seed(0)
    model = expand_temporal_attention(open_clip.CLIP(**config))
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    return VideoCLIP(model, tokenizer, sampling=Sampling(num_frames=2))


@needs_clips
@pytest.mark.parametrize("model_of", [shapes_clip, random_vit])
def test_real_clips_are_indexed_and_found(model_of: type, tmp_path: Path) -> None:
    model = model_of()
    index = Index.create(tmp_path / "x.ovx", model, windows=WindowOptions(seconds=4.0))
    report = index.add(CLIPS)
    assert (len(report.added), report.failed) == (73, {})
    lengths = {path: stream_facts(path).seconds for path in index.videos}

    found = index.search("a person riding a horse", k=10**6)
    assert {moment.path for moment in found} <= set(index.videos)
    assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
    for moment in found:
        length = lengths[moment.path]
        assert 0 <= moment.start <= moment.peak <= moment.end
        assert length is None or moment.end <= length + 0.5

    for path in index.videos[::24]:
        # The frames of a window of the index, decoded another way, are most similar to it.
        best = index.search(Clip(path, 0.0, 2.0), k=1)[0]
        assert (best.path, best.score > 0.9) == (path, True)
        (picture,) = pictures_at(path, [0.5])
        assert index.search(picture.pixels, k=1)[0].score <= 1.0
    cut = cut_moments(found[:2], tmp_path / "cuts")
    assert (len(cut.files), cut.failed) == (2, {})
