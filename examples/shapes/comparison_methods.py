"""One run of the comparison: train a method and evaluate it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import openvclip
from examples.shapes.clips import LISTS
from examples.shapes.comparison_settings import (
    LAMBDAS,
    RATES,
    VIFI_PROMPTS,
    Family,
    Method,
    Setting,
    Sizes,
    base_and_novel,
)
from examples.shapes.model import Tokenizer, create_model
from examples.shapes.world import TEMPLATES, class_names
from openvclip import prompting
from openvclip.evaluation import evaluate, sweep
from openvclip.training.methods import choose_trained, fixed_text, make_optimizer, text_made_once
from openvclip.training.recipe import Recipe, learning_rate

if TYPE_CHECKING:
    from open_clip import CLIP

Classifier = openvclip.ZeroShotClassifier | prompting.VideoClassifier


class Run:
    """A run of the comparison: the training of the original CLIP with a method, and the evaluation.

    Args:
        method: the method.
        setting: the training clips, the number of steps and the tests.
        sizes: the size of the comparison.
        seed: seed of the shots, the order of the clips, the new prompts and alpha.
        data: the decoded lists of the seed, by name.
        rates: the learning rates by family.
    """

    def __init__(
        self,
        method: Method,
        setting: Setting,
        sizes: Sizes,
        seed: int,
        data: Mapping[str, TensorDataset],
        rates: Mapping[Family, float] = RATES,
    ) -> None:
        torch.manual_seed(seed)
        self.method, self.setting, self.training = method, setting, sizes.training
        self.seed, self.data, self.rates = seed, data, rates
        self.model, self.tokenizer = create_model()
        self.clip = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.theta: Mapping[str, Tensor] = self.clip
        self.trained: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def learn(self) -> None:
        """Train in one stage. The method "bridge and prompt" has two stages."""
        names, clips = training_clips(self.setting, self.data["train"], self.seed)
        batches = endless_batches(clips, self.training.batch_size, self.seed)
        steps = self.setting.steps
        first = steps // 2 if self.method.bridged else steps
        family: Family | None = "vifi" if self.method.bridged else self.method.family
        self._stage(prepare(self.model, self.method), family, names, batches, first)
        if self.method.bridged:
            prompting.attach_vifi(
                self.model, **VIFI_PROMPTS, words="a photo of a", tokenizer=self.tokenizer
            )
            prompts = prompting.parameters(self.model)
            self._stage(prompts, self.method.family, names, batches, steps - first)

    def _stage(
        self,
        trained: list[nn.Parameter],
        family: Family | None,
        names: Sequence[str],
        batches: Iterator[tuple[Tensor, Tensor]],
        steps: int,
    ) -> None:
        if family is None:
            return
        self.trained.append(sum(parameter.numel() for parameter in trained))
        recipe = self.training.recipe(self.rates[family], self.seed)
        classifier = make_classifier(self.model, self.tokenizer, names, self.method)
        swa = fit(
            classifier, trained, batches, steps, recipe, self.method.regularised, self._add_step
        )
        state = self.model.state_dict() if swa is None else swa.averaged_state_dict()
        # Cloned, because a sweep overwrites the tensors of the model.
        self.theta = {name: value.detach().clone() for name, value in state.items()}

    def _add_step(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.seconds.append(seconds)

    def result(self) -> dict[str, Any]:
        """Return the result of the run for the results file."""
        chosen_on = ("development",) if self.method.interpolated else ()
        tests = dict.fromkeys((*self.setting.tests, *chosen_on))
        edge = max(1, len(self.losses) // 10)
        mean = {"first": self.losses[:edge], "last": self.losses[-edge:]}
        return {
            "accuracy": {name: self._accuracies(name) for name in tests},
            "trained": self.trained,
            "seconds": median(self.seconds) if self.seconds else None,
            "loss": {k: sum(v) / len(v) if v else None for k, v in mean.items()},
        }

    def _accuracies(self, test: str) -> dict[str, float]:
        """Return the top-1 accuracies in [0, 1] by lambda."""
        names, clips = test_clips(test, self.data)
        classifier = make_classifier(self.model, self.tokenizer, names, self.method)
        loader = DataLoader(clips, batch_size=64)
        if self.method.interpolated:
            points = sweep(
                classifier, self.clip, self.theta, loader, lams=LAMBDAS, description=test
            )
            return {f"{lam:g}": evaluation.top1 for lam, evaluation in points.items()}
        with fixed_text(classifier):
            evaluation = evaluate(classifier, loader, description=test)
        return {"1" if self.method.family is None else "0": evaluation.top1}


def prepare(model: CLIP, method: Method) -> list[nn.Parameter]:
    """Change the original CLIP for a method, and return the parameters of the first stage."""
    if method.expanded:
        openvclip.expand_temporal_attention(model)
        choose_trained(model, "finetune")
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method.vita is not None:
        prompting.attach_vita(model, **method.vita)
        return prompting.parameters(model)
    return [] if method.train is None else prompting.fine_tune(model, method.train)


def make_classifier(
    model: CLIP, tokenizer: Tokenizer, names: Sequence[str], method: Method
) -> Classifier:
    """Return the classifier of a method."""
    if method.templates:
        return openvclip.ZeroShotClassifier(model, tokenizer, names, TEMPLATES)
    return prompting.VideoClassifier(model, tokenizer, names)


def fit(
    classifier: Classifier,
    trained: list[nn.Parameter],
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    recipe: Recipe,
    regularised: bool,
    on_step: Callable[[float, float], None],
) -> openvclip.SWATracker | None:
    """Train a model in place, with the same optimizer, schedule and clips for each method.

    The optimizer and the schedule are those of :mod:`examples.finetune`. If
    :mod:`examples.finetune` has the same method, both modules compute the same weights.

    Args:
        classifier: classifier with the model and the training classes.
        trained: parameters to train. Their present values are the anchor of the regulariser.
        batches: at least ``steps`` batches ``(video [B, T, 3, H, W], class index [B])``.
        steps: number of optimizer steps; 5 % of the steps are warm-up.
        recipe: the recipe.
        regularised: whether to use IWR and SWA.
        on_step: function that is called after each step with the loss and the time in seconds.

    Returns:
        The average over the second half of the steps, or ``None`` if ``regularised`` is false.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model = classifier.model
    optimizer = make_optimizer(trained, recipe)
    iwr = openvclip.InterpolatedWeightRegularizer(
        model,
        optimizer,
        interval=(0.0, recipe.alpha_max),
        weight=recipe.iwr_weight if regularised else 0.0,  # 0 means a step without IWR
        seed=recipe.seed,
    )
    every = max(1, steps // 80)
    swa = openvclip.SWATracker(model, start=steps // 2, every=every) if regularised else None
    model.train()
    with text_made_once(classifier):
        for step in range(steps):
            video, label = next(batches)
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps // 20, steps, recipe)
            loss = iwr.step(
                lambda: functional.cross_entropy(classifier(video), label),  # noqa: B023
                max_grad_norm=recipe.clip_grad_norm,
            )
            if swa is not None:
                swa.update(model)
            if not loss.isfinite():
                raise FloatingPointError(f"The loss is {loss.item()} at step {step + 1}.")
            on_step(loss.item(), time.perf_counter() - started)
    return swa


def endless_batches(
    clips: TensorDataset, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches in random order, for ever; the seed determines the batches."""
    if len(clips) < batch_size:
        raise ValueError(f"{len(clips)} clips are fewer than a batch of {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(clips), generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                video, label = clips[chosen]
                yield video, label


def draw_shots(labels: Tensor, shots: int | None, seed: int) -> Tensor:
    """Draw ``shots`` clips of each class, and return their indices in ascending order.

    With the same seed, the clips of fewer shots are a subset of the clips of more shots. ``None``
    takes all clips.

    Raises:
        ValueError: a class has fewer clips than ``shots``.
    """
    if shots is None:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        (clips,) = torch.where(labels == label)
        if len(clips) < shots:
            raise ValueError(
                f"Class {int(label)} has {len(clips)} clips, fewer than {shots} shots."
            )
        drawn.append(clips[torch.randperm(len(clips), generator=generator)[:shots]])
    return torch.cat(drawn).sort().values


def training_clips(
    setting: Setting, train: TensorDataset, seed: int
) -> tuple[list[str], TensorDataset]:
    """Return the training classes and the training clips, which are the same for every method."""
    video, label = train.tensors
    drawn = draw_shots(label, setting.shots, seed)
    clips = TensorDataset(video[drawn], label[drawn])
    return of_classes(clips, base_and_novel()[0]) if setting.base else (class_names("seen"), clips)


def test_clips(test: str, data: Mapping[str, TensorDataset]) -> tuple[list[str], TensorDataset]:
    """Return the classes and the clips of a test."""
    if test in ("base", "novel"):
        names = base_and_novel()[("base", "novel").index(test)]
        return of_classes(data["seen_test"], names)
    name = "seen_test" if test == "seen" else test
    return class_names(LISTS[name]), data[name]


def of_classes(clips: TensorDataset, names: list[str]) -> tuple[list[str], TensorDataset]:
    """Return the clips of some seen classes, with class indices that refer to ``names``."""
    new_index = torch.full((len(class_names("seen")),), -1)
    for index, name in enumerate(names):
        new_index[class_names("seen").index(name)] = index
    video, label = clips.tensors
    selected = new_index[label] >= 0
    return names, TensorDataset(video[selected], new_index[label[selected]])
