"""The objectives of training: the cross entropy of classes, and the contrastive loss of captions.

An objective adds the gradients of a step to the parameters. The trainer of ``examples/finetune.py``
calls it for the plain weights and for the interpolated weights of the regulariser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from openvclip.processes import Processes
from openvclip.training.batches import seed_of
from openvclip.training.methods import Classifier
from openvclip.training.pairs import PairEncoder, contrastive_loss
from openvclip.training.recipe import Run
from openvclip.training.regularised import RegularisedClassifier
from openvclip.weights.shards import local, no_sync, whole

__all__ = [
    "LARGEST_SCALE",
    "Classification",
    "Contrastive",
    "Learner",
    "Objective",
    "RegularisedClassification",
    "make_objective",
]

Learner = Classifier | PairEncoder
"""What is trained: a classifier, or the encoder of pairs for the contrastive objective."""

Module = Learner | RegularisedClassifier
"""What an objective calls: what is trained, with the regularisers of the recipe."""

LARGEST_SCALE = 100.0
"""The contrastive objective limits the scale of the cosines to this number, as CLIP's training."""

Batches = Sequence[Sequence[Any]]
"""The micro-batches of a process in a step."""


class Objective(ABC):
    """What a step minimises.

    Args:
        learner: the module that is trained, before it is wrapped.
        forward: ``learner``, wrapped for several processes.
        scaler: scales the loss before the backward pass.
        run: gives the dtype of autocast.
        processes: the processes that train together.
    """

    def __init__(
        self,
        learner: Module,
        forward: nn.Module,
        scaler: torch.amp.GradScaler,
        run: Run,
        processes: Processes,
    ) -> None:
        self.learner, self.forward, self.scaler = learner, forward, scaler
        self.amp, self.processes = run.amp, processes
        self.device = next(learner.parameters()).device

    @abstractmethod
    def add_gradients(self, batches: Batches, factor: float, *, reduce: bool) -> Tensor:
        """Add the gradients of ``factor`` times the loss of a step.

        Args:
            batches: the micro-batches of this process.
            factor: factor of the loss.
            reduce: whether the processes sum their gradients in the last backward pass. Otherwise
                the gradients of this process wait for a later pass.

        Returns:
            The part of each batch in the loss, without ``factor``. The loss of the step is the mean
            over the processes of the sums of these parts.
        """

    def after_step(self) -> None:  # noqa: B027 (most objectives have nothing to do)
        """Do what the objective needs after the step of the optimizer."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, self.amp, enabled=bool(self.amp))

    def reducing(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of a pass, in which only the last pass reduces the gradients."""
        return nullcontext() if is_last else no_sync([self.forward])


