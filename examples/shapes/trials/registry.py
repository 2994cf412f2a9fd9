"""The tables of all trainings and methods. A new method is one call of :func:`register`.

A :class:`Training` is a run of a loop; it gives weights. A :class:`Method` is a row of the page: it
makes one state dict from the weights of one or several trainings, and λ interpolates this state
dict with the original CLIP. Rows that need the same training share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.shapes.trials.workshop import EXPANDED, Form, State, Trained, Workshop

__all__ = [
    "CURVE",
    "LAMBDAS",
    "METHODS",
    "PAPER",
    "REFERENCE",
    "TRAININGS",
    "Method",
    "Runs",
    "Training",
    "register",
]

REFERENCE, PAPER = "FINE-TUNE", "Open-VCLIP"
"""The names of the methods that all other methods are compared with."""

LAMBDAS: tuple[float, ...] = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
"""The weights λ of the original CLIP that are tried for each method that interpolates."""

CURVE: tuple[float, ...] = (0.0, 0.3, 0.6)
"""The λ at which the methods of the figure have results, beside the chosen λ."""

RUNS, POINTS = 4, 24
"""The budget of each method on the development lists: training runs, and evaluated points."""

Settings = Mapping[str, Any]

Runs = Mapping[str, Mapping[str, State]]
"""The state dicts of each training that a method needs, by training and by end."""


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        name: name of the training.
        run: trains in a workshop with the settings as keyword arguments.
        grid: the settings that are tried on the development lists, at most :data:`RUNS`.
        passes: cost of a step in steps of plain fine-tuning.
        share: share of the steps of a run that the training does.
        order: number of the order of the clips; rows of several runs need different orders.
    """

    name: str
    run: Callable[..., Trained]
    grid: tuple[Settings, ...] = ({},)
    passes: float = 1.0
    share: float = 1.0
    order: int = 0

    def __call__(self, workshop: Workshop, settings: Settings) -> Trained:
        """Train with settings."""
        return self.run(workshop, **settings)


def first_end(name: str) -> Callable[..., State]:
    """Return a function that takes an end of the first training of a method."""

    def weights(_: State, runs: Runs) -> State:
        return next(iter(runs.values()))[name]

    return weights


@dataclass(frozen=True)
class Method:
    """A row of the page.

    Attributes:
        name: the name of the row.
        needs: names of the trainings whose weights the method uses; empty for CLIP itself.
        weights: function from the state dict of the original CLIP, the weights of the trainings
            and the method's own numbers to the state dict of the method.
        params: the method's own numbers that are tried on the development lists. They need no
            further training.
        lams: the λ that are tried on the development lists.
        like: a method whose chosen settings of the training are used; then only ``params`` and
            ``lams`` are chosen for this method.
        control: whether the method is a control of the method that it is like. A control has the
            numbers of this method too, and this method is compared with it on each question.
        curve: whether the results have the λ of :data:`CURVE` too, for a figure.
        unlabelled: whether the results have λ chosen without labels too.
        form: how the weights become a classifier.
        beside: further methods that the method is compared with, on the mean of the questions.
        does: what the method does, as part of a sentence ("averages ...").
        how: what to call in this library, in Markdown.
        cost: what the method costs, in words.
        when: what has to be given so that the method can be taken: needs and costs, no accuracy.
        beware: needs and costs that speak against the method; no accuracy.
    """

    name: str
    needs: tuple[str, ...] = ()
    weights: Callable[..., State] = field(default_factory=lambda: first_end("last"))
    params: tuple[Settings, ...] = ({},)
    lams: tuple[float, ...] = LAMBDAS
    like: str | None = None
    control: bool = False
    curve: bool = False
    unlabelled: bool = False
    form: Form = EXPANDED
    beside: tuple[str, ...] = ()
    does: str = ""
    how: str = ""
    cost: str = ""
    when: str = ""
    beware: str = ""


TRAININGS: dict[str, Training] = {}
METHODS: dict[str, Method] = {}


def register(entry: Training | Method) -> None:
    """Add a training or a method to the comparison.

    Raises:
        ValueError: the name is taken; the budget of tried settings is exceeded; or the method
            needs something that is not registered.
    """
    table: dict[str, Any] = TRAININGS if isinstance(entry, Training) else METHODS
    if entry.name in table:
        raise ValueError(f"{entry.name!r} is registered already: choose another name.")
    if isinstance(entry, Training):
        if not 1 <= len(entry.grid) <= RUNS:
            raise ValueError(
                f"{entry.name!r} has {len(entry.grid)} settings to try; every method may try 1 to "
                f"{RUNS}."
            )
    else:
        _check(entry)
    table[entry.name] = entry


def _check(method: Method) -> None:
    unknown = [name for name in method.needs if name not in TRAININGS]
    if unknown:
        raise ValueError(
            f"{method.name!r} needs the training {unknown[0]!r}, which is not registered. Register "
            f"the training first. Known trainings: {', '.join(TRAININGS)}."
        )
    if method.like is not None and method.like not in METHODS:
        raise ValueError(f"{method.name!r} is like {method.like!r}, which is not registered.")
    runs = len(TRAININGS[method.needs[0]].grid) if method.needs and method.like is None else 1
    points = runs * len(method.params) * len(method.lams)
    if points > POINTS:
        raise ValueError(
            f"{method.name!r} has {points} points to try (settings of the training, times its own "
            f"numbers, times λ); every method may try {POINTS}."
        )
