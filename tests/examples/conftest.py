"""Videos, images and models for the tests of the single-file examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import openvclip
from examples.shapes.clips import write_clip
from examples.shapes.drawing import draw_image, draw_video
from examples.shapes.model import create_model
from tests.examples.single_files import CLASSES, OTHERS


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``videos/CLASS/N.mp4``, five for each class, and lists of all videos of some classes."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for names, title in ((CLASSES, "closed"), (OTHERS, "zero")):
        lines = []
        for name in names:
            (folder / title / name).mkdir(parents=True)
            shape, action = name.split()
            for index in range(5):
                path = f"{title}/{name}/{index}.mp4"
                write_clip(folder / path, draw_video(shape, "red", action, rng, frames=10))
                lines.append(f"{path},{name}")
        (folder / f"{title}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train``, ``validation`` and ``other``, each with a subfolder of images for each class."""
    folder = tmp_path_factory.mktemp("stills")
    rng = np.random.default_rng(1)
    for title, names in (("train", CLASSES), ("validation", CLASSES), ("other", OTHERS)):
        for name in names:
            (folder / title / name).mkdir(parents=True)
            shape, action = name.split()
            for index in range(4):
                noise = rng.normal(0, 20, (32, 32, 3))
                pixels = (draw_image(shape, "red", action, rng) + noise).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / title / name / f"{index}.png"
                )
    lines = [f"train/{name}/{index}.png,a noisy {name}" for name in CLASSES for index in range(4)]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def original() -> dict[str, Tensor]:
    """The CLIP of the shapes world, in float32."""
    return {name: value.float() for name, value in create_model()[0].state_dict().items()}


@pytest.fixture(scope="session")
def tuned(original: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with random changes of the image tower."""
    folder, paths = tmp_path_factory.mktemp("tuned"), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: value + 0.5 * value.std() * torch.randn(value.shape, generator=generator)
            if name.startswith("visual.transformer") and value.ndim > 1
            else value
            for name, value in original.items()
        }
        paths.append(folder / f"tuned{seed}.safetensors")
        openvclip.save_checkpoint(state, paths[-1])
    return paths
