"""The clips of a cell: drawn, encoded with H.264, decoded, and kept as bytes.

A list of 2,048 clips takes 20 seconds to make and less than a second to read. The bytes of a cell
(80 MB) can be removed when the cell is finished: the same cell gives the same bytes again.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.shapes.clips import write_clip
from examples.shapes.drawing import draw_images, draw_video
from examples.shapes.experiment import load_clips
from examples.shapes.model import MEAN, STD, normalise
from examples.shapes.trials.cells import Cell, ListName
from examples.shapes.world import ACTIONS, COLOURS, SHAPES
from openvclip.checkpoints import atomic_path

#: Frames of a video, and frames that a model sees. Fewer frames than in other parts of the shapes
#: world make twice as many cells possible in the same time.
VIDEO_FRAMES, FRAMES = 8, 4

__all__ = ["FRAMES", "VIDEO_FRAMES", "Clips", "Stills", "draw_stills", "load_list", "remove_clips"]

#: Clips of a batch in evaluation. Batches of this size fit into the caches of a CPU.
BATCH = 16

_LIST_NUMBERS: dict[ListName, int] = {"train": 0, "trained": 1, "shapes": 2, "actions": 3}


@dataclass(frozen=True)
class Clips:
    """Clips as bytes. Iterating yields normalised batches ``(video, class index)``.

    Attributes:
        pixels: ``[N, T, 32, 32, 3]``.
        labels: class indices, int64 ``[N]``.
        batch_size: number of clips of a batch.
    """

    pixels: NDArray[np.uint8]
    labels: Tensor
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.arange(len(self)).split(self.batch_size):
            yield self.at(chosen)

    def first(self, count: int) -> Clips:
        """Return the first clips of the list."""
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def at(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen clips, ``[B, T, 3, 32, 32]``, and their class indices ``[B]``."""
        return normalise(self.pixels[chosen.numpy()]), self.labels[chosen]

    def of_classes(self, classes: list[int]) -> Clips:
        """Return the clips of some classes. The new class indices refer to ``classes``."""
        places = torch.full((int(self.labels.max()) + 1,), -1)
        places[torch.tensor(classes)] = torch.arange(len(classes))
        labels = places[self.labels]
        return replace(self, pixels=self.pixels[(labels >= 0).numpy()], labels=labels[labels >= 0])


@dataclass(frozen=True)
class Stills:
    """Captioned stills as CLIP was pretrained on. Iterating yields ``(image, class index)``.

    Attributes:
        pixels: ``[N, 32, 32, 3]``.
        labels: class indices that refer to :attr:`names`, int64 ``[N]``.
        batch_size: number of stills of a batch.
        names: the 192 class names of all shapes and actions.
    """

    pixels: NDArray[np.uint8]
    labels: Tensor
    batch_size: int = 8 * BATCH
    names: tuple[str, ...] = tuple(f"{shape} {action}" for shape in SHAPES for action in ACTIONS)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.arange(len(self.labels)).split(self.batch_size):
            yield normalise(self.pixels[chosen.numpy()]), self.labels[chosen]


def draw_stills(count: int, seed: int = 10_000) -> Stills:
    """Draw stills of all shapes and actions that were not used in the pretraining of CLIP."""
    rng = np.random.default_rng(seed)
    shapes, actions, colours = (
        rng.integers(0, kinds, count) for kinds in (len(SHAPES), len(ACTIONS), len(COLOURS))
    )
    pixels = draw_images(shapes, colours, actions, rng)
    return Stills(pixels, torch.from_numpy(shapes * len(ACTIONS) + actions))


def load_list(cell: Cell, name: ListName, count: int, folder: Path) -> Clips:
    """Return a list of clips of a cell; make and save the clips if the folder lacks them.

    Class ``i`` has the clips ``i``, ``i + K``, ``i + 2 K``, ... of the list, where K is the number
    of classes. So all classes are equally frequent, up to one clip.

    Args:
        cell: the cell.
        name: name of the list.
        count: number of clips.
        folder: folder of the saved lists of all cells.
    """
    path = folder / cell.name / f"{name}-{count}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.save(file, _make(cell, name, count))
    labels = torch.arange(count) % len(cell.pairs(name))
    return Clips(np.load(path, mmap_mode="r"), labels)


def remove_clips(cell: Cell, folder: Path) -> None:
    """Remove the saved lists of a cell, if there are any."""
    shutil.rmtree(folder / cell.name, ignore_errors=True)


def _make(cell: Cell, name: ListName, count: int) -> NDArray[np.uint8]:
    pairs, colours = cell.pairs(name), list(COLOURS)
    with tempfile.TemporaryDirectory(prefix="shapes-") as temporary:
        videos, lines = Path(temporary), []
        for index in range(count):
            shape, action = pairs[index % len(pairs)]
            rng = np.random.default_rng([cell.seed, _LIST_NUMBERS[name], index])
            colour = colours[int(rng.integers(len(colours)))]
            write_clip(
                videos / f"{index}.mp4", draw_video(shape, colour, action, rng, frames=VIDEO_FRAMES)
            )
            lines.append((f"{index}.mp4", index % len(pairs)))
        with (videos / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(lines)
        video, _ = load_clips(videos, name, num_workers=0, frames=FRAMES).tensors
    return _as_bytes(video)


def _as_bytes(video: Tensor) -> NDArray[np.uint8]:
    """Return normalised clips ``[N, T, 3, H, W]`` as bytes ``[N, T, H, W, 3]``."""
    assert video.shape[1] == FRAMES
    values = video.movedim(-3, -1) * torch.tensor(STD) + torch.tensor(MEAN)
    pixels: NDArray[np.uint8] = values.mul(255).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels
