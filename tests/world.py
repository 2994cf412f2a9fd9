"""Files for the commands: clips of the shapes world, class names, templates and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.shapes.clips import ClipSettings, make_clips
from examples.shapes.model import WEIGHTS, create_model
from examples.shapes.world import TEMPLATES, class_names
from openvclip.checkpoints import save_checkpoint
from openvclip.video.protocols import Split
from tests.helpers import REPO


@dataclass(frozen=True)
class World:
    """The files of the fixture.

    Attributes:
        folder: holds the videos, ``seen_test.csv``, ``classes.txt`` and ``templates.txt``.
        tuned: fine-tuned weights.
        samples: path and class index of each test video.
    """

    folder: Path
    tuned: Path
    samples: list[tuple[str, int]]

    @property
    def model_flags(self) -> list[str]:
        config = REPO / "examples" / "shapes" / "shapes-clip.json"
        prompts = self.folder / "templates.txt"
        return ["--model", str(config), "--pretrained", str(WEIGHTS), "--templates", str(prompts)]

    def evaluate_flags(self, out: Path) -> list[str]:
        data = ["--annotations", str(self.folder / "seen_test.csv"), "--videos", str(self.folder)]
        data += ["--classes", str(self.folder / "classes.txt"), "--out", str(out)]
        frames = ["--sampler", "uniform", "--views", "2", "--batch-size", "3", "--num-workers", "0"]
        return ["evaluate", *self.model_flags, *data, *frames]

    def splits(self) -> list[Split]:
        """Return two splits with different classes that share videos, and a split of all videos."""
        names = class_names("seen")
        first = [(path, index) for path, index in self.samples if index < 3]
        last = [(path, index - 2) for path, index in self.samples if index >= 2]
        return [
            Split("first", names[:3], first),
            Split("last", names[2:10], last),
            Split("all", names[:10], self.samples),
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("world")
    make_clips(folder, ClipSettings(train=1, test=10, frames=12), num_workers=1, progress=False)
    (folder / "classes.txt").write_text("\n".join(class_names("seen")) + "\n")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    tuned = folder / "tuned.safetensors"
    save_checkpoint(with_noise(create_model()[0].state_dict()), tuned)
    lines = (folder / "seen_test.csv").read_text().splitlines()
    samples = [(path, int(index)) for path, index in (line.rsplit(",", 1) for line in lines)]
    return World(folder, tuned, samples)


def with_noise(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return weights that differ slightly, like those of a fine-tuned model."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: value + 0.03 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
