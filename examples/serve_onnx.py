r"""Predict the labels of videos with an exported model, without PyTorch.

    python serve_onnx.py model.onnx clip.mp4 other.mp4     # prints the most probable labels
    python serve_onnx.py model.onnx --port 8000 # curl --data-binary @clip.mp4 http://localhost:8000

``model.export("model.onnx", labels=["archery", "surfing"])`` writes the model (docs/deploy.md). The
file says which frames and pixels the model takes. Install: ``pip install onnxruntime av numpy``.
"""

import argparse
import io
import json
import math
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime


def load(path: str) -> Callable[[bytes], dict[str, float]]:
    """Return a function from the bytes of a video file to the probabilities of the labels."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    contract, facts = (json.loads(texts[key]) for key in ("openvclip", "openvclip_export"))
    temperature = (contract["confidence"] or {}).get("temperature", 1.0)

    def predict(data: bytes) -> dict[str, float]:
        views = read(data, contract["frames"])
        clips = [crop for view in views for crop in crops(view, contract["pixels"], facts)]
        logits = session.run(None, {"frames": np.stack(clips)})[0].mean(axis=0) / temperature
        shares = np.exp(logits - logits.max())
        return dict(zip(facts["labels"], (shares / shares.sum()).tolist(), strict=True))

    return predict


def read(data: bytes, rule: dict[str, Any]) -> list[list[np.ndarray]]:
    """Return the pictures of each view that the contract asks for, uint8 ``[H, W, 3]``."""
    # The file can't make FFmpeg open other files. A title in an old encoding does not matter.
    safe: dict[str, Any] = {"options": {"protocol_whitelist": "none"}, "metadata_errors": "ignore"}
    with av.open(io.BytesIO(data), **safe) as file:
        stream = file.streams.video[0]
        ticks = [number if f.pts is None else f.pts for number, f in enumerate(file.decode(stream))]
        if not ticks:
            raise ValueError("the file has no frames")
        views = choose(ticks, stream, float(stream.average_rate or 30), rule)
    with av.open(io.BytesIO(data), **safe) as file:
        frames = {n: f for n, f in enumerate(file.decode(video=0)) if any(n in v for v in views)}
    upright = {
        n: np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for n, f in frames.items()
    }
    return [[upright[number] for number in view] for view in views]


def choose(ticks: list[int], stream: Any, fps: float, rule: dict[str, Any]) -> list[list[int]]:
    """Return the numbers of the frames of each view; ``ticks`` are the times of all frames."""
    count, views, total = rule["num_frames"], rule["views"], len(ticks)
    if rule["sampler"] == "uniform":  # the frames span the whole video
        size = (stream.frames if "avi" in stream.container.format.name else total) / count
        spread = [(np.arange(count) + (view + 0.5) / views) * size for view in range(views)]
        return [numbers.clip(0, total - 1).astype(int).tolist() for numbers in spread]
    if rule["sampler"] != "released":
        raise ValueError(f"the sampler is {rule['sampler']!r}; expected released or uniform")
    length = count * rule["sampling_rate"] / rule["target_fps"] * fps
    if not stream.frames or not stream.duration:  # views are placed by number
        spare = max(total - length, 0)
        starts = [spare // 2] if views == 1 else [spare // (views - 1) * v for v in range(views)]
        spread = [np.linspace(s, s + max(length - 1, 0), count).clip(0, total - 1) for s in starts]
        return [numbers.astype(int).tolist() for numbers in spread]
    span = max(1, math.ceil(rule["sampling_rate"] * (count - 1) / rule["target_fps"] * fps))
    step, origin, result = stream.duration / stream.frames, stream.start_time or 0, []
    for start in (max(stream.frames - span, 0) * view / views for view in range(views)):
        first, last = origin + int(start * step), origin + int((start + span - 1) * step)
        end = 1 + next((number for number, tick in enumerate(ticks) if tick > last), total)
        inside = [(t, n) for n, t in enumerate(ticks[:end]) if t >= first] or [(0, total - 1)]
        offsets = np.linspace(0, max(length - 1, 0), count).clip(0, len(inside) - 1).astype(int)
        result.append([sorted(inside)[offset][1] for offset in offsets])
    return result


def crops(view: list[np.ndarray], rule: dict[str, Any], facts: dict[str, Any]) -> list[Any]:
    """Return the crops of a view as the model takes them, ``[T, 3, size, size]``."""
    size, name, sides = rule["size"], rule["name"], view[0].shape[:2]
    short, whole = rule["short_side"] or size, facts["pixels"] == "uint8"
    scaled = [max(short, math.floor(side / min(sides) * short)) for side in sides]
    scaled = [size, size] if name.startswith("squash") else scaled
    smooth = name != "released"  # the other transforms resize with antialiasing, to 8 bits
    linear = not smooth or name.endswith("bilinear")
    down, right = (weights(*pair, linear, smooth) for pair in zip(sides, scaled, strict=True))
    rows = np.einsum("tjkc,lk->tcjl", np.stack(view), right, optimize=True)
    frames = down @ (np.clip(np.round(rows), 0, 255) if smooth else rows)
    frames = np.clip(np.round(frames), 0, 255) if smooth or whole else frames
    room = [side - size for side in scaled]
    middle = [(round if smooth else math.ceil)(side / 2) for side in room]
    corners = [list(middle) for _ in range(rule["crops"])]
    if rule["crops"] == 3:  # at the centre and at both ends of the longer side
        corners[0][room[0] <= room[1]], corners[2][room[0] <= room[1]] = 0, max(room)
    mean, std = (255 * np.array(rule[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    frames = frames.astype(np.uint8) if whole else ((frames - mean) / std).astype(np.float32)
    return [frames[..., y : y + size, x : x + size] for y, x in corners]


def weights(size: int, to: int, linear: bool, smooth: bool) -> Any:
    """Return the matrix ``[to, size]`` that resizes a side of a picture."""
    centres = (np.arange(to)[:, None] + 0.5) * size / to
    x = np.abs(np.arange(size) + 0.5 - centres) / (max(size / to, 1.0) if smooth else 1.0)
    cubic = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    kernel = np.maximum(1 - x, 0) if linear else np.where(x < 2, cubic, 0)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


class Handler(BaseHTTPRequestHandler):
    """Answers a posted video file with the probabilities of the labels."""

    predict: Callable[[bytes], dict[str, float]]

    def do_POST(self) -> None:
        """Answer a request."""
        try:
            length = min(int(self.headers["Content-Length"]), 2**28)
            answer, status = json.dumps(self.predict(self.rfile.read(length))), 200
        except (OSError, ValueError, TypeError) as error:
            answer, status = json.dumps({"error": str(error)}), 400
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())


def main(arguments: list[str] | None = None) -> None:
    """Predict the labels of files, or serve requests."""
    parser = argparse.ArgumentParser(prog="serve_onnx.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="an exported model with labels, .onnx")
    parser.add_argument("videos", nargs="*", help="video files")
    parser.add_argument("--port", type=int, help="serve requests at this port")
    args = parser.parse_args(arguments)
    Handler.predict = predict = staticmethod(load(args.model))
    for path in args.videos:
        shares = sorted(predict(Path(path).read_bytes()).items(), key=lambda item: -item[1])
        print(path, *(f"{share:6.1%}  {label}" for label, share in shares[:5]), sep="\n")
    if args.port is not None:
        ThreadingHTTPServer(("localhost", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