class Classification(Objective):
    """The cross entropy of classes. A batch is ``(video, class index)``."""

    def add_gradients(self, batches: Batches, factor: float, *, reduce: bool) -> Tensor:
        """Add the gradients of ``factor`` times the mean cross entropy; see :class:`Objective`."""
        videos = sum(len(label) for _, label, *_ in batches)
        shares = []
        for number, (video, label, *_) in enumerate(batches, start=1):
            with self.reducing(reduce and number == len(batches)):
                with self.autocast():
                    on_device = video.to(self.device, non_blocking=True)
                    label = label.to(self.device, non_blocking=True)
                    loss = len(label) / videos * self._loss(video, on_device, label)
                self.scaler.scale(factor * loss).backward()
            shares.append(loss.detach())
        return torch.stack(shares)

    def _loss(self, video: Tensor, on_device: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(self.forward(on_device), label)


class RegularisedClassification(Classification):
    """The cross entropy of classes, plus the losses of the regularisers of the learner.

    The pass at the interpolated weights has these losses too, so C of Equation 9 weighs all of
    them. All passes of a step have the same random texts.
    """

    learner: RegularisedClassifier

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._texts: Tensor | None = None
        # Both passes of a step need the same features of the original CLIP. The videos are held, so
        # that no other video gets the id of one of them.
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def after_step(self) -> None:
        """Forget the random texts and the features of the step."""
        self._texts = None
        self._originals.clear()

    def _loss(self, video: Tensor, on_device: Tensor, label: Tensor) -> Tensor:
        if self.learner.energy is not None and self._texts is None:
            self._texts = self.learner.energy.draw()
        if id(video) not in self._originals:
            self._originals[id(video)] = video, self.learner.original.frames(on_device)
        logits, penalty = self.forward(on_device, self._originals[id(video)][1], self._texts)
        total: Tensor = functional.cross_entropy(logits, label) + penalty
        return total


class Contrastive(Objective):
    """The symmetric InfoNCE loss of all pairs in a step, of all processes and micro-batches.

    A batch is ``(video, captions)`` and optionally the names of the videos. Two pairs with the same
    caption (the same token ids) or the same video are not negatives of each other; see
    :func:`openvclip.training.contrastive_loss`.

    The gradients are those of one process with the whole batch. A step with several micro-batches
    encodes each of them twice: first without gradients, to know all features, and then for the
    backward pass, with the same dropout.

    Source: CLIP (Radford et al., 2021) for the loss and the limit of the scale; GradCache (Gao et
    al., 2021) for the two passes.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Models with a larger scale, such as SigLIP, keep it.
        sign, temperature = self._temperature()
        limit = math.log(LARGEST_SCALE) if sign > 0 else 1 / LARGEST_SCALE
        own = float(whole(temperature).sum())
        self._limit = max(limit, own) if sign > 0 else min(limit, own)

    def add_gradients(self, batches: Batches, factor: float, *, reduce: bool) -> Tensor:
        """Add the gradients of ``factor`` times the contrastive loss; see :class:`Objective`."""
        pairs = [_Pairs(batch, self.learner, self.processes.rank) for batch in batches]
        if len(pairs) == 1:  # one pass is enough
            with self.reducing(reduce):
                features = self._encode(pairs[0])
                loss = self._loss([features], pairs)
                self._backward(features, loss, 0, factor)
            return loss.shares
        states, first_pass = [], []
        for batch in pairs:
            states.append(_Random(self.device))
            with torch.no_grad():
                first_pass.append(self._encode(batch))
        loss = self._loss(first_pass, pairs)
        for number, batch in enumerate(pairs):
            with self.reducing(reduce and number == len(pairs) - 1):
                with states[number].again():
                    features = self._encode(batch)
                self._backward(features, loss, number, factor)
        return loss.shares

    def after_step(self) -> None:
        """Limit the scale of the cosines to :data:`LARGEST_SCALE`."""
        sign, temperature = self._temperature()
        bound = {"max": self._limit} if sign > 0 else {"min": self._limit}
        local(temperature).clamp_(**bound)

    def _temperature(self) -> tuple[int, Tensor]:
        """Return the parameter of the scale, and whether the scale grows (1) with it."""
        model: Any = self.learner.model
        scale = getattr(model, "logit_scale", None)
        return (-1, model.temperature) if scale is None else (1, scale)  # ALIGN divides

    def _encode(self, pairs: _Pairs) -> tuple[Tensor, Tensor, Tensor]:
        with self.autocast():
            video = pairs.video.to(self.device, non_blocking=True)
            features: tuple[Tensor, Tensor, Tensor] = self.forward(video, pairs.tokens)
        return features

    def _loss(
        self, features: Sequence[tuple[Tensor, Tensor, Tensor]], pairs: Sequence[_Pairs]
    ) -> _Loss:
        """Compute the loss of all pairs, and its gradients at the features of this process."""
        own = [torch.cat([part[side].detach() for part in features]) for side in (0, 1)]
        counts = self._counts(len(own[0]))
        keys = torch.cat([batch.keys for batch in pairs]).to(self.device)
        gathered = _gathered(torch.cat(own, dim=1), counts)
        all_keys = _gathered(keys, counts)
        videos, texts = (side.requires_grad_() for side in gathered.chunk(2, dim=1))
        scale = features[0][2].detach().requires_grad_()
        same = (all_keys[:, None] == all_keys[None]).any(dim=-1)
        with torch.enable_grad():
            losses = contrastive_loss(videos, texts, scale, same)
            gradients = torch.autograd.grad(losses.mean(), (videos, texts, scale))
        first = sum(counts[: self.processes.rank])
        rows = slice(first, first + len(own[0]))
        sizes = [len(batch) for batch in pairs]
        world = self.processes.world_size
        parts = [part.sum() for part in (losses.detach()[rows] * world / sum(counts)).split(sizes)]
        shares = _blamed(torch.stack(parts), features, gathered)
        # The processes average their gradients, and each has the gradients of its own features.
        of_videos, of_texts = ((world * part[rows]).split(sizes) for part in gradients[:2])
        of_scale = [size / len(own[0]) * gradients[2] for size in sizes]
        return _Loss(shares, list(zip(of_videos, of_texts, of_scale, strict=True)))

    def _counts(self, own: int) -> list[int]:
        """Return the number of pairs of each process."""
        world = self.processes.world_size
        if world == 1:
            return [own]
        number = torch.tensor([own], device=self.device)
        numbers = [torch.empty_like(number) for _ in range(world)]
        distributed.all_gather(numbers, number)
        return [int(count) for count in numbers]

    def _backward(
        self, features: tuple[Tensor, Tensor, Tensor], loss: _Loss, number: int, factor: float
    ) -> None:
        """Carry the gradients at the features of a micro-batch on to the parameters."""
        products = zip(features, loss.gradients[number], strict=True)
        total = torch.stack([(part * gradient).sum() for part, gradient in products]).sum()
        self.scaler.scale(factor * total).backward()


def make_objective(
    learner: Module,
    forward: nn.Module,
    scaler: torch.amp.GradScaler,
    run: Run,
    processes: Processes,
) -> Objective:
    """Return the objective of a learner: contrastive for a ``PairEncoder``, else classification.

    A :class:`openvclip.training.regularised.RegularisedClassifier` adds its regularisers.

    Args:
        learner: see :class:`Objective`.
        forward: see :class:`Objective`.
        scaler: see :class:`Objective`.
        run: see :class:`Objective`.
        processes: see :class:`Objective`.
    """
    kind: type[Objective] = Contrastive if isinstance(learner, PairEncoder) else Classification
    if isinstance(learner, RegularisedClassifier):
        kind = RegularisedClassification
    return kind(learner, forward, scaler, run, processes)


class _Loss(NamedTuple):
    """The loss of a step.

    Attributes:
        shares: see :meth:`Objective.add_gradients`.
        gradients: the gradients at the features of the videos, at those of the captions and at the
            scale, for each micro-batch of this process.
    """

    shares: Tensor
    gradients: list[tuple[Tensor, Tensor, Tensor]]


class _Pairs:
    """A micro-batch: videos, the token ids of their captions, and keys that tell pairs apart.

    Attributes:
        video: ``[B, T, C, H, W]``.
        tokens: token ids of the captions.
        keys: int64 ``[B, 2]``. Pairs with the same first number have the same caption, pairs with
            the same second number the same video.
    """

    def __init__(self, batch: Sequence[Any], learner: Any, rank: int) -> None:
        self.video, captions, *names = batch
        self.tokens: Tensor = learner.tokens(list(captions))
        # Without names, all videos differ.
        videos = names[0] if names else [f"{rank} {id(self)} {i}" for i in range(len(self.video))]
        keys = zip(map(seed_of, self.tokens.tolist()), map(seed_of, videos), strict=True)
        self.keys = torch.tensor(list(keys))

    def __len__(self) -> int:
        return len(self.video)


class _Random:
    """The state of the random generators before a pass."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Use this state within the block. Afterwards the generators are as before the block."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _gathered(own: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, in the order of their ranks."""
    if len(counts) == 1:
        return own
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _blamed(
    shares: Tensor, features: Sequence[tuple[Tensor, Tensor, Tensor]], gathered: Tensor
) -> Tensor:
    """Return the parts of the loss; NaN only for the batches whose own features are not finite.

    One video whose features are NaN makes the loss of every pair NaN. The error of the trainer
    names the videos of the batches whose part is not finite.
    """
    own = torch.stack([(v.sum() + t.sum()).detach() for v, t, _ in features])
    at_fault = torch.where(own.isfinite(), 0.0, float("nan")).to(shares.dtype)
    return torch.where(gathered.isfinite().all(), shares, at_fault)
