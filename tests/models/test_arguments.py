"""Wrong arguments of VideoCLIP and its functions: one of our errors, with what to do, at once."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import openvclip
from openvclip import VideoCLIP
from openvclip.checkpoints import Contract, Expansion, Frames, read_contract
from openvclip.errors import (
    ClassNamesError,
    ContractError,
    HubError,
    OpenVCLIPError,
    UnsupportedModelError,
    UsageError,
    VideoError,
    VideoOptionError,
    VideoShapeError,
)
from openvclip.models.classifier import ZeroShotClassifier
from openvclip.models.exported_writing import Program, write_onnx
from openvclip.models.folders import StoredModel
from openvclip.models.usage import expand_as
from openvclip.video import Sampling, VideoFrames, read_clip, transforms
from openvclip.video import _inputs as inputs
from openvclip.video.ahead import in_order
from openvclip.video.sliding import sliding_windows
from tests.helpers import tiny_clip, tiny_tokenizer
from tests.models.stored_models import PLAIN, of_open_clip

LABELS = ["archery", "surfing"]
WRONG_PATHS = [None, 3, "", b"folder", [], "a\0b"]


def frames(count: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 255, (count, 12, 16, 3), dtype=np.uint8)


VIDEO = VideoFrames(frames(), 30)


@pytest.fixture(scope="module")
def stored() -> StoredModel:
    return of_open_clip(PLAIN)


@pytest.fixture(scope="module")
def clip(stored: StoredModel) -> VideoCLIP:
    return VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)


@pytest.fixture(scope="module")
def folder(clip: VideoCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    clip.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sampling": 5}, VideoOptionError, r"sampling is 5; expected .*Sampling\("),
        ({"transform": lambda x: x}, VideoOptionError, "transform is .* expected .*transform_for"),
        ({"contract": "runs/b16"}, UsageError, "contract is 'runs/b16'; .*read_contract"),
        ({"templates": 3}, ClassNamesError, "templates is 3; expected a list"),
        ({"templates": [3]}, ClassNamesError, "templates holds 3; expected a text"),
        ({"templates": []}, ClassNamesError, "templates is empty"),
        ({"templates": ["a video"]}, ClassNamesError, r"'a video' has no \{\}"),
        ({"tokenizer": 5}, UsageError, "tokenizer is a int"),
        ({"pooling": 4}, UsageError, "pooling=4"),
    ],
)
def test_the_constructor(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        VideoCLIP(tiny_clip(), **{"tokenizer": tiny_tokenizer, **options})


def test_a_template_that_returns_no_text() -> None:
    with pytest.raises(ClassNamesError, match="returned 3 for 'a'; expected a text"):
        ZeroShotClassifier(tiny_clip(), tiny_tokenizer, ["a"], [lambda name: 3])  # type: ignore[list-item, return-value]


@pytest.mark.parametrize("path", WRONG_PATHS, ids=repr)
def test_paths(clip: VideoCLIP, path: Any) -> None:
    calls: list[tuple[str, Callable[[], object]]] = [
        ("source", lambda: VideoCLIP.from_pretrained(path)),
        ("folder", lambda: clip.save_pretrained(path)),
        ("folder", lambda: clip.describe_folder(path, "w.safetensors")),
        ("path", lambda: clip.export(path)),
        ("path", lambda: read_contract(path)),
    ]
    if path is not None:
        calls.append(("pretrained", lambda: VideoCLIP.from_pretrained("ViT-B-32", path)))
    for name, call in calls:
        with pytest.raises(UsageError, match=f"^{name}=.*: expected"):
            call()


def test_sources_that_name_nothing() -> None:
    for source in ("local-dir:", "x" * 5000, "hf-hub:", "transformers:"):
        with pytest.raises(OpenVCLIPError):
            VideoCLIP.from_pretrained(source)


def test_the_repository_of_an_upload(clip: VideoCLIP) -> None:
    with pytest.raises(HubError, match="None is not the name of a repository"):
        clip.push_to_hub(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["nope", None, 3.5, True, "meta", "cuda:99"], ids=repr)
def test_devices(clip: VideoCLIP, folder: Path, device: Any) -> None:
    with pytest.raises(UsageError, match=r"^device=") as caught:
        VideoCLIP.from_pretrained(folder, device=device)
    assert "expected a device of this machine, such as 'cpu'" in str(caught.value)
    with pytest.raises(UsageError, match="device="):
        clip.to(device)
    assert clip.device.type == "cpu"


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"base": "ViT-B-16"}, r"base is 'ViT-B-16' in the contract; expected .*Base\("),
        ({"confidence": 0.3}, r"confidence is 0.3 in the contract; expected .*Confidence\("),
        ({"frames": Frames(num_frames=4), "lam": math.nan}, "lam is nan"),
        ({"results": {"top1": math.inf}}, "can't be written as JSON"),
        ({"config": 3}, "config=3: expected"),
        ({"title": 3}, "title=3: expected a text"),
        ({"title": "\ud800"}, "title=.* expected a text"),
    ],
    ids=str,
)
def test_what_is_saved(clip: VideoCLIP, facts: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(OpenVCLIPError, match=text):
        clip.save_pretrained(tmp_path / "out", **facts)
    assert not any(tmp_path.glob("out/*.safetensors"))


def test_models_and_frames_without_values(tmp_path: Path) -> None:
    meta = VideoCLIP(tiny_clip().to("meta"), tiny_tokenizer)
    for call in (
        lambda: meta.classify(VIDEO, LABELS),
        lambda: meta.timeline(VIDEO, LABELS),
        lambda: meta.encode_video(VIDEO),
        lambda: meta.encode_text("a"),
        lambda: meta.export(tmp_path / "a.pt2"),
        lambda: meta.save_pretrained(tmp_path / "out"),
        lambda: openvclip.predict(meta.model, VIDEO, LABELS, tokenizer=tiny_tokenizer),
    ):
        with pytest.raises(UsageError, match=r"no values in \d+ weights.*meta device"):
            call()
    clip = VideoCLIP(tiny_clip(), tiny_tokenizer)
    empty = torch.empty(8, 3, 12, 16, dtype=torch.uint8, device="meta")
    for read in (
        lambda: clip.classify(empty, LABELS, fps=30),
        lambda: clip.timeline(empty, LABELS, fps=30),
        lambda: clip.encode_image(empty[0]),
        lambda: read_clip(empty, fps=30),
    ):
        with pytest.raises(VideoShapeError, match="meta device and has no values"):
            read()


LABEL_ERRORS = [
    ("archery", "labels is one string"),
    ([], "labels is empty"),
    ([3], r"labels\[0\] is 3"),
    (["a", "a"], "Labels occur more than once: 'a'"),
    (None, "labels is None"),
]


@pytest.mark.parametrize(("labels", "text"), LABEL_ERRORS, ids=repr)
def test_an_error_about_labels_speaks_of_labels(clip: VideoCLIP, labels: Any, text: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: clip.classify(VIDEO, labels),
        lambda: clip.timeline(VIDEO, labels),
        lambda: clip.calibrate([VIDEO], labels),
        lambda: clip.classifier(labels),
        lambda: openvclip.predict(clip.model, VIDEO, labels),
    ]
    for call in calls:
        with pytest.raises((ClassNamesError, UsageError), match=text):
            call()


def test_background_texts_can_be_an_iterator_and_must_be_a_list(clip: VideoCLIP) -> None:
    want = clip.classify(VIDEO, LABELS, background=["a hand"])
    got = clip.classify(VIDEO, LABELS, background=iter(["a hand"]))
    assert got.background == want.background != {}
    for wrong in (None, 3):
        with pytest.raises(ClassNamesError, match=f"background is {wrong}; expected a list"):
            clip.classify(VIDEO, LABELS, background=wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 0}, UsageError, "batch_size=0"),
        ({"batch_size": 1.5}, UsageError, "batch_size=1.5"),
        ({"seconds": "x"}, VideoOptionError, "seconds='x'"),
        ({"step": "x"}, VideoOptionError, "step='x'"),
        ({"step": 1e-9}, VideoOptionError, "more than 100000 windows begin"),
    ],
)
def test_the_windows_of_a_timeline(
    clip: VideoCLIP, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        clip.timeline(VIDEO, LABELS, **options)


def test_wrong_targets_are_an_error_before_videos_are_read(clip: VideoCLIP, tmp_path: Path) -> None:
    absent = [tmp_path / "absent.mp4"] * 2
    for targets, text in (
        (3, "targets is 3"),
        (["archery"], "1 targets are given for 2 clips"),
        (["archery", "yoga"], "'yoga' is not one of"),
    ):
        with pytest.raises(UsageError, match=text):
            clip.calibrate(absent, LABELS, targets)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep='x'"):
        clip.calibrate(absent, LABELS, keep="x")  # type: ignore[arg-type]


def test_a_threshold_can_be_a_number_of_numpy(clip: VideoCLIP) -> None:
    got = clip.classify(VIDEO, LABELS, reject=np.float32(0.5))
    assert got.rejected == clip.classify(VIDEO, LABELS, reject=0.5).rejected
    with pytest.raises(UsageError, match=r"reject=(np\.)?True_?: expected"):
        clip.classify(VIDEO, LABELS, reject=np.True_)


HUGE: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"frames": {"num_frames": 10**9}}, "num_frames=1000000000"),
    ({"frames": {"views": 10**9}}, "views=1000000000"),
    ({"frames": {"num_frames": 2**9, "views": 2**9}}, "more than 65536 frames"),
    ({"frames": {"sampling_rate": 10**9}}, "sampling_rate=1000000000"),
    ({"frames": {"target_fps": 1e300}}, r"target_fps=1e\+300"),
    ({"frames": {"target_fps": 1e-300}}, "target_fps=1e-300"),
    ({"pixels": {"size": 10**9}}, "size=1000000000"),
    ({"pixels": {"short_side": 10**9}}, "short_side=1000000000"),
    ({"pixels": {"crops": 10**9}}, "crops=1000000000"),
    ({"pixels": {"std": (1e-300,) * 3}}, "std above 0"),
    ({"expansion": {"window": 10**9}}, "window=1000000000"),
    ({"frames": {"num_frames": 2**15}, "pixels": {"size": 2**12}}, "A video would be 1,6"),
]


@pytest.mark.parametrize(("changes", "text"), HUGE, ids=str)
def test_what_no_memory_holds_is_refused(
    stored: StoredModel, changes: dict[str, dict[str, Any]], text: str
) -> None:
    contract = stored.contract
    sections = {name: replace(getattr(contract, name), **new) for name, new in changes.items()}
    contract = Contract.from_json(contract.with_(**sections).to_json(), "here")

    def use() -> None:
        expand_as(tiny_clip(), contract.with_(expansion=contract.expansion or Expansion()))
        VideoCLIP(stored.model, stored.tokenizer, contract=contract)

    with pytest.raises((ContractError, VideoOptionError), match=text):
        use()


def test_the_bounds_are_those_of_the_documentation() -> None:
    assert Sampling(num_frames=2**14, views=4).views == 4
    assert transforms.build("clip", 2**14).size == 2**14
    with pytest.raises(VideoOptionError, match="fps=1e-300"):
        VideoFrames(frames(), 1e-300)
    with pytest.raises(VideoOptionError, match=r"mean=\(nan"):
        transforms.build("clip", 8, mean=(math.nan,) * 3)
    with pytest.raises(VideoOptionError, match="more than 100000 windows"):
        list(sliding_windows(frames(), transform=lambda x: x, fps=1e-9))


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4"


def test_a_server_that_never_answers(
    clip: VideoCLIP, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("av")
    monkeypatch.setattr(inputs, "_SILENCE", 0.2)
    with pytest.raises(VideoError, match=r"no answer for 0.2 seconds|can't open it"):
        clip.classify(silent, LABELS)
    with pytest.raises(VideoError, match=r"^videos\[0\]: "):
        clip.classify([silent, silent], LABELS)


def test_an_interrupt_does_not_wait_for_a_video_that_is_read() -> None:
    """Ctrl-C while a server does not answer: the threads end later."""
    answer, ended = threading.Event(), threading.Event()

    def read(item: int) -> int:
        answer.wait(20)
        ended.set()
        return item

    def items() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_order(read, items(), 2))
    assert not ended.is_set()
    answer.set()
    assert ended.wait(20)


def test_frozen_weights_change_results_by_rounding_alone(stored: StoredModel) -> None:
    model = VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)
    want = model.classify(VIDEO, LABELS).probabilities, model.encode_text(LABELS)
    before = [parameter.requires_grad for parameter in stored.model.parameters()]
    try:
        stored.model.requires_grad_(False)
        frozen = VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)
        got = frozen.classify(VIDEO, LABELS).probabilities, frozen.encode_text(LABELS)
    finally:
        for parameter, trained in zip(stored.model.parameters(), before, strict=True):
            parameter.requires_grad_(trained)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", ["x", 0, True, 1.5])
def test_a_version_of_onnx_that_is_no_version(clip: VideoCLIP, opset: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"opset=.*expected a whole number"):
        clip.export(tmp_path / "a.onnx", opset=opset)


def test_a_version_of_onnx_that_pytorch_does_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch writes its own version if it can't write the version that is asked for."""
    written = SimpleNamespace(model=SimpleNamespace(opset_imports={"": 18}))
    monkeypatch.setattr(torch.onnx, "export", lambda *program, **options: written)
    with pytest.raises(UnsupportedModelError, match=r"opset=1: PyTorch writes .* leave opset out"):
        write_onnx(Program(None, ("a", "b"), {}, []), tmp_path / "a.onnx", {}, None, opset=1)  # type: ignore[arg-type]
    assert not (tmp_path / "a.onnx").exists()
