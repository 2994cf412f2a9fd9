"""One seed of the comparison: clips, fine-tuning runs, and accuracies along lambda."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import openvclip
from examples.finetune import Recipe, train
from examples.shapes.clips import LISTS, ClipSettings, make_clips
from examples.shapes.model import MEAN, STD, Tokenizer, create_model
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.world import TEMPLATES, class_names
from openvclip.sweep import FIGURE_LAMBDAS, sweep
from openvclip.video import VideoDataset, transforms

FRAMES = 8
LAMBDAS = FIGURE_LAMBDAS
TEST_LISTS = ("seen_test", "development", "unseen")


@dataclass(frozen=True)
class Settings:
    """The size of an experiment; the recipe's hyper-parameters were chosen on development shapes.

    Attributes:
        clips: the data set, but for its seed.
        recipe: how to fine-tune, but for method and seed.
        runs: methods of :mod:`examples.finetune` to train.
    """

    clips: ClipSettings = field(default_factory=ClipSettings)
    recipe: Recipe = field(default_factory=Recipe)
    runs: tuple[str, ...] = ("swa", "openvclip")


# Averaging does not change a run, so each run gives two rows: its last weights and its average.
ROWS = {
    "swa": ("FINE-TUNE", "SWA"),
    "openvclip": ("IWR", "Open-VCLIP"),
    "l2": ("L2", None),
}

Accuracies = dict[str, dict[str, float]]
"""Accuracy in [0, 1] by list and, as text, lambda."""


def load_clips(folder: Path, name: str) -> TensorDataset:
    """Decode a list's files to normalised clips ``[N, T, 3, 32, 32]`` and labels ``[N]``."""
    dataset = VideoDataset(
        folder / f"{name}.csv",
        folder,
        transform=transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        num_frames=FRAMES,
        sampler="uniform",
    )
    loader = DataLoader(dataset, batch_size=32, num_workers=2)
    bar = tqdm(loader, desc=f"decode {name}", disable=None)
    videos, labels = zip(*bar, strict=True)
    if dataset.failures:
        raise RuntimeError(
            f"Unreadable clips, delete {folder} to make them anew: {dataset.failures}"
        )
    return TensorDataset(torch.cat(videos), torch.cat(labels))


def make_classifier(
    model: torch.nn.Module, tokenizer: Tokenizer, split: str
) -> openvclip.ZeroShotClassifier:
    """The zero-shot classifier of a split's classes (all classes of all splits for ``"all"``)."""
    splits = ("seen", "development", "unseen") if split == "all" else (split,)
    names = [name for one in splits for name in class_names(one)]  # type: ignore[arg-type]
    return openvclip.ZeroShotClassifier(model, tokenizer, names, TEMPLATES)


class Experiment:
    """The data and the original CLIP of one seed.

    Args:
        settings: sizes and hyper-parameters.
        seed: of clips, order and alpha.
        folder: where the clips are kept.
    """

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        self.settings, self.seed, self.folder = settings, seed, folder
        make_clips(folder, replace(settings.clips, seed=seed))
        self.data = {name: load_clips(folder, name) for name in LISTS}

    def clip_accuracies(self) -> Accuracies:
        """CLIP applied frame by frame to each test list."""
        model, tokenizer = create_model()
        theta = model.state_dict()
        return self._accuracies(model, tokenizer, theta, theta, (1.0,), "CLIP")

    def run(self, method: str) -> dict[str, tuple[Accuracies, dict[str, Tensor]]]:
        """Fine-tune with a method; accuracies along lambda and end weights of each of its rows."""
        model, tokenizer = create_model()
        openvclip.expand_temporal_attention(model)
        classifier = make_classifier(model, tokenizer, "seen")
        recipe = replace(self.settings.recipe, method=method, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            self.data["train"], recipe.batch_size, shuffle=True, drop_last=True, generator=generator
        )
        clip, swa = train(classifier, loader, len(loader), recipe)
        last_row, average_row = ROWS[method]
        ends = {last_row: {k: v.detach().clone() for k, v in model.state_dict().items()}}
        if swa is not None and average_row is not None:
            ends[average_row] = swa.averaged_state_dict()
        return {
            row: (self._accuracies(model, tokenizer, clip, theta, LAMBDAS, row), theta)
            for row, theta in ends.items()
        }

    def _accuracies(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        clip: dict[str, Tensor],
        theta: dict[str, Tensor],
        lams: Sequence[float],
        row: str,
    ) -> Accuracies:
        found: Accuracies = {}
        for name in TEST_LISTS:
            classifier = make_classifier(model, tokenizer, LISTS[name])
            loader = DataLoader(self.data[name], batch_size=64)
            points = sweep(classifier, clip, theta, loader, lams, description=f"{row} on {name}")
            found[name] = {f"{lam:g}": result.top1 for lam, result in points.items()}
        return found
