"""The types of the public face. mypy checks this file; nothing runs it.

``assert_type`` fails if an expression has another type than the one written here, ``Any`` included.
``type: ignore`` marks a call that mypy must refuse: an unused one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from typing_extensions import assert_type

import openvclip
from openvclip import (
    CheckpointInfo,
    EMATracker,
    GaussianTracker,
    InterpolatedWeightRegularizer,
    LAWATracker,
    Prediction,
    SWATracker,
    VideoCLIP,
    ZeroShotClassifier,
)
from openvclip.checkpoints.contract import Contract
from openvclip.video import Sampling, VideoFrames

State = dict[str, Tensor]


class Model(nn.Module):
    """A model of the user."""


def a_model_keeps_its_type(model: Model, video: Tensor) -> None:
    assert_type(openvclip.expand_temporal_attention(model), Model)
    openvclip.expand_temporal_attention(model, window=2, boundary="mask", layers=slice(6, None))
    openvclip.expand_temporal_attention(model, boundary="wrap")  # type: ignore[arg-type]
    openvclip.expand_temporal_attention(model, 2)  # type: ignore[call-arg]
    assert_type(openvclip.restore_spatial_attention(model), Model)
    assert_type(openvclip.encode_video(model, video), Tensor)


def interpolation(model: nn.Module, clip: State, tuned: State) -> None:
    def by_name(name: str) -> float:
        return 1.0 if name.startswith("visual.") else 0.5

    chosen: openvclip.Lambda = by_name
    assert_type(openvclip.interpolate(clip, tuned, 0.5), State)
    assert_type(openvclip.interpolate(clip, model.state_dict(), chosen, out=tuned), State)
    openvclip.interpolate(clip, tuned)  # type: ignore[call-arg]
    openvclip.interpolate(clip, tuned, "0.5")  # type: ignore[arg-type]
    openvclip.interpolate_into(model, clip, tuned, openvclip.merging.visual_only(0.5))
    assert_type(openvclip.merging.slerp(clip, tuned, 0.5), State)


def training(model: nn.Module, clip: State, loss: Callable[[], Tensor]) -> None:
    iwr = InterpolatedWeightRegularizer(model, AdamW(model.parameters()), anchor=clip)
    assert_type(iwr.step(loss, max_grad_norm=1.0), Tensor)
    passes: AbstractContextManager[float] = iwr.interpolated()
    with passes as alpha:
        assert_type(alpha, float)
    InterpolatedWeightRegularizer(model, missing="ignore")  # type: ignore[arg-type]
    trackers = (
        SWATracker(model, every=10),
        EMATracker(model, decay=0.99),
        GaussianTracker(model, mu=1000, sigma=200),
        LAWATracker(model, k=3),
    )
    for tracker in trackers:
        assert_type(tracker.update(model), bool)
        assert_type(tracker.averaged_state_dict(), State)
        assert_type(tracker.state_dict(), dict[str, Any])
        with tracker.applied(model) as averaged:
            assert_type(averaged, nn.Module)
    SWATracker(model, 10)  # type: ignore[call-arg]


def files(path: Path, model: nn.Module, state: State) -> None:
    assert_type(openvclip.load_checkpoint(path, model), State)
    assert_type(openvclip.inspect_checkpoint(path), CheckpointInfo)
    assert_type(openvclip.convert_checkpoint(path, "converted.safetensors"), CheckpointInfo)
    openvclip.save_checkpoint(state, path, metadata={"epochs": "22"})
    openvclip.save_checkpoint(state, path, metadata={"epochs": 22})  # type: ignore[dict-item]
    openvclip.interpolate_files(path, path, [path, path], [0.0, 0.5])
    openvclip.average_files([path, "epoch-2.safetensors"], path)


def prediction(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], video: Tensor) -> None:
    classifier = ZeroShotClassifier(model, tokenizer, ["archery", "yoga"], ["a video of {}."])
    logits: Tensor = classifier(video)
    labels = ["archery", "yoga"]
    result = openvclip.predict(model, "clip.mp4", labels, sampling=Sampling(views=1))
    assert_type(result, Prediction)
    assert_type(result.top(2), list[tuple[str, float]])
    assert_type(result.probabilities, Tensor)
    assert_type(openvclip.video.read_clip("clip.mp4"), Tensor)
    assert_type(openvclip.video.read_clip(video, fps=30), Tensor)
    assert_type(openvclip.video.read_clips([b"", "clip.mp4"]), Iterator[Tensor])
    assert_type(openvclip.encode_video(model, video, pooling="frames"), Tensor)
    ZeroShotClassifier(model, tokenizer, labels, pooling="mean")  # type: ignore[arg-type]
    assert_type(openvclip.evaluation.evaluate(classifier, [(video, logits)]).n_clips, int)


def one_object(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], path: Path) -> None:
    clip = VideoCLIP(model, tokenizer, sampling=Sampling(views=1), pooling="frames")
    labels = ["archery", "yoga"]
    frames = VideoFrames([torch.zeros(1)], fps=30)
    assert_type(clip.classify("clip.mp4", labels), Prediction)
    assert_type(clip.classify(b"", labels), Prediction)
    assert_type(clip.classify(torch.zeros(1), labels, fps=30), Prediction)
    assert_type(clip.classify(path, labels), Prediction)
    assert_type(clip.classify(frames, labels), Prediction)
    paths: list[Path] = [path]
    assert_type(clip.classify(paths, labels), list[Prediction])
    assert_type(clip.classify(["clip.mp4", frames], labels, num_threads=4), list[Prediction])
    assert_type(clip.encode_video(paths), Tensor)
    assert_type(clip.encode_text("a horse race"), Tensor)
    assert_type(clip.classifier(labels), ZeroShotClassifier)
    assert_type(clip.to("cuda"), VideoCLIP)
    assert_type(clip.contract, Contract)
    clip.classify("clip.mp4")  # type: ignore[call-overload]
    clip.classify(3, labels)  # type: ignore[call-overload]
    VideoCLIP(model, tokenizer, pooling="mean")  # type: ignore[arg-type]
