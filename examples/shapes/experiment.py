"""One fine-tuning run of the comparison: its clips, its training, its accuracies along lambda."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import openvclip
from examples.finetune import train
from examples.shapes.clips import LISTS, ClipSettings
from examples.shapes.model import MEAN, STD, Tokenizer, create_model
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.studies import AVERAGE, LAST, FineTune, Task
from examples.shapes.world import TEMPLATES, class_names
from openvclip.evaluation.sweep import FIGURE_LAMBDAS, sweep
from openvclip.training.log import Step
from openvclip.training.recipe import Recipe
from openvclip.video import Sampling, VideoDataset, transforms

FRAMES = 8
LAMBDAS = FIGURE_LAMBDAS
TEST_LISTS = ("seen_test", "development", "unseen")

Accuracies = dict[str, dict[str, float]]
"""Accuracy in [0, 1] by list and, as text, lambda."""

Report = Callable[[float], None]
"""Takes the clips that have gone through the model since the last call (:func:`cost`)."""


@dataclass(frozen=True)
class Settings:
    """The size of an experiment; the recipe's hyper-parameters were chosen on development shapes.

    Attributes:
        clips: the data set, but for its seed.
        recipe: how to fine-tune, but for method, seed and what a run changes.
    """

    clips: ClipSettings = field(default_factory=ClipSettings)
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Outcome:
    """What a run gives.

    Attributes:
        accuracies: of the weights that were asked for, by their names.
        weights: the same weights.
        seconds: time of the processor for the whole run, evaluation included. A run has one
            thread, so this is its wall time where nothing else runs beside it.
        step_seconds: the same of a training step (median), None without training.
    """

    accuracies: dict[str, Accuracies]
    weights: dict[str, dict[str, Tensor]]
    seconds: float
    step_seconds: float | None


def load_clips(folder: Path, name: str, *, num_workers: int = 2) -> TensorDataset:
    """Decode a list's files to normalised clips ``[N, T, 3, 32, 32]`` and labels ``[N]``."""
    dataset = VideoDataset(
        folder / f"{name}.csv",
        folder,
        transform=transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        sampling=Sampling(num_frames=FRAMES, sampler="uniform"),
    )
    loader = DataLoader(dataset, batch_size=32, num_workers=num_workers)
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


def clips_folder(out: Path, seed: int) -> Path:
    """Where the clips of a seed are kept."""
    return out / "clips" / f"seed-{seed}"


def recipe_of(settings: Settings, run: FineTune, seed: int) -> Recipe:
    """The recipe of a run."""
    return replace(settings.recipe, method=run.method, seed=seed, **run.changes)


def cost(settings: Settings, task: Task) -> float:
    """Clips that go once through the small model in the time that the task takes, about."""
    run, points = task.run, 1
    training = 0.0
    if run.trained:
        recipe, points = recipe_of(settings, run, task.seed), len(task.ends) * len(LAMBDAS)
        steps = recipe.epochs * (settings.clips.train // recipe.batch_size)
        training = steps * _step_cost(recipe, run)
    return training + points * len(TEST_LISTS) * settings.clips.test * run.relative_cost


def _step_cost(recipe: Recipe, run: FineTune) -> float:
    passes = 1 + (1 / run.every if recipe.uses_iwr else 0)
    return 3 * recipe.batch_size * passes * run.relative_cost  # backward costs two forward passes


def perform(settings: Settings, task: Task, out: Path, report: Report = lambda _: None) -> Outcome:
    """Train the task's run, unless it is CLIP itself, and evaluate the weights that are asked for.

    Args:
        settings: the size of the experiment.
        task: the run, its seed (of clips, order and alpha), and the weights to evaluate.
        out: folder of the experiment, which has the clips of the seed.
        report: told of the progress.
    """
    run, data = task.run, _decoded(clips_folder(out, task.seed))
    started = time.process_time()
    model, tokenizer = create_model(backbone=run.backbone)
    if run.boundary is not None:
        openvclip.expand_temporal_attention(model, boundary=run.boundary)
    clip = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights, seconds = {LAST: clip}, list[float]()
    if run.trained:
        recipe = recipe_of(settings, run, task.seed)
        weights, seconds = _train(recipe, task, model, tokenizer, data["train"], report)
    accuracies: dict[str, Accuracies] = {}
    for end in task.ends:
        lams = LAMBDAS if run.trained else (1.0,)
        found = _accuracies(model, tokenizer, clip, weights[end], data, lams)
        accuracies[end] = {}
        for name, points in found:
            accuracies[end][name] = points
            report(len(lams) * settings.clips.test * run.relative_cost)
    return Outcome(
        accuracies,
        {end: weights[end] for end in task.ends},
        time.process_time() - started,
        median(seconds) if seconds else None,
    )


@lru_cache(maxsize=1)  # one seed's clips are 200 MB
def _decoded(folder: Path) -> dict[str, TensorDataset]:
    return {name: load_clips(folder, name, num_workers=0) for name in LISTS}


def _train(
    recipe: Recipe,
    task: Task,
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    clips: TensorDataset,
    report: Report,
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Fine-tune the model; the weights that are asked for, and the seconds of each step."""
    classifier = make_classifier(model, tokenizer, "seen")
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(clips, recipe.batch_size, shuffle=True, drop_last=True, generator=generator)
    trackers: dict[str, openvclip.SWATracker] = {}
    seconds: list[float] = []
    begun = time.process_time()

    def after_step(_: Step) -> None:
        nonlocal begun
        seconds.append(time.process_time() - begun)
        if not trackers:  # the trainer has chosen by now what is trained, and so averaged
            for averaging in task.averagings:
                trackers[averaging.name] = averaging.tracker(model, len(loader))
        for tracker in trackers.values():
            tracker.update(model)
        report(_step_cost(recipe, task.run))
        begun = time.process_time()

    _, swa = train(classifier, loader, len(loader), recipe, run=task.run.how, on_step=after_step)
    weights = {name: tracker.averaged_state_dict() for name, tracker in trackers.items()}
    weights[LAST] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if swa is not None:
        weights[AVERAGE] = swa.averaged_state_dict()
    return weights, seconds


def _accuracies(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    clip: dict[str, Tensor],
    theta: dict[str, Tensor],
    data: dict[str, TensorDataset],
    lams: Sequence[float],
) -> Iterator[tuple[str, dict[str, float]]]:
    """The accuracies on each test list along lambda."""
    for name in TEST_LISTS:
        classifier = make_classifier(model, tokenizer, LISTS[name])
        points = sweep(classifier, clip, theta, DataLoader(data[name], batch_size=64), lams)
        yield name, {f"{lam:g}": result.top1 for lam, result in points.items()}
