"""Predictions, search and merges of files with a model on the device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from openvclip import VideoCLIP, interpolate, interpolate_files, load_checkpoint, save_checkpoint
from openvclip.search import Index
from tests.device.checks import Checks, Setup, Skip
from tests.helpers import assert_same_state, same_bits, tiny_clip
from tests.on_device import exact_kernels
from tests.search.small_index import WINDOWS, tiny_model, write_video

CHECKS = Checks()
LABELS = ["a cat", "a dog", "rain"]


def videos(setup: Setup) -> list[str]:
    """Return three short videos."""
    if importlib.util.find_spec("av") is None:
        raise Skip("PyAV is not installed")
    folder = setup.folder / "videos"
    paths = [folder / f"{seed}.mp4" for seed in range(3)]
    return [
        str(path if path.exists() else write_video(path, 30, i)) for i, path in enumerate(paths)
    ]


def models(setup: Setup, **options: Any) -> list[VideoCLIP]:
    """Return the same model on the CPU and on the device."""
    return [tiny_model(), tiny_model(**options).to(setup.device)]


@CHECKS.add("float32", "autocast")
def classification(setup: Setup, kind: str) -> None:
    """The probabilities of labels are those of the CPU."""
    autocast = torch.bfloat16 if kind == "autocast" else None
    paths, results = videos(setup), []
    for model in models(setup, autocast=autocast):
        with exact_kernels():
            results.append(model.classify(paths, LABELS))
    bound = 0.05 if autocast else 1e-4
    for a, b in zip(*results, strict=True):
        expected = dict(zip(a.labels, a.probabilities.tolist(), strict=True))
        for label, value in zip(b.labels, b.probabilities.tolist(), strict=True):
            assert abs(value - expected[label]) < bound, f"{label}: {value} for {expected[label]}"


@CHECKS.add()
def search(setup: Setup) -> None:
    """An index made on the device holds the vectors of the CPU and gives the same moments."""
    paths, moments, vectors = videos(setup), [], []
    for number, model in enumerate(models(setup)):
        folder = setup.folder / f"index-{number}"
        with exact_kernels():
            index = Index.create(folder, model, windows=WINDOWS)
            index.add(paths)
            found = index.search("a cat", 3)
        moments.append([(m.path, round(m.start, 3)) for m in found])
        vectors.append(torch.cat([torch.tensor(block.vectors) for block in index.blocks()]))
    torch.testing.assert_close(vectors[1].float(), vectors[0].float(), rtol=0, atol=2e-3)
    assert moments[1] == moments[0]
    again = Index.open(setup.folder / "index-0", models(setup)[1])
    with exact_kernels():
        assert [m.path for m in again.search("a cat", 3)] == [path for path, _ in moments[0]]


@CHECKS.add()
def merged_files(setup: Setup) -> None:
    """Weights of the device go into files; merges of files are those of the CPU, bit for bit."""
    states = [tiny_clip(seed).to(setup.device).state_dict() for seed in (0, 1)]
    files = [setup.folder / f"{name}.safetensors" for name in ("a", "b", "merged")]
    for state, file in zip(states, files[:2], strict=True):
        save_checkpoint(state, file)
    interpolate_files(files[0], files[1], files[2], 0.3)
    on_cpu = [{name: value.cpu() for name, value in state.items()} for state in states]
    merged = load_checkpoint(files[2])
    assert_same_state(merged, {name: interpolate(*on_cpu, 0.3)[name] for name in merged})
    model = tiny_clip(2).to(setup.device)
    model.load_state_dict(load_checkpoint(Path(files[0])))
    assert all(same_bits(model.state_dict()[n], value) for n, value in states[0].items())
