"""The adapter for mteb: features of batches as mteb gives them. mteb itself is not needed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import openvclip
from openvclip.video import Sampling, VideoFrames
from tests.helpers import REPO, tiny_clip, tiny_tokenizer

SCRIPT = runpy.run_path(str(REPO / "examples" / "mteb_video.py"))


def model() -> openvclip.VideoCLIP:
    sampling = Sampling(num_frames=3, sampler="seconds")
    return openvclip.VideoCLIP(tiny_clip(), tiny_tokenizer, sampling=sampling)


def videos(n: int) -> list[VideoFrames]:
    generator = np.random.default_rng(0)
    return [
        VideoFrames(generator.integers(0, 255, (4 + 5 * i, 8, 8, 3), np.uint8), fps=2)
        for i in range(n)
    ]


def test_batches_of_each_kind() -> None:
    encoder, clips = SCRIPT["VideoEncoder"](model(), "me/tiny"), videos(3)
    texts = ["a man", "a dog", "a horse"]
    batches: list[dict[str, Any]] = [{"video": clips[:2], "id": ["a", "b"]}, {"video": clips[2:]}]
    video = torch.from_numpy(encoder.encode(batches, task_metadata=None, hf_split="test"))
    torch.testing.assert_close(video, model().encode_video(clips))
    text = torch.from_numpy(encoder.encode([{"text": texts}]))
    torch.testing.assert_close(text, model().encode_text(texts))
    both = torch.from_numpy(encoder.encode([{"text": texts, "video": clips}]))
    torch.testing.assert_close(both, torch.nn.functional.normalize(text + video, dim=-1))
    with pytest.raises(ValueError, match=r"inputs with \['audio'\]"):
        encoder.encode([{"audio": [0]}])
    expected = text @ video.T
    torch.testing.assert_close(encoder.similarity(text.numpy(), video), expected)
    torch.testing.assert_close(encoder.similarity_pairwise(text, video), expected.diagonal())


def test_columns_of_datasets_that_are_not_decoded() -> None:
    assert SCRIPT["source"]({"bytes": b"film", "path": None}) == b"film"
    assert SCRIPT["source"]({"bytes": None, "path": "film.mp4"}) == "film.mp4"
    decoder = object()
    assert SCRIPT["source"](decoder) is decoder


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a module in place of mteb, which calls the encoder as mteb does."""

    def evaluate(encoder: Any, tasks: list[str], encode_kwargs: Any) -> Any:
        assert encode_kwargs == {"batch_size": 4}
        assert encoder.model.sampling == Sampling(num_frames=7, sampler="seconds")
        score = float(Tensor(encoder.encode([{"text": ["a"]}])).norm())
        results = [SimpleNamespace(task_name=name, get_score=lambda: score) for name in tasks]
        return SimpleNamespace(task_results=results)

    stub = SimpleNamespace(get_tasks=lambda tasks: tasks, evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "mteb", stub)  # type: ignore[arg-type]
    monkeypatch.setattr(openvclip.VideoCLIP, "from_pretrained", lambda _: model())
    SCRIPT["main"]([str(tmp_path), "MSRVTTT2V", "--frames", "7", "--batch-size", "4"])
    assert capsys.readouterr().out == "MSRVTTT2V: 1.0000\n"
