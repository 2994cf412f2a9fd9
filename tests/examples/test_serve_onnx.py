"""The example that serves an exported model without PyTorch, beside openvclip's own reading."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openvclip.checkpoints import Confidence, Contract
from openvclip.models import ExportFacts
from openvclip.models.usage import frames_section, pixels_section
from openvclip.video import read_clip
from openvclip.video.sampling import Sampling
from openvclip.video.transforms import Transform, build
from tests.helpers import REPO
from tests.video.mp4 import with_matrix

pytest.importorskip("av")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SCRIPT = REPO / "examples" / "serve_onnx.py"
LABELS = ("red", "green", "blue")


@contextmanager
def without_torch() -> Iterator[None]:
    """Within the block, neither torch nor openvclip can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch", "openvclip"):
            patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names of the script."""
    with without_torch():
        return runpy.run_path(str(SCRIPT))


def write_video(path: Path, frames: int, width: int, height: int, fps: int) -> Path:
    """Smooth noise that moves, and whose colours change."""
    import av

    generator = np.random.default_rng(frames)
    small = generator.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    large = small.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            moved = np.roll(large, 3 * number, axis=1)[:height, :width]
            picture = np.ascontiguousarray((moved + 9 * number) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    wide = write_video(folder / "wide.mp4", 50, 96, 64, 25)
    (folder / "turned.mp4").write_bytes(with_matrix(wide.read_bytes(), 0, 1, -1, 0))
    return {
        "wide": wide,
        "turned": folder / "turned.mp4",
        "tall, short": write_video(folder / "tall.mp4", 5, 48, 80, 30),
        "mkv": write_video(folder / "wide.mkv", 40, 80, 80, 24),
        "avi": write_video(folder / "wide.avi", 33, 64, 48, 30),
    }


CASES = [
    ("wide", Sampling(4, 4, 30, 3), build("released", 32)),
    ("wide", Sampling(3, views=2, sampler="uniform"), build("clip", 32, crops=3)),
    ("turned", Sampling(2, 3, 24, 1), build("released", 32, short_side=40, crops=3)),
    ("tall, short", Sampling(4, 2, 30, 2), build("squash", 32)),
    ("tall, short", Sampling(1, 2, 30, 1), build("squash_bilinear", 32)),
    ("mkv", Sampling(4, 4, 30, 3), build("released", 96)),  # enlarged
    ("mkv", Sampling(4, 4, 30, 1), build("clip", 32, short_side=48)),
    ("avi", Sampling(4, 4, 30, 2), build("released", 32)),
    ("avi", Sampling(4, sampler="uniform"), build("released", 32)),
]


@pytest.mark.parametrize(("name", "sampling", "transform"), CASES)
def test_frames_and_pixels_are_those_of_openvclip(
    example: dict[str, Any],
    videos: dict[str, Path],
    name: str,
    sampling: Sampling,
    transform: Transform,
) -> None:
    expected = read_clip(videos[name], **vars(sampling), transform=transform).flatten(0, -5)
    views = example["read"](videos[name].read_bytes(), asdict(frames_section(sampling)))
    rule, facts = asdict(pixels_section(transform)), {"pixels": "float"}
    crops = np.stack([crop for view in views for crop in example["crops"](view, rule, facts)])
    assert crops.dtype == np.float32
    difference = np.abs(crops - expected.numpy())
    # 8-bit pixels can differ by one level, where a value lies between two
    level = 0 if transform.name == "released" else 1.01 / 255 / min(transform.std)
    assert difference.max() <= level + 1e-4
    assert (difference > 1e-4).mean() < 0.01


def write_model(path: Path, contract: Contract, pixels: str) -> Path:
    """An ONNX file whose logits are the mean of each colour."""
    helper, kinds = onnx.helper, onnx.TensorProto
    kind = kinds.UINT8 if pixels == "uint8" else kinds.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["frames"], ["floats"], to=kinds.FLOAT),
            helper.make_node("ReduceMean", ["floats", "axes"], ["logits"], keepdims=0),
        ],
        "means",
        [helper.make_tensor_value_info("frames", kind, ["clips", "frames", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["clips", 3])],
        [helper.make_tensor("axes", kinds.INT64, [3], [1, 3, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    facts = ExportFacts("labels", pixels, labels=LABELS)
    helper.set_model_props(model, facts.texts(contract))
    onnx.save(model, str(path))
    return path


SAMPLING, TRANSFORM = Sampling(4, 4, 30, 3), build("released", 32)
CONTRACT = Contract(
    library="open_clip",
    model="tiny",
    pixels=pixels_section(TRANSFORM),
    templates=("{}",),
    frames=frames_section(SAMPLING),
    confidence=Confidence(temperature=0.1),
)


def test_predictions_of_files_and_of_requests(
    example: dict[str, Any],
    videos: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, video = write_model(tmp_path / "model.onnx", CONTRACT, "float"), videos["wide"]
    clips = read_clip(video, **vars(SAMPLING), transform=TRANSFORM)
    expected = (clips.mean((0, 1, 3, 4)) / 0.1).softmax(0)
    shares = example["load"](str(model))(video.read_bytes())
    assert tuple(shares) == LABELS
    torch.testing.assert_close(torch.tensor(list(shares.values())), expected, rtol=1e-3, atol=1e-5)

    with without_torch():
        example["main"]([str(model), str(video)])
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == str(video)
    assert [row.split()[1] for row in rows] == sorted(LABELS, key=lambda label: -shares[label])
    assert rows[0].split()[0] == f"{max(shares.values()):.1%}"

    server = ThreadingHTTPServer(("localhost", 0), example["Handler"])
    example["Handler"].log_message = lambda *args: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://localhost:{server.server_port}"
    try:
        with urllib.request.urlopen(address, video.read_bytes()) as answer:
            assert json.load(answer) == shares
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, b"no video")
        with refused.value as answer:
            assert answer.code == 400
            assert "error" in json.load(answer)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_8_bit_frames(example: dict[str, Any], videos: dict[str, Path], tmp_path: Path) -> None:
    clip_pixels = build("clip", 32)
    contract = CONTRACT.with_(pixels=pixels_section(clip_pixels))
    predict = example["load"](str(write_model(tmp_path / "model.onnx", contract, "uint8")))
    clips = read_clip(videos["wide"], **vars(SAMPLING), transform=clip_pixels)
    mean, std = (torch.tensor(x)[:, None, None] for x in (clip_pixels.mean, clip_pixels.std))
    colours = (255 * (clips * std + mean)).mean((0, 1, 3, 4))
    shares = torch.tensor(list(predict(videos["wide"].read_bytes()).values())).log()
    differences = (colours - colours.max()) / 0.1  # the softmax is 0 or 1, so compare its logarithm
    kept = differences > -80
    torch.testing.assert_close(shares[kept], differences.log_softmax(0)[kept], rtol=1e-2, atol=0.3)


def test_a_short_file_that_imports_no_torch() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 150
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"av", "numpy", "onnxruntime"}
