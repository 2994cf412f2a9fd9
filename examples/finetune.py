r"""Fine-tune a CLIP on videos with Open-VCLIP, or with a method that the paper compares it with.

    python finetune.py --model ViT-B-16-quickgelu --pretrained openai \
        --annotations train.csv --videos videos/ --classes classes.txt --out run/
    torchrun --nproc-per-node 8 finetune.py --shards "k400-{0000..0999}.tar" ...
    python finetune.py --objective contrastive --annotations captions.csv --videos videos/ ...

The defaults are the paper's recipe for Kinetics-400 (Section 5.1.3 and the released configuration).
--batch-size counts the videos of all devices together. Each line of train.csv has the path and the
class index of a video, each line of classes.txt the name of a class, and each line of captions.csv
the path and a caption of a video.

The output folder holds the last weights, their average along the run if the method averages, and
final.safetensors (interpolated with the original CLIP: use this file), or prompts.safetensors; also
openvclip.json, so that the folder is a --model of openvclip predict, and a model card. After a
stop, by SIGTERM or by a crash, the same command resumes the run.
"""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import openvclip
from openvclip.commands.progress import progress_bar
from openvclip.commands.streams import command
from openvclip.models.loading import LoadedModel
from openvclip.processes import Processes
from openvclip.training import inputs, methods, objectives, options, outputs, trial
from openvclip.training import processes as distributed
from openvclip.training.batches import seed_of, steps_of_run, videos_of_step
from openvclip.training.checkpoints import Checkpoints, TrainingState
from openvclip.training.log import RunLog, Step
from openvclip.training.objectives import Batches, Learner
from openvclip.training.pairs import PairEncoder
from openvclip.training.recipe import Recipe, Run, learning_rate, total_steps
from openvclip.training.regularised import regularised
from openvclip.training.validation import Validation
from openvclip.weights.shards import clip_gradients


