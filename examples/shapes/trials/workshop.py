"""What a training needs: the clips of a cell, the original CLIP, and one loop for all methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import openvclip
from examples.shapes.model import Tokenizer, create_model
from examples.shapes.trials.cells import Cell
from examples.shapes.trials.clips import FRAMES, Clips
from examples.shapes.world import TEMPLATES
from openvclip import prompting
from openvclip.training.methods import Classifier, make_optimizer, text_made_once
from openvclip.training.recipe import Recipe, learning_rate

if TYPE_CHECKING:
    from open_clip import CLIP

__all__ = [
    "EXPANDED",
    "ONE_BY_ONE",
    "VIDEO",
    "VITA",
    "Form",
    "State",
    "Trained",
    "Workshop",
    "fresh_clip",
    "use_original",
]

State = Mapping[str, Tensor]

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from a batch ``(video [B, T, 3, 32, 32], class index [B])`` to a scalar loss."""


@dataclass(frozen=True)
class Form:
    """How the weights of a method become a classifier.

    Attributes:
        name: name of the form.
        prepare: changes a fresh CLIP in place, so that the weights fit.
        classifier: returns a classifier from the model, its tokenizer and the class names.
        images_as_clips: number of frames that an image is repeated to; 0 classifies images.
    """

    name: str
    prepare: Callable[[nn.Module], object]
    classifier: Callable[[nn.Module, Tokenizer, Sequence[str]], Classifier]
    images_as_clips: int = 0

    def model(self) -> tuple[CLIP, Tokenizer]:
        """Return the original CLIP in this form, and its tokenizer."""
        model, tokenizer = fresh_clip()
        self.prepare(model)
        return model, tokenizer


def fresh_clip() -> tuple[CLIP, Tokenizer]:
    """Return a new copy of the original CLIP, and its tokenizer."""
    model, tokenizer = _original()
    return deepcopy(model), tokenizer


@lru_cache(maxsize=1)
def _original() -> tuple[CLIP, Tokenizer]:
    return _source()


def _source() -> tuple[CLIP, Tokenizer]:
    return create_model()


def use_original(model: CLIP, tokenizer: Tokenizer) -> None:
    """Take another model as the original CLIP of this process."""
    global _source

    def source() -> tuple[CLIP, Tokenizer]:
        return model, tokenizer

    _source = source
    _original.cache_clear()


def _zero_shot(model: nn.Module, tokenizer: Tokenizer, names: Sequence[str]) -> Classifier:
    return openvclip.ZeroShotClassifier(model, tokenizer, names, TEMPLATES)


def _attach_vita(model: nn.Module) -> None:
    prompting.attach_vita(
        model,
        frames=FRAMES,
        global_prompts=8,
        local_prompts=True,
        summary_prompt=True,
        time_embedding=True,
        text_prompts=8,
    )


#: Attention over three frames, the mean of unit features, four templates: Open-VCLIP's classifier.
EXPANDED = Form("expanded", openvclip.expand_temporal_attention, _zero_shot)

#: Frames one by one, the mean of unit features, four templates: the original CLIP.
ONE_BY_ONE = Form("frames", lambda model: None, _zero_shot)

#: Frames one by one, the mean normalised, one template: ViFi-CLIP's classifier.
VIDEO = Form("video", lambda model: None, prompting.VideoClassifier)

#: The prompts of Vita-CLIP.
VITA = Form("vita", _attach_vita, prompting.VideoClassifier, images_as_clips=FRAMES)


