"""One run of the experiment: its clips, its fine-tuning, and its accuracies along lambda."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from examples.shapes.progress import Costs, Phase, Reporter
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.studies import AVERAGE, LAST, FineTune, Task
from examples.shapes.world import TEMPLATES, class_names
from openvclip.evaluation import FIGURE_LAMBDAS, sweep
from openvclip.training.log import Step
from openvclip.training.recipe import Recipe
from openvclip.video import Sampling, VideoDataset, transforms

FRAMES = 8
LAMBDAS = FIGURE_LAMBDAS
TEST_LISTS = ("seen_test", "development", "unseen")

Accuracies = dict[str, dict[str, float]]
"""Accuracies in [0, 1] by list and by lambda; lambda is written as text."""

# Costs, in seconds of one process on the reference machine; see :mod:`examples.shapes.progress`.
DRAWING_SECONDS = 0.0085  # draw and encode a clip
DECODING_SECONDS = 0.0049  # decode a clip
TRAINING_SECONDS = 0.0026  # one pass of a clip through the small model in training
EVALUATION_SECONDS = 0.0028  # one pass of a clip through the small model in evaluation
PROCESS_SECONDS = 3.8  # start a process
MODEL_SECONDS = 0.6  # create and expand a model


@dataclass(frozen=True)
class Settings:
    """The size of an experiment. The hyper-parameters were chosen on the development shapes.

    Attributes:
        clips: the data set; each run sets the seed.
        recipe: the recipe; each run sets the method, the seed and its own changes.
    """

    clips: ClipSettings = field(default_factory=ClipSettings)
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        accuracies: the accuracies of each of the requested weights, by the name of the weights.
        weights: the requested weights by name.
        seconds: processor time of the whole run, including the evaluation. A run has one thread, so
            on an idle machine this is also the wall-clock time.
        step_seconds: processor time of a training step (median), or ``None`` without training.
    """

    accuracies: dict[str, Accuracies]
    weights: dict[str, dict[str, Tensor]]
    seconds: float
    step_seconds: float | None


def load_clips(
    folder: Path,
    name: str,
    *,
    num_workers: int = 2,
    frames: int = FRAMES,
    on_decoded: Callable[[int], object] = lambda _: None,
) -> TensorDataset:
    """Decode the files of a list.

    Args:
        folder: the folder of the list and of its clips.
        name: name of the list.
        num_workers: worker processes of the ``DataLoader``.
        frames: number T of frames of a clip.
        on_decoded: function that takes the number of clips of each decoded batch.

    Returns:
        Normalised clips ``[N, T, 3, 32, 32]`` and class indices ``[N]``.

    Raises:
        RuntimeError: a clip cannot be read.
    """
    dataset = VideoDataset(
        folder / f"{name}.csv",
        folder,
        transform=transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        sampling=Sampling(num_frames=frames, sampler="uniform"),
    )
    loader = DataLoader(dataset, batch_size=32, num_workers=num_workers)
    videos: list[Tensor] = []
    class_indices: list[Tensor] = []
    for video, class_index in tqdm(loader, desc=f"decode {name}", disable=None):
        videos.append(video)
        class_indices.append(class_index)
        on_decoded(len(video))
    if dataset.failures:
        raise RuntimeError(
            f"Some clips cannot be read. Delete the folder {folder}, and run the command again. "
            f"The command then draws the clips again. Failures: {dataset.failures}"
        )
    return TensorDataset(torch.cat(videos), torch.cat(class_indices))


def make_classifier(
    model: torch.nn.Module, tokenizer: Tokenizer, split: str
) -> openvclip.ZeroShotClassifier:
    """Return the zero-shot classifier of a split; ``"all"`` means the classes of all splits."""
    return openvclip.ZeroShotClassifier(model, tokenizer, classes_of(split), TEMPLATES)


def classes_of(split: str) -> list[str]:
    """Return the class names of a split; ``"all"`` means the classes of all splits."""
    splits = ("seen", "development", "unseen") if split == "all" else (split,)
    return [name for part in splits for name in class_names(part)]  # type: ignore[arg-type]


