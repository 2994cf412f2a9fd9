"""The pieces of work of the comparison, and what each piece does in a worker process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

import openvclip
from examples.shapes.trials import rows as _rows  # noqa: F401 (fills the tables)
from examples.shapes.trials.cells import QUESTIONS, TUNING, Cell, ListName
from examples.shapes.trials.clips import Clips, Stills, draw_stills, load_list
from examples.shapes.trials.registry import METHODS, TRAININGS, Method, Runs, Settings
from examples.shapes.trials.settings import Sizes
from examples.shapes.trials.store import Store, key_of
from examples.shapes.trials.workshop import State, Workshop, fresh_clip
from openvclip.evaluation import evaluate
from openvclip.training.methods import Classifier, fixed_text

__all__ = ["Failure", "Place", "Task", "cost", "do", "points_of"]

# Seconds of one process on the reference machine (2 cores, idle), see the package's docstring.
CLIP_SECONDS = 0.0134  # draw, encode, decode a clip
STEP_SECONDS = 0.0058  # a plain training step, for each of its clips
TEST_SECONDS = 0.0018  # evaluate a clip
STILL_SECONDS = 0.0004  # evaluate a still
POINT_SECONDS = 0.1  # setting of the weights

Lists = dict[str, tuple[Sequence[str], Iterable[tuple[Tensor, Tensor]]]]
"""Class names and batches of each list of clips or stills."""

STILLS = "stills"
"""The name of the list of held-out stills of CLIP's pretraining."""


@dataclass(frozen=True)
class Place:
    """Where the comparison keeps its files, and how large it is.

    Attributes:
        out: the output folder.
        sizes: the size of the comparison.
    """

    out: Path
    sizes: Sizes

    @property
    def clips(self) -> Path:
        """The folder of the clips."""
        return self.out / "clips"

    @property
    def store(self) -> Store:
        """The weights of the trainings."""
        return Store(self.out / "weights")

    def count(self, cell: Cell, name: ListName) -> int:
        """Return the number of clips in a list of a cell."""
        if name == "train":
            return self.sizes.train
        return self.sizes.development if cell == TUNING else self.sizes.test

    def load(self, cell: Cell, name: ListName) -> Clips:
        """Return a list of clips of a cell."""
        return load_list(cell, name, self.count(cell, name), self.clips)

    def has(self, cell: Cell, name: ListName) -> bool:
        """Return whether a list of clips was made."""
        return (self.clips / cell.name / f"{name}-{self.count(cell, name)}.npy").exists()


@dataclass(frozen=True)
class Task:
    """A piece of work: the clips of a list, a training, or the evaluation of a method.

    Attributes:
        cell: the cell.
        kind: ``"clips"``, ``"training"`` or ``"method"``.
        name: name of the list, of the training or of the method.
        settings: settings of the trainings, as pairs.
        params: numbers of the method, each as pairs; all of them are evaluated.
        lams: the λ to evaluate.
    """

    cell: Cell
    kind: str
    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    params: tuple[tuple[tuple[str, Any], ...], ...] = ((),)
    lams: tuple[float, ...] = (0.0,)

    @property
    def key(self) -> str:
        """The name of the training, or of the method, with its settings."""
        return key_of(self.name, dict(self.settings))

    def __str__(self) -> str:
        return f"{self.cell.name}: {'clips ' if self.kind == 'clips' else ''}{self.key}"

    def needs(self) -> list[str]:
        """Return the keys of the trainings whose weights the task uses."""
        if self.kind != "method":
            return []
        return [key_of(need, dict(self.settings)) for need in METHODS[self.name].needs]

    def lists(self) -> list[ListName]:
        """Return the lists of clips that the task uses."""
        if self.kind == "clips":
            return []
        return ["train"] if self.kind == "training" else list(QUESTIONS)

    def is_ready(self, place: Place) -> bool:
        """Return whether everything that the task uses is on the disk."""
        return all(place.has(self.cell, name) for name in self.lists()) and all(
            place.store.path(self.cell, key).exists() for key in self.needs()
        )


@dataclass(frozen=True)
class Failure:
    """An error in a task.

    Attributes:
        text: the error in one line.
        trace: the traceback.
    """

    text: str
    trace: str = field(repr=False)