@dataclass
class Trained:
    """The result of a training.

    Attributes:
        ends: whole state dicts by name, such as ``"last"`` and ``"swa"``.
        seconds: processor time of each step in seconds.
        losses: loss of each step.
        parameters: number of trained parameters.
    """

    ends: dict[str, State]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parameters: int = 0

    def report(self) -> dict[str, Any]:
        """Return the numbers for the results file."""
        tenth = max(1, len(self.losses) // 10)
        return {
            "step_seconds": median(self.seconds) if self.seconds else None,
            "steps": len(self.seconds),
            "parameters": self.parameters,
            "loss": sum(self.losses[-tenth:]) / tenth if self.losses else None,
        }


@dataclass(frozen=True)
class Workshop:
    """A cell, ready for training.

    Attributes:
        cell: the cell.
        clips: the training clips.
        steps: number of optimizer steps of a run.
        batch_size: number of clips of a step.
        order: number of the run with this cell; each number has another order of the clips.
        device: where the training runs.
    """

    cell: Cell
    clips: Clips
    steps: int
    batch_size: int
    order: int = 0
    device: str = "cpu"

    @property
    def seed(self) -> int:
        """The seed of the order of the clips, and of everything that is drawn in the training."""
        return self.cell.seed + 10_000 * self.order

    @cached_property
    def clip(self) -> dict[str, Tensor]:
        """The state dict of the original CLIP. Do not change it."""
        return dict(fresh_clip()[0].to(self.device).state_dict())

    def part(self, actions: Sequence[str]) -> Workshop:
        """Return a workshop with the training clips of some actions, and fewer steps.

        The class indices refer to the class names of these actions, see :meth:`names`. The number
        of steps is divided in proportion to the actions.
        """
        of_actions = tuple(a for a in self.cell.trained_actions if a in actions)
        pairs = self.cell.pairs("train")
        classes = [index for index, (_, action) in enumerate(pairs) if action in of_actions]
        share = len(of_actions) / len(self.cell.trained_actions)
        return replace(
            self,
            cell=replace(self.cell, trained_actions=of_actions),
            clips=self.clips.of_classes(classes),
            steps=max(1, round(self.steps * share)),
        )

    def names(self) -> list[str]:
        """Return the names of the training classes."""
        return self.cell.names("train")

    def start(self, form: Form = EXPANDED) -> tuple[CLIP, Classifier, Tokenizer]:
        """Return a fresh CLIP, a classifier of the training classes, and the tokenizer."""
        torch.manual_seed(self.seed)
        model, tokenizer = form.model()
        model.to(self.device)
        return model, form.classifier(model, tokenizer, self.names()), tokenizer

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches in random order, for ever."""
        generator = torch.Generator().manual_seed(self.seed)
        queue = torch.empty(0, dtype=torch.int64)
        while True:
            while len(queue) < self.batch_size:
                queue = torch.cat([queue, torch.randperm(len(self.clips), generator=generator)])
            video, label = self.clips.at(queue[: self.batch_size])
            yield video.to(self.device), label.to(self.device)
            queue = queue[self.batch_size :]

    def fit(
        self,
        model: nn.Module,
        classifier: nn.Module,
        *,
        lr: float,
        loss: Loss | None = None,
        extra: Sequence[nn.Parameter] = (),
        trackers: Mapping[str, Any] | None = None,
        iwr: Mapping[str, Any] | None = None,
    ) -> Trained:
        """Train the parameters of a model that require gradients.

        Every method has this loop: AdamW, 5 % warm-up, half a cosine, a gradient norm of at most 1.

        Args:
            model: the model.
            classifier: classifier of the training classes that holds the model.
            lr: learning rate after the warm-up.
            loss: loss of a batch. Default: the cross entropy of the classifier.
            extra: parameters to train that do not belong to the model.
            trackers: averages along the run by name, each with a method ``update``. Default: the
                average over the second half of the steps, as ``"swa"``.
            iwr: options of :class:`openvclip.InterpolatedWeightRegularizer`. Default: no IWR.

        Returns:
            The last weights as ``"last"``, and the averages by their names.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        recipe = Recipe(
            lr=lr, warmup_start_lr=lr / 100, end_lr=lr / 100, batch_size=self.batch_size
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer([*trained, *extra], recipe)
        options = {"weight": 0.0} if iwr is None else dict(iwr)  # weight 0: plain steps
        regularizer = openvclip.InterpolatedWeightRegularizer(
            model, optimizer, seed=self.seed, **options
        )
        if trackers is None:
            trackers = {"swa": self.swa(model)}
        result = Trained({}, parameters=sum(p.numel() for p in trained))
        loss = loss or (lambda video, label: functional.cross_entropy(classifier(video), label))
        model.train()
        # On a CPU a process has one thread; a GPU also works while the process waits.
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        with text_made_once(classifier):
            for step, (video, label) in zip(range(self.steps), self.batches()):  # noqa: B905
                started = clock()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, self.steps // 20, self.steps, recipe)
                value = regularizer.step(loss, video, label, max_grad_norm=1.0).item()
                for tracker in trackers.values():
                    tracker.update(model)
                if value != value or abs(value) == float("inf"):
                    raise FloatingPointError(f"The loss is {value} at step {step + 1}.")
                result.seconds.append(clock() - started)
                result.losses.append(value)
        model.eval()
        result.ends["last"] = {n: v.detach().clone() for n, v in model.state_dict().items()}
        for name, tracker in trackers.items():
            if hasattr(tracker, "averaged_state_dict"):
                result.ends[name] = tracker.averaged_state_dict()
        return result

    def swa(self, model: nn.Module) -> openvclip.SWATracker:
        """Return a tracker of the average over the second half of the steps."""
        return openvclip.SWATracker(model, start=self.steps // 2, every=max(1, self.steps // 80))