def clips_folder(out: Path, seed: int) -> Path:
    """Return the folder of the clips of a seed."""
    return out / "clips" / f"seed-{seed}"


def recipe_of(settings: Settings, run: FineTune, seed: int) -> Recipe:
    """Return the recipe of a run."""
    return replace(settings.recipe, method=run.method, seed=seed, **run.changes)


def cost(settings: Settings, task: Task) -> float:
    """Return the cost of a task, in passes of one clip through the small model."""
    training, evaluation = _passes(settings, task)
    return training + evaluation


def phase_costs(settings: Settings, task: Task, *, first: bool) -> dict[Phase, float]:
    """Return the cost of each phase of a task; see :mod:`examples.shapes.progress`.

    Args:
        settings: the size of the experiment.
        task: the task.
        first: whether the task is the first task with its seed in its process. The cost then
            includes the start of the process and the decoding of the clips.
    """
    training, evaluation = _passes(settings, task)
    clips = sum(map(settings.clips.count, LISTS)) if first else 0
    return {
        "starting": MODEL_SECONDS + (PROCESS_SECONDS if first else 0.0),
        "decoding": DECODING_SECONDS * clips,
        "fine-tuning": TRAINING_SECONDS * training,
        "evaluating": EVALUATION_SECONDS * evaluation,
    }


MEASUREMENT_COSTS: Costs = {
    "starting": MODEL_SECONDS + 2.0,  # import open_clip
    "fine-tuning": 3 * 3 * 32 * TRAINING_SECONDS,
    "evaluating": 3 * 32 * EVALUATION_SECONDS,
}
"""The cost of :func:`measure_speed`."""