def cost(task: Task, sizes: Sizes) -> float:
    """Return the estimated seconds of a task: of one process on the reference machine."""
    if task.kind == "clips":
        is_tuning = task.cell == TUNING
        tests = sizes.development if is_tuning else sizes.test
        return CLIP_SECONDS * (sizes.train if task.name == "train" else tests)
    if task.kind == "training":
        training = TRAININGS[task.name]
        return training.passes * training.share * sizes.steps * sizes.batch_size * STEP_SECONDS
    tests = sizes.development if task.cell == TUNING else sizes.test
    point = POINT_SECONDS + len(QUESTIONS) * tests * TEST_SECONDS
    if task.cell != TUNING:
        point += sizes.stills * STILL_SECONDS
    return len(task.params) * len(task.lams) * point


def do(place: Place, task: Task, report: object = None) -> dict[str, Any] | Failure:
    """Do a task, and return its entry for the results file.

    An exception becomes a :class:`Failure`, so that an error in one task does not end the others.
    """
    started = time.process_time()
    try:
        if task.kind == "clips":
            place.load(task.cell, task.name)  # type: ignore[arg-type]
            entry: dict[str, Any] = {}
        elif task.kind == "training":
            entry = _train(place, task)
        else:
            entry = {"points": _evaluate(place, task)}
    except Exception as error:  # a method of the reader's own can raise anything
        text = f"{type(error).__name__}: {error}"
        return Failure(text.splitlines()[0], traceback.format_exc())
    return {**entry, "seconds": time.process_time() - started}


def _train(place: Place, task: Task) -> dict[str, Any]:
    training = TRAININGS[task.name]
    workshop = Workshop(
        task.cell,
        place.load(task.cell, "train"),
        max(1, round(place.sizes.steps * training.share)),
        place.sizes.batch_size,
        training.order,
    )
    trained = training(workshop, dict(task.settings))
    place.store.save(task.cell, task.key, workshop.clip, trained.ends)
    return trained.report()


def _evaluate(place: Place, task: Task) -> list[dict[str, Any]]:
    method, clip = METHODS[task.name], dict(fresh_clip()[0].state_dict())
    runs = {
        need: place.store.load(task.cell, key, clip)
        for need, key in zip(method.needs, task.needs(), strict=True)
    }
    lists: Lists = {
        name: (task.cell.names(name), place.load(task.cell, name)) for name in QUESTIONS
    }
    if task.cell != TUNING:  # no setting is chosen on stills
        stills = _stills(place.sizes.stills)
        lists[STILLS] = (stills.names, stills)
    return list(points_of(method, clip, runs, lists, task.params, task.lams))


@lru_cache(maxsize=1)
def _stills(count: int) -> Stills:
    return draw_stills(count)


def points_of(
    method: Method,
    clip: State,
    runs: Runs,
    lists: Lists,
    params: Sequence[Sequence[tuple[str, Any]]],
    lams: Sequence[float],
) -> Iterable[dict[str, Any]]:
    """Yield the accuracies of a method for each of its numbers and each λ.

    Args:
        method: the method.
        clip: state dict of the original CLIP.
        runs: the weights of the trainings that the method needs.
        lists: class names and batches of each list.
        params: the numbers of the method, as pairs.
        lams: weights of the original CLIP.

    Yields:
        ``{"params": ..., "lam": ..., "accuracy": {list: top-1 in [0, 1]}}``.
    """
    model, tokenizer = method.form.model()
    classifiers = {
        name: method.form.classifier(model, tokenizer, names) for name, (names, _) in lists.items()
    }
    for numbers in params:
        settings: Settings = dict(numbers)
        theta = method.weights(clip, runs, **settings) if method.needs else clip
        for lam in lams:
            mixed = method.needs and lam != 0
            model.load_state_dict(dict(openvclip.interpolate(clip, theta, lam) if mixed else theta))
            accuracy = {
                name: _accuracy(
                    classifiers[name], batches, method.form.images_as_clips if name == STILLS else 0
                )
                for name, (_, batches) in lists.items()
            }
            yield {"params": settings, "lam": lam, "accuracy": accuracy}


def _accuracy(
    classifier: Classifier, batches: Iterable[tuple[Tensor, Tensor]], images_as_clips: int
) -> float:
    """Return the top-1 accuracy of a classifier with the present weights of its model."""
    if images_as_clips:
        batches = (
            (image[:, None].expand(-1, images_as_clips, -1, -1, -1), label)
            for image, label in batches
        )
    if isinstance(classifier, openvclip.ZeroShotClassifier) and not classifier.text_is_current():
        classifier.refresh_text()
    with fixed_text(classifier):
        return evaluate(classifier, batches, progress=False).top1
