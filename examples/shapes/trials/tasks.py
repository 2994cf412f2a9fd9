"""The pieces of work of the comparison, and what each piece does in a worker process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

import openvclip
from examples.shapes.model import Tokenizer
from examples.shapes.trials import rows as _rows  # noqa: F401 (fills the tables)
from examples.shapes.trials.cells import QUESTIONS, TUNING, Cell, ListName
from examples.shapes.trials.clips import Clips, Stills, draw_stills, load_list
from examples.shapes.trials.registry import LAMBDAS, METHODS, TRAININGS, Method, Runs, Settings
from examples.shapes.trials.settings import Sizes
from examples.shapes.trials.store import Store, key_of
from examples.shapes.trials.workshop import State, Workshop, fresh_clip
from openvclip.evaluation import choose_lambda, evaluate
from openvclip.training.methods import Classifier, fixed_text

__all__ = ["CLIP_SECONDS", "Failure", "Place", "Task", "Test", "cost", "do"]

# Seconds of one process on the reference machine (2 cores, idle), see the package's docstring.
CLIP_SECONDS = 0.0103  # draw, encode, decode a clip
STEP_SECONDS = 0.0028  # a plain training step, for each of its clips
TEST_SECONDS = 0.0009  # evaluate a clip
STILL_SECONDS = 0.0004  # evaluate a still
POINT_SECONDS = 0.1  # setting of the weights

Lists = dict[str, tuple[Sequence[str], Iterable[tuple[Tensor, Tensor]]]]
"""Class names and batches of each list of clips or stills."""

UNLABELLED = 256
"""Number of clips without labels from which λ is computed."""

RULES: tuple[Literal["dawin", "information"], ...] = ("dawin", "information")
"""The methods of :func:`openvclip.evaluation.choose_lambda` in the results."""

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
    total = len(task.params) * len(task.lams) * point
    if METHODS[task.name].unlabelled and task.cell != TUNING:
        clips = UNLABELLED * (2 + len(LAMBDAS)) + len(RULES) * tests
        total += len(QUESTIONS) * clips * TEST_SECONDS
    return total


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
            entry = _evaluate(place, task)
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


def _evaluate(place: Place, task: Task) -> dict[str, Any]:
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
    test = Test(method, clip, runs, lists)
    entry: dict[str, Any] = {"points": list(test.points(task.params, task.lams))}
    if method.unlabelled and task.cell != TUNING:
        entry["unlabelled"] = test.unlabelled(dict(task.params[0]))
    return entry


@lru_cache(maxsize=1)
def _stills(count: int) -> Stills:
    return draw_stills(count)


@dataclass(frozen=True)
class Test:
    """A method with its weights, ready for evaluation.

    Attributes:
        method: the method.
        clip: state dict of the original CLIP.
        runs: the weights of the trainings that the method needs.
        lists: class names and batches of each list.
        device: where the evaluation runs.
    """

    __test__ = False  # pytest takes a class of this name for tests

    method: Method
    clip: State
    runs: Runs
    lists: Lists
    device: str = "cpu"

    @cached_property
    def _model(self) -> tuple[nn.Module, Tokenizer]:
        model, tokenizer = self.method.form.model()
        return model.to(self.device), tokenizer

    @cached_property
    def _classifiers(self) -> dict[str, Classifier]:
        return {
            name: self.method.form.classifier(*self._model, names)
            for name, (names, _) in self.lists.items()
        }

    def weights(self, params: Settings) -> State:
        """Return the state dict of the method, with its own numbers."""
        return self.method.weights(self.clip, self.runs, **params) if self.runs else self.clip

    def points(
        self, params: Sequence[Sequence[tuple[str, Any]]], lams: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        """Yield the accuracies of the method for each of its numbers and each λ.

        Args:
            params: the numbers of the method, as pairs.
            lams: weights of the original CLIP.

        Yields:
            ``{"params": ..., "lam": ..., "accuracy": {list: top-1 in [0, 1]}}``.
        """
        for numbers in params:
            settings: Settings = dict(numbers)
            theta = self.weights(settings)
            for lam in lams:
                self._set(theta, lam)
                accuracy = {name: self._accuracy(name) for name in self.lists}
                yield {"params": settings, "lam": lam, "accuracy": accuracy}

    def unlabelled(self, params: Settings) -> dict[str, Any]:
        """Return λ without labels for each question, and its accuracy on the whole list.

        λ is computed from the first :data:`UNLABELLED` clips of the question's list.
        """
        theta = self.weights(params)
        found: dict[str, Any] = {}
        for name in QUESTIONS:
            clips = self.lists[name][1]
            assert isinstance(clips, Clips)
            found[name] = {}
            for rule in RULES:
                choice = choose_lambda(
                    self._classifiers[name],
                    self.clip,
                    dict(theta),
                    clips.first(UNLABELLED),
                    rule,
                    lams=LAMBDAS,
                    progress=False,
                )
                self._set(theta, choice.lam)
                found[name][rule] = {"lam": choice.lam, "accuracy": self._accuracy(name)}
        return found

    def _set(self, theta: State, lam: float) -> None:
        mixed = self.runs and lam != 0
        state = openvclip.interpolate(self.clip, theta, lam) if mixed else theta
        self._model[0].load_state_dict(dict(state))

    def _accuracy(self, name: str) -> float:
        """Return the top-1 accuracy on a list with the present weights of the model."""
        classifier, batches = self._classifiers[name], self.lists[name][1]
        frames = self.method.form.images_as_clips
        if name == STILLS and frames:
            batches = (
                (image[:, None].expand(-1, frames, -1, -1, -1), label) for image, label in batches
            )
        if (
            isinstance(classifier, openvclip.ZeroShotClassifier)
            and not classifier.text_is_current()
        ):
            classifier.refresh_text()
        with fixed_text(classifier):
            return evaluate(classifier, batches, progress=False).top1
