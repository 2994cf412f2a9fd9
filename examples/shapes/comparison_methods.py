"""One run of the comparison: a method learns from some clips and is tried on others."""

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
from openvclip.evaluation import evaluate
from openvclip.evaluation.sweep import sweep
from openvclip.training.methods import choose_trained, fixed_text, make_optimizer, text_made_once
from openvclip.training.recipe import Recipe, learning_rate

if TYPE_CHECKING:
    from open_clip import CLIP

Classifier = openvclip.ZeroShotClassifier | prompting.VideoClassifier


class Run:
    """A method in a setting, from the original CLIP to accuracies.

    Args:
        method: what learns.
        setting: from what, and for how many steps.
        sizes: the recipe's numbers.
        seed: of the shots, the order of the clips, new prompts and alpha.
        data: the decoded lists of that seed, by name.
        rates: learning rates.
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
        """Train, in one stage or, with bridge and prompt, in two."""
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
        swa = fit(classifier, trained, batches, steps, recipe, self.method.regularised, self._note)
        state = self.model.state_dict() if swa is None else swa.averaged_state_dict()
        # Cloned: a sweep writes mixtures into the model, and with them into its live tensors.
        self.theta = {name: value.detach().clone() for name, value in state.items()}

    def _note(self, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.seconds.append(seconds)

    def result(self) -> dict[str, Any]:
        """What the results file keeps of the run."""
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
        """Top-1 accuracy in [0, 1] by lambda."""
        names, clips = test_clips(test, self.data)
        classifier = make_classifier(self.model, self.tokenizer, names, self.method)
        loader = DataLoader(clips, batch_size=64)
        if self.method.interpolated:
            points = sweep(classifier, self.clip, self.theta, loader, LAMBDAS, description=test)
            return {f"{lam:g}": found.top1 for lam, found in points.items()}
        with fixed_text(classifier):
            found = evaluate(classifier, loader, description=test)
        return {"1" if self.method.family is None else "0": found.top1}


def prepare(model: CLIP, method: Method) -> list[nn.Parameter]:
    """Give the original CLIP what a method adds, and return what it trains first."""
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
    """The classifier that goes with a method."""
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
    """Train in place, each method with the same optimizer, schedule and clips.

    The optimizer and the schedule are the trainer's, :mod:`examples.finetune`; so is what comes
    out for the methods that it knows.

    Args:
        classifier: holds the model and the training classes.
        trained: what the optimizer changes; its present values are the regulariser's anchor.
        batches: ``(video [B, T, 3, H, W], label [B])``, at least ``steps`` of them.
        steps: optimizer steps, 5 % of them warm-up.
        recipe: learning rate, weight decay, alpha and so on.
        regularised: with IWR and SWA.
        on_step: called after each step with its loss and its time in seconds.

    Returns:
        The average over the second half of the steps, where the method averages.
    """
    model = classifier.model
    optimizer = make_optimizer(trained, recipe)
    iwr = openvclip.InterpolatedWeightRegularizer(
        model,
        optimizer,
        interval=(0.0, recipe.alpha_max),
        weight=recipe.iwr_weight if regularised else 0.0,  # 0 is a plain step
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
    """Whole batches in random order, pass after pass; the same ones for the same seed."""
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
    """Indices of ``shots`` clips of each class, in ascending order; of all for None.

    With one seed, fewer shots are a part of more.

    Raises:
        ValueError: a class has fewer clips.
    """
    if shots is None:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        (own,) = torch.where(labels == label)
        if len(own) < shots:
            raise ValueError(f"Class {int(label)} has {len(own)} clips, fewer than {shots} shots.")
        drawn.append(own[torch.randperm(len(own), generator=generator)[:shots]])
    return torch.cat(drawn).sort().values


def training_clips(
    setting: Setting, train: TensorDataset, seed: int
) -> tuple[list[str], TensorDataset]:
    """The classes that a setting trains on, and the clips, the same for every method."""
    video, label = train.tensors
    drawn = draw_shots(label, setting.shots, seed)
    clips = TensorDataset(video[drawn], label[drawn])
    return of_classes(clips, base_and_novel()[0]) if setting.base else (class_names("seen"), clips)


def test_clips(test: str, data: Mapping[str, TensorDataset]) -> tuple[list[str], TensorDataset]:
    """The classes among which a test's clips are told apart, and the clips."""
    if test in ("base", "novel"):
        names = base_and_novel()[("base", "novel").index(test)]
        return of_classes(data["seen_test"], names)
    name = "seen_test" if test == "seen" else test
    return class_names(LISTS[name]), data[name]


def of_classes(clips: TensorDataset, names: list[str]) -> tuple[list[str], TensorDataset]:
    """Clips of some of the seen classes, with labels that are places in ``names``."""
    places = torch.full((len(class_names("seen")),), -1)
    for place, name in enumerate(names):
        places[class_names("seen").index(name)] = place
    video, label = clips.tensors
    kept = places[label] >= 0
    return names, TensorDataset(video[kept], places[label[kept]])