class Trainer:
    """Holds the model, its optimizer and its regulariser, and does the training steps."""

    def __init__(
        self, classifier: Learner, recipe: Recipe, run: Run, processes: Processes, tokenizer: Any
    ) -> None:
        self.recipe, self.run, self.processes = recipe, run, processes
        self.model = model = classifier.model
        self.device = next(model.parameters()).device
        # Under FSDP no process holds a whole model on its device: the original CLIP is on the CPU.
        home = torch.device("cpu") if run.fsdp else self.device
        self.clip = {n: v.detach().to(home, copy=True) for n, v in model.state_dict().items()}
        methods.choose_trained(model, recipe.method, text_tower=recipe.text_tower)
        self.added = regularised(classifier, recipe, run, tokenizer)
        learner = self.added or classifier
        if run.checkpointing:
            distributed.save_memory(model)
        self.forward = distributed.wrap(
            learner, processes, self.device, fsdp=run.fsdp, compiler=run.compiler
        )
        self.trained = [p for p in learner.parameters() if p.requires_grad]
        self.optimizer = methods.make_optimizer(self.trained, recipe, run.betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.amp is torch.float16)
        self.objective = objectives.make_objective(
            learner, self.forward, self.scaler, run, processes
        )
        self.l2 = methods.make_distance_penalty(model, self.clip, recipe)
        self.iwr = openvclip.InterpolatedWeightRegularizer(
            model,
            wrapper=self.forward,
            anchor=self.clip,
            interval=(run.alpha_min, recipe.alpha_max),
            weight=recipe.iwr_weight,
            share=run.share,
            seed=recipe.seed,
        )

    def step(
        self, number: int, batches: Batches, lr: float, stop_requested: Callable[[], bool]
    ) -> tuple[float, float | None, bool]:
        """Do step ``number`` (from 1); return loss, alpha, and whether a process asks to stop."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        alpha, part, interpolated = None, [], torch.zeros(0, device=self.device)
        if self.recipe.uses_iwr and (number - 1) % self.run.every == 0:
            (chosen,) = self.iwr.part_of(range(sum(len(batch[0]) for batch in batches)))
            part = videos_of_step(batches, chosen, self.device)
            # This pass runs first: its copy of the weights takes no memory in the plain pass.
            with self.iwr.interpolated() as alpha:
                interpolated = self.objective.add_gradients(part, self.iwr.weight, reduce=False)
        losses = self.objective.add_gradients(batches, 1.0, reduce=True)
        sums = torch.stack([losses.sum(), interpolated.sum()])
        values, stop = distributed.agree(self.processes, sums, stop_requested())
        if not all(map(math.isfinite, values)):
            if losses.isfinite().all():  # the loss of the interpolated weights alone is not finite
                batches, losses = part, interpolated
            raise distributed.loss_error(values, number, batches, losses, self.processes)
        self.scaler.unscale_(self.optimizer)
        if self.l2 is not None:
            self.l2.add_gradients()
        norm = clip_gradients(self.trained, self.recipe.clip_grad_norm).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler skips the step
            raise distributed.gradient_error(norm, number, batches, self.processes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.after_step()
        return values[0], alpha, stop


def train(
    classifier: Learner,
    loader: Iterable[Sequence[Any]],
    steps_per_epoch: int,
    recipe: Recipe,
    *,
    run: Run | None = None,
    processes: Processes | None = None,
    tokenizer: Any = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], openvclip.SWATracker | None]:
    """Fine-tune the model of a classifier in place.

    Args:
        classifier: holds the original CLIP, expanded or with prompts as the method needs it. A
            ``PairEncoder`` trains on captions, with the contrastive objective.
        loader: gives ``(video [B, T, C, H, W], label [B])``, or ``(video, B captions)``, and
            optionally the names of the videos; iterated once in each epoch.
        steps_per_epoch: number of steps in an epoch.
        recipe: the settings of the method.
        run: options of the run.
        processes: the processes that train together. Each process has its own loader.
        tokenizer: the tokenizer of the model, which ``recipe.text_energy`` needs.
        checkpoints: resume from the last checkpoint, and save checkpoints.
        on_step: called after each step.
        on_epoch: called after each epoch, with the number of steps that are done. If the run
            resumes at the end of an epoch, it is also called at the start.

    Returns:
        The state dict of the original CLIP, and the average if the method averages.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the text names the videos.
        UsageError: no model would enter the average, or the loader gives a wrong number of steps.
        SystemExit: a signal asked the run to stop, and a checkpoint was saved.
    """
    run, processes = run or Run(), processes or Processes()
    trainer = Trainer(classifier, recipe, run, processes, tokenizer)
    model, warmup = classifier.model, recipe.warmup_epochs * steps_per_epoch
    total = total_steps(recipe, run, steps_per_epoch)
    swa = methods.make_tracker(model, recipe, steps_per_epoch, total) if recipe.uses_swa else None
    state = TrainingState(model, trainer.optimizer, trainer.scaler, trainer.iwr, swa, trainer.added)
    first = checkpoints.resume(state) if checkpoints is not None else 0
    model.train()
    # Sharded text weights can't be used outside of a forward pass of the whole classifier.
    text = nullcontext() if run.fsdp else methods.text_made_once(classifier)
    about: Any = {"desc": recipe.method, "disable": None if processes.is_first else True}
    with text, progress_bar(total=total, initial=first, **about) as bar:
        if on_epoch is not None and first and first % steps_per_epoch == 0:
            on_epoch(first)  # a killed run may have ended before this call
        started = time.perf_counter()
        for step, batches in steps_of_run(loader, steps_per_epoch, run.accumulate, first, total):
            waiting = time.perf_counter() - started
            lr, done = learning_rate(step, warmup, total, recipe), step + 1
            loss, alpha, stop = trainer.step(
                done, batches, lr, lambda: checkpoints is not None and checkpoints.stop_requested
            )
            if swa is not None:
                swa.update(model)
            seconds = time.perf_counter() - started
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(Step(done, loss, lr, alpha, waiting, seconds))
            if checkpoints is not None and (stop or checkpoints.due(done, total)):
                checkpoints.save(state, done)
            if on_epoch is not None and done % steps_per_epoch == 0:
                on_epoch(done)
            if stop:
                raise SystemExit(128 + signal.SIGTERM)
            started = time.perf_counter()
    return trainer.clip, swa


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, which has a flag for each field of the recipe."""
    return options.parse_arguments(__doc__ or "", arguments)