def measure_speed(report: Reporter) -> None:
    """Measure the speed of this machine on random clips and report it, in one or two seconds.

    The first phases of a run draw and decode clips, so they do not show how fast a model trains.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, _ = create_model()
        openvclip.expand_temporal_attention(model)
        clips = torch.randn(32, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
        model.encode_image(clips[:1]).sum().backward()
        report("starting", MEASUREMENT_COSTS["starting"])
        for _ in range(3):
            model.encode_image(clips).sum().backward()
            report("fine-tuning", MEASUREMENT_COSTS["fine-tuning"] / 3)
        with torch.no_grad():
            for _ in range(3):
                model.encode_image(clips)
                report("evaluating", MEASUREMENT_COSTS["evaluating"] / 3)
    finally:
        torch.set_num_threads(threads)


def _passes(settings: Settings, task: Task) -> tuple[float, float]:
    """The costs of training and evaluation, in passes of one clip through the small model."""
    run, points = task.run, 1
    training = 0.0
    if run.trained:
        recipe, points = recipe_of(settings, run, task.seed), len(task.ends) * len(LAMBDAS)
        steps = recipe.epochs * (settings.clips.train // recipe.batch_size)
        training = steps * _step_passes(recipe, run)
    return training, points * len(TEST_LISTS) * settings.clips.test * run.relative_cost


def _step_passes(recipe: Recipe, run: FineTune) -> float:
    passes = 1 + (1 / run.every if recipe.uses_iwr else 0)
    return 3 * recipe.batch_size * passes * run.relative_cost  # backward costs two forward passes


def perform(settings: Settings, task: Task, out: Path, reporter: Reporter | None = None) -> Outcome:
    """Train the task's run, unless the run is CLIP itself, and evaluate the weights.

    Args:
        settings: the size of the experiment.
        task: the run, its seed (of clips, order and alpha), and the weights to evaluate.
        out: folder of the experiment, which contains the clips of the seed.
        reporter: takes the progress.
    """
    run, report = task.run, reporter or Reporter(str(task))
    data = _decoded(clips_folder(out, task.seed), report)
    started = time.process_time()
    model, tokenizer = create_model(backbone=run.backbone)
    if run.boundary is not None:
        openvclip.expand_temporal_attention(model, boundary=run.boundary)
    clip = {name: value.detach().clone() for name, value in model.state_dict().items()}
    report("starting", MODEL_SECONDS)
    weights, seconds = {LAST: clip}, list[float]()
    if run.trained:
        recipe = recipe_of(settings, run, task.seed)
        weights, seconds = _train(recipe, task, model, tokenizer, data["train"], report)
    lams = LAMBDAS if run.trained else (1.0,)
    evaluation = _Evaluation(model, tokenizer, clip, data, lams)
    clip_cost = EVALUATION_SECONDS * len(lams) * run.relative_cost
    accuracies = {
        end: evaluation.accuracies(
            weights[end], lambda clips: report("evaluating", clips * clip_cost)
        )
        for end in task.ends
    }
    return Outcome(
        accuracies,
        {end: weights[end] for end in task.ends},
        time.process_time() - started,
        median(seconds) if seconds else None,
    )


_DECODED: dict[Path, dict[str, TensorDataset]] = {}


def _decoded(folder: Path, report: Reporter) -> dict[str, TensorDataset]:
    """Return the clips of a seed. They stay in memory (200 MB) until another seed is needed."""
    if folder not in _DECODED:
        _DECODED.clear()
        _DECODED[folder] = {
            name: load_clips(
                folder,
                name,
                num_workers=0,
                on_decoded=lambda clips: report("decoding", DECODING_SECONDS * clips),
            )
            for name in LISTS
        }
    return _DECODED[folder]


def _train(
    recipe: Recipe,
    task: Task,
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    clips: TensorDataset,
    report: Reporter,
) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Fine-tune the model; return the requested weights and the seconds of each step."""
    classifier = make_classifier(model, tokenizer, "seen")
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(clips, recipe.batch_size, shuffle=True, drop_last=True, generator=generator)
    trackers: dict[str, openvclip.SWATracker] = {}
    seconds: list[float] = []
    begun = time.process_time()

    def after_step(_: Step) -> None:
        nonlocal begun
        seconds.append(time.process_time() - begun)
        # A tracker averages the parameters that require gradients when the tracker is created. The
        # trainer has set requires_grad before the first step.
        if not trackers:
            for averaging in task.averagings:
                trackers[averaging.name] = averaging.tracker(model, len(loader))
        for tracker in trackers.values():
            tracker.update(model)
        report("fine-tuning", TRAINING_SECONDS * _step_passes(recipe, task.run))
        begun = time.process_time()

    _, swa = train(classifier, loader, len(loader), recipe, run=task.run.how, on_step=after_step)
    weights = {name: tracker.averaged_state_dict() for name, tracker in trackers.items()}
    weights[LAST] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if swa is not None:
        weights[AVERAGE] = swa.averaged_state_dict()
    return weights, seconds


@dataclass(frozen=True)
class _Evaluation:
    """The evaluation of fine-tuned weights along lambda."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    clip: dict[str, Tensor]
    data: dict[str, TensorDataset]
    lams: Sequence[float]

    def accuracies(
        self, theta: dict[str, Tensor], on_evaluated: Callable[[int], object]
    ) -> Accuracies:
        """Return the accuracies of the weights on each test list."""
        accuracies: Accuracies = {}
        for name in TEST_LISTS:
            classifier = make_classifier(self.model, self.tokenizer, LISTS[name])
            loader = _counted(DataLoader(self.data[name], batch_size=64), on_evaluated)
            points = sweep(classifier, self.clip, theta, loader, lams=self.lams)
            accuracies[name] = {f"{lam:g}": result.top1 for lam, result in points.items()}
        return accuracies


def _counted(
    loader: Iterable[list[Tensor]], on_evaluated: Callable[[int], object]
) -> Iterator[list[Tensor]]:
    """Yield the batches of a loader; report the number of clips of a batch after its evaluation."""
    for batch in loader:
        yield batch
        on_evaluated(len(batch[0]))
