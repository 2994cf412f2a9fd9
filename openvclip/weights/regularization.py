"""Interpolated weight regularisation: Equations 7-9 and Algorithm 1 of Open-VCLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from openvclip.errors import UsageError
from openvclip.weights.anchored import AnchoredWeights
from openvclip.weights.arguments import require_device
from openvclip.weights.batch_part import number_of_clips, part_size, take_clips
from openvclip.weights.draws import Draws
from openvclip.weights.gradients import (
    Gradients,
    apply_gradients,
    innermost,
    is_accumulating,
    require_one_evaluation,
)
from openvclip.weights.regularization_input import (
    require_alpha,
    require_own_optimizer,
    require_settings,
    require_state,
    require_wrapper,
)
from openvclip.weights.shards import (
    backend_device,
    no_sync,
    process_groups,
    require_agreement,
    reshard,
)


class InterpolatedWeightRegularizer:
    r"""Train weights that keep a low loss when they are interpolated with the original weights.

    Equation 7 adds a second loss to the loss of the weights :math:`\theta`. It is the loss of
    weights between :math:`\theta` and the original CLIP, on the same batch:

    .. math:: L(\theta) + \beta L(\tilde\theta), \qquad
              \tilde\theta = \alpha\theta_{CLIP} + (1-\alpha)\theta, \qquad
              \alpha \sim U(\text{interval}), \qquad \beta = \frac{C}{1-\alpha}

    With this :math:`\beta` the gradient is :math:`g(\theta) + C\,g(\tilde\theta)` (Equation 9),
    where :math:`g` is the gradient of the plain loss. One training step is therefore one pass with
    the interpolated weights, one pass with the weights themselves, and one step of the optimizer::

        iwr = InterpolatedWeightRegularizer(model, optimizer)  # anchor: the current weights
        for video, label in loader:
            loss = iwr.step(lambda: criterion(classifier(video), label))

    Loops with their own backward pass (gradient accumulation, clipping, several losses) use
    :meth:`interpolated`, and multiply the second loss by ``iwr.weight``::

        optimizer.zero_grad()
        with iwr.interpolated():
            for video, label in micro_batches:
                (iwr.weight * criterion(classifier(video), label)).backward()
        for video, label in micro_batches:
            criterion(classifier(video), label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    Only parameters that require gradients are interpolated. The weights, and the buffers of all
    modules, are restored bitwise after each block and after any exception. Running statistics are
    therefore those of plain training. The regulariser draws alpha from its own generator, so it
    neither reads nor changes the global random state.

    Several processes that train one model draw the same alphas if all of them create the
    regulariser with the same seed. The first step or block compares the generators, settings and
    anchors of the processes, and raises an error if they differ. Under
    ``DistributedDataParallel``, :meth:`step` reduces the gradients of both passes together. Under
    ``fully_shard`` (FSDP2), the anchor and the copy of the weights are shards, and gradients are
    reduced after each pass. Reducing them together would need memory for the gradients of the whole
    model.

    Args:
        model: the model that is trained, with or without wrappers.
        optimizer: the optimizer that :meth:`step` uses. :meth:`interpolated` does not need it.
        wrapper: the module that the closure calls, if ``DistributedDataParallel`` or
            ``fully_shard`` wraps a larger module than ``model``, for example a classifier that
            holds the model. Also needed if modules around ``model`` have batch norm.
        anchor: original weights by name, usually the state dict of the original CLIP. ``None``
            copies the current weights of the trained parameters. A passed tensor is kept without a
            copy if it is already on ``anchor_device`` and shares no memory with the model: do not
            change it after the call. For a sharded model, whole and sharded tensors are accepted.
        anchor_device: device of the anchor, and of the copy of the weights during
            :meth:`interpolated`. Default: the device of the parameters. Use ``"cpu"`` for a model
            that barely fits on its GPU. The copies use page-locked memory, and the results are the
            same. :meth:`step` copies while the GPU computes. For this it uses up to half of the
            memory that PyTorch holds without using it; see :meth:`free_memory`.
        interval: ``(low, high)`` of alpha, the weight of the *anchor*, within [0, 1]. The paper
            uses (0.0, 0.6). Equal values fix alpha.
        weight: C of Equation 9, at least 0. The paper uses 0.5.
        share: share of the clips of each batch on which the interpolated pass runs, in (0, 1]. With
            0.25, a step costs about 1.25 plain steps instead of 2. See **A part of the batch**.
        every: :meth:`step` adds the interpolated pass in every ``every``-th call, starting with
            the first call. All other calls are plain steps. The weight C is not scaled up for the
            skipped calls.
        seed: seed of the generators of alpha and of the parts.
        missing: what to do with trained parameters that the anchor lacks. ``"error"`` raises an
            error, ``"skip"`` trains them without regularisation.

    Raises:
        RegularizationError: an argument is out of range.
        WeightTypeError: ``model`` or ``wrapper`` is not a module.
        UsageError: no parameter requires gradients; ``optimizer`` is none, or belongs to another
            model; or ``seed`` or ``anchor_device`` can't be used.
        StateMismatchError: the anchor lacks trained parameters, has names that the model does not
            have, or has other shapes.

    **A part of the batch.** With ``share`` below 1, give the batch to :meth:`step`, which draws a
    random part of it for the interpolated pass. Loops of their own call :meth:`part_of`::

        iwr = InterpolatedWeightRegularizer(model, optimizer, share=0.25)
        for video, label in loader:
            loss = iwr.step(lambda v, y: criterion(classifier(v), y), video, label)

    If the loss is the *mean* over the clips, its gradient on a part is an unbiased estimate of its
    gradient on the batch, and nothing else changes. If the loss is a *sum* over the clips, the
    closure must divide the loss by the number of clips that it gets. A contrastive loss compares
    the clips of a part only with each other: it has fewer negatives, so it is another loss. Batch
    norm uses the statistics of the part.

    **LoRA.** Pass ``anchor=openvclip.weights.lora_anchor(model)``. The products of the factors are
    then scaled by ``1 - alpha``, and the gradients of the factors are those of the products.

    Memory: the anchor and, during the interpolated pass, one copy of the trained parameters and of
    the buffers. For a sharded model, the anchor and the copy are shards. :meth:`step` runs the
    interpolated pass first, so the copy is freed before the second pass, in which the gradients of
    the first pass are held. Use the same order in your own loops.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        wrapper: nn.Module | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        anchor_device: torch.device | str | None = None,
        interval: tuple[float, float] = (0.0, 0.6),
        weight: float = 0.5,
        share: float = 1.0,
        every: int = 1,
        seed: int = 0,
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        require_settings(interval, weight, share, every, missing)
        require_wrapper(wrapper)
        self.model = model
        self.optimizer = optimizer
        self.wrapper = wrapper
        self.anchor_device = (
            None if anchor_device is None else require_device(anchor_device, "anchor_device")
        )
        self.interval = (float(interval[0]), float(interval[1]))
        self.weight = float(weight)
        self.share = float(share)
        self.every = int(every)
        self._steps = 0
        self._draws = Draws(seed)
        self._inside = False
        self._agreed = False
        self._weights = AnchoredWeights(model, anchor, missing, self.anchor_device)
        self._gradients: Gradients | None = None
        if optimizer is not None:
            require_own_optimizer(model, optimizer)
            self._gradients = Gradients(innermost(optimizer))

    def step(
        self,
        closure: Callable[..., Tensor],
        *batch: Any,
        scaler: Any = None,
        max_grad_norm: float | None = None,
        backward: Callable[[Tensor], Any] = Tensor.backward,
    ) -> Tensor:
        """Do one training step: compute the gradients of both losses, and step the optimizer.

        Inside ``accelerator.accumulate()``, the gradients of the micro-batches are added up, and
        the last one clips and steps.

        Args:
            closure: function that runs the forward pass and returns the loss, a scalar. It must
                not call ``backward`` or ``zero_grad``. It is called twice, first with the
                interpolated weights. A plain step (see ``every``) calls it once.
            batch: arguments of the closure, such as ``video, label``. With ``share`` below 1, the
                closure gets the part of :meth:`part_of` in the interpolated pass, and the whole
                batch in the plain pass.
            scaler: a ``torch.amp.GradScaler``. It scales both losses, steps the optimizer and is
                updated, so a step with infinite gradients is skipped as usual.
            max_grad_norm: maximum norm of the combined gradient of all parameters of the
                optimizer. The paper's recipe uses 1.0. Default: no clipping.
            backward: function that runs the backward pass of a loss, for example
                ``accelerator.backward``. Default: ``Tensor.backward``.

        Returns:
            The loss of the weights themselves (not of the interpolated weights), detached.

        Raises:
            LossError: the closure did not return a scalar loss that requires gradients, or it
                changed the gradients.
            UsageError: there is no optimizer; ``share`` is below 1 and the call has no batch; the
                arguments of the batch have different numbers of clips; the optimizer evaluates the
                loss several times in a step (LBFGS, SAM); there are gradients that were not used;
                the weights changed in the first pass; or the call is inside a block of
                :meth:`interpolated`, or inside the step of the optimizer.
        """
        optimizer, gradients = self._ready_to_step()
        self._require_agreement()
        if self.share < 1:
            number_of_clips(batch)
        regularize = self._is_due()
        # accelerate's zero_grad() does nothing between two micro-batches.
        outer = innermost(optimizer) if hasattr(optimizer, "gradient_state") else optimizer
        gradients.prepare(lambda: outer.zero_grad(set_to_none=True))
        accumulating = is_accumulating(optimizer)
        try:
            if regularize:
                part = self.part_of(*batch)
                # The second backward pass reduces the sum of both gradients over the processes.
                with self.interpolated(backwards=1), no_sync(self._modules()):
                    second = gradients.loss_of(lambda: closure(*part), self._modules())
                    backward(_scaled(self.weight * second, scaler))
                del second, part  # the graph and the videos must be gone in the second pass
                gradients.require_no_graph()
            loss = gradients.loss_of(lambda: closure(*batch), self._modules())
            with self._weights.while_anchor_comes() if self._is_due(1) else nullcontext():
                backward(_scaled(loss, scaler))
            self._weights.require_unchanged()
            apply_gradients(optimizer, scaler, None if accumulating else max_grad_norm)
        except BaseException:
            gradients.mark(used=True)  # the next step clears them
            raise
        skips = scaler is not None or getattr(optimizer, "scaler", None) is not None
        gradients.finish(accumulating=accumulating, skips=skips)
        self._steps += 1
        return loss.detach()

    def _is_due(self, ahead: int = 0) -> bool:
        """Return whether the present step is regularised, or the step ``ahead`` steps later."""
        return self.weight > 0 and (self._steps + ahead) % self.every == 0

    def part_of(self, *batch: Any) -> tuple[Any, ...]:
        """Draw the random part of a batch on which the interpolated pass runs.

        The part has ``share`` of the clips, rounded, and at least one. With ``share=1`` it is the
        batch itself. :meth:`step` calls this method. Your own loop calls it for each micro-batch::

            some, their_label = iwr.part_of(video, label)
            with iwr.interpolated():
                (iwr.weight * criterion(classifier(some), their_label)).backward()

        All processes draw the same positions. Batches of equal size therefore give parts of equal
        size, and processes that compute parts of one video (tensor parallel) take the same videos.

        Args:
            batch: the arguments of a loss. Tensors have the clips along their first axis, lists
                and tuples have one entry for each clip. Dicts, lists and tuples can hold several
                of them. ``None``, numbers, texts and other objects are returned as they are.

        Returns:
            The part of each argument, as a tuple: ``(inputs,) = iwr.part_of(inputs)``.

        Raises:
            UsageError: there are no clips, or the arguments have different numbers of clips.
        """
        if self.share == 1:
            return batch
        self._require_agreement()
        clips = number_of_clips(batch)
        return take_clips(batch, self._draws.part(clips, part_size(self.share, clips)))

    def free_memory(self) -> None:
        """Free the anchor's copy on the GPU, which :meth:`step` fetches for the next step.

        Only ``anchor_device="cpu"`` has such a copy. Call this before work between two steps that
        needs more memory of the GPU than a training step, such as an evaluation with large batches.
        """
        self._weights.free()

    def _ready_to_step(self) -> tuple[Any, Gradients]:
        """Return the optimizer and its gradients, or raise an error if ``step()`` can't be used."""
        if self.optimizer is None:
            raise UsageError(
                "step() needs an optimizer: create InterpolatedWeightRegularizer(model, "
                "optimizer). Your own loop can use `with iwr.interpolated():` without one."
            )
        if self._inside:
            raise UsageError("step() was called within interpolated(); end the block first.")
        inner = innermost(self.optimizer)
        require_one_evaluation(inner)
        if self._gradients is None or not self._gradients.are_of(inner):
            self._gradients = Gradients(inner)
        return self.optimizer, self._gradients

    def _modules(self) -> list[nn.Module]:
        return [self.model] if self.wrapper is None else [self.model, self.wrapper]

    @contextmanager
    def interpolated(
        self, alpha: float | None = None, *, backwards: int | None = None
    ) -> Iterator[float]:
        """Set the weights to ``alpha * anchor + (1 - alpha) * weights`` inside a ``with`` block.

        Run the forward *and* the backward pass of the second loss inside the block, and nothing
        that changes the weights. After the block, the weights and all buffers of the model are
        restored bitwise, also after an exception. Gradients from inside the block are kept.

        A change of the weights inside the block raises an error after the weights are restored.
        Noticed are operations in place, replaced parameters, ``load_state_dict()``, and an
        optimizer that steps in the backward pass. On a GPU, changes that PyTorch does not record
        (fused optimizers, ``.data``) are noticed by the next block or the next optimizer step of
        :meth:`step`. Not noticed are writes through ``.data`` to a few elements only.

        Args:
            alpha: the weight of the anchor, in [0, 1]. Default: a new draw from the interval, as
                :meth:`draw_alpha` gives it.
            backwards: number of backward passes in the block. With ``anchor_device="cpu"``, the
                last of them then hides the copy of the weights to the GPU. A wrong number changes
                the time and the memory, but no result.

        Yields:
            alpha.

        Raises:
            RegularizationError: ``alpha`` is out of range.
            UsageError: the weights changed inside the block; two blocks are nested; a parameter
                was sharded, or set to require gradients, after the regulariser was created; or the
                processes that train the model would not draw the same alphas.
        """
        if self._inside:
            raise UsageError("interpolated() can't be nested; end the first block before the next.")
        if alpha is not None:
            require_alpha(alpha)
        self._weights.require_unchanged()
        for module in self._modules():
            reshard(module)
        live = self._weights.live()
        self._require_agreement()
        alpha = self._draw() if alpha is None else float(alpha)
        self._inside = True
        try:
            with self._weights.interpolated(live, alpha, self._modules(), backwards):
                yield alpha
        finally:
            self._inside = False

    def _require_agreement(self) -> None:
        """Raise an error if the processes differ in seed, settings or anchor."""
        groups = [] if self._agreed else process_groups(self._modules())
        if groups:
            facts = {
                "alpha's generator": self._draws.alphas.get_state().numpy().tobytes(),
                "settings": repr((*self._settings().values(), self._steps)).encode(),
                "the anchor": self._weights.fingerprint.encode(),
            }
            if self.share < 1:
                facts["settings"] += self._draws.parts.get_state().numpy().tobytes()
            require_agreement(
                groups,
                facts,
                backend_device(self.model.parameters()),
                "Create the regulariser with the same seed, settings and anchor in each process, "
                "load its state in all or none of them, and call step() and interpolated() equally "
                "often in each of them.",
            )
        self._agreed = True

    def draw_alpha(self) -> float:
        """Draw an alpha, to use it in several blocks: ``with iwr.interpolated(alpha):``.

        Optimizers that evaluate the loss several times in a step (LBFGS, SAM) need the same alpha
        in all evaluations of the step.
        """
        self._require_agreement()
        return self._draw()

    def _draw(self) -> float:
        return self._draws.alpha(self.interval)

    def _settings(self) -> dict[str, Any]:
        names = ("interval", "weight", "share", "every")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the number of steps and the states of the generators.

        The state holds a fingerprint of the anchor instead of the anchor itself, which is the
        original CLIP and usually available as a file. :meth:`load_state_dict` raises an error if
        the fingerprints of the two anchors differ.
        """
        return {
            **self._settings(),
            "steps": self._steps,
            **self._draws.state(),
            "anchor_fingerprint": self._weights.fingerprint,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a copy or a pickle, which has its own optimizer."""
        return {**vars(self), "_gradients": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`, and continue its alphas and its parts.

        The settings of the state replace those of this object. States of openvclip before ``share``
        existed set ``share=1``, as in their run.

        Raises:
            StateMismatchError: an entry is missing, unknown or damaged, or the saved run has
                another anchor. Nothing changes then.
            WeightTypeError: ``state`` is not a mapping.
        """
        older: dict[str, Any] = {"share": 1.0, "part_generator": self._draws.parts.get_state()}
        if isinstance(state, Mapping):
            state = {**older, **state}
        require_state(state, self.state_dict())
        self._draws.load(state)
        low, high = state["interval"]
        self.interval, self.weight = (float(low), float(high)), float(state["weight"])
        self.share = float(state["share"])
        self.every, self._steps = int(state["every"]), int(state["steps"])
        self._agreed = False


def _scaled(loss: Tensor, scaler: Any) -> Tensor:
    scaled: Tensor = loss if scaler is None else scaler.scale(loss)
    return scaled