def load_model(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    """Return the original CLIP on its device, expanded if the method expands it."""
    loaded = inputs.load_original(
        args.model, args.pretrained, hugging_face=args.hf, start_from=args.start_from
    )
    if trial.sees_neighbours(args):
        openvclip.expand_temporal_attention(loaded.model)
    pixels = loaded.transform.with_(
        name="train", hflip=args.flip, color_jitter=args.color_jitter, short_side=args.short_side
    )
    return replace(loaded, model=loaded.model.to(device), transform=pixels)


def make_classifier(args: argparse.Namespace, loaded: LoadedModel, names: list[str]) -> Learner:
    """Return the classifier of the training classes, with the prompts that the method learns."""
    model, numbers = loaded.model, options.prompt_numbers_of(args)
    if args.objective == "contrastive":
        return PairEncoder(model, loaded.tokenizer)
    methods.attach_prompts(
        model, args.method, names, args.frames, numbers, class_prompts=args.class_prompts
    )
    return methods.make_classifier(
        model, loaded.tokenizer, names, args.method, args.template, text_tower=args.text_tower
    )


def fine_tune(args: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    """Load the model and the videos, train, and write the outputs."""
    recipe = options.recipe_of(args)
    torch.manual_seed(recipe.seed)
    loaded = load_model(args, device)
    model, described = loaded.model, trial.described_run(args, loaded, hashed=processes.is_first)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if args.fsdp:
        distributed.give_scalars_an_axis(model)
    videos = options.load_videos(args, recipe, loaded.transform, processes, device)
    run = options.run_of(args, videos.batches.accumulate, device)
    classifier = make_classifier(args, loaded, videos.names)
    if not processes.is_first:
        torch.manual_seed(seed_of(recipe.seed, processes.rank))  # dropout differs by process
    tests = options.shared_tests(args, videos.names, loaded.transform, processes, run.amp)
    validation = Validation(classifier, tests, sharded=args.fsdp)
    settings = options.settings_of(args, recipe, run)
    checkpoints = Checkpoints(
        args.out,
        {**settings, **videos.about},
        every=args.save_every or videos.batches.steps,
        keep=args.keep,
        processes=processes,
    )
    total = total_steps(recipe, run, videos.batches.steps)
    folder = args.out if processes.is_first else None  # the first process writes the log
    log = RunLog(folder, total, first=checkpoints.last_step, every=args.log_every)
    if processes.is_first:
        print(*options.notes(args, recipe, run, processes, videos), sep="\n", flush=True)

    def validate(step: int) -> None:
        if not any(processes.gather(log.has(step, f"val_{validation.main}"))):
            log.write(step, **{f"val_{k}": value for k, value in validation.accuracy().items()})

    with checkpoints.stop_on(signal.SIGTERM), closing(videos.batches), closing(log):
        clip, swa = train(
            classifier,
            videos.batches,
            videos.batches.steps,
            recipe,
            run=run,
            processes=processes,
            tokenizer=loaded.tokenizer,
            checkpoints=checkpoints,
            on_step=log.step,
            on_epoch=validate,
        )
    results = outputs.RunOutputs(model, clip, swa, shapes, recipe, validation, processes, described)
    about = outputs.RunDescription(
        loaded.name,
        {**settings, "frame_by_frame": not trial.sees_neighbours(args)},
        videos.about,
        trial.write_lists(args, videos.names) if processes.is_first else {},
        trial.trial_commands(args),
    )
    outputs.write_outputs(args.out, results, about)


@command
def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    args = parse_arguments(arguments)
    with distributed.training_processes(args.device, args.timeout) as (processes, device):
        fine_tune(args, processes, device)


if __name__ == "__main__":
    main()
