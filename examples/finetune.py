r"""Fine-tune a CLIP on videos with Open-VCLIP, or one of the methods that it is compared with.

    python examples/finetune.py --model ViT-B-16-quickgelu --pretrained openai \
        --annotations train.csv --videos videos/ --classes classes.txt --out run/
    torchrun --nproc-per-node 8 examples/finetune.py --shards "k400-{0000..0999}.tar" ...

The defaults are the paper's recipe for Kinetics-400 (Section 5.1.3 and the released
configuration); --batch-size is that of all devices together. ``annotations`` has a line
``path,label`` for each video, ``classes`` a name for each label.

Out come ``finetuned.safetensors`` (the last weights), ``averaged.safetensors`` (their average,
where the method averages), ``final.safetensors`` (interpolated with the original CLIP, the
weights to use), or for methods that learn prompts ``prompts.safetensors`` alone, and a model card,
``README.md``. A run that was stopped, by SIGTERM or worse, goes on with the same command.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

if __package__ in (None, ""):  # started by its path: let it find the files beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openvclip
from openvclip.processes import Processes
from openvclip.training import options
from openvclip.training.batches import seed_of, steps_of_run
from openvclip.training.checkpoints import Checkpoints, TrainingState
from openvclip.training.inputs import build_model, load_videos
from openvclip.training.log import RunLog, Step
from openvclip.training.methods import (
    Classifier,
    add_distance_penalty,
    attach_prompts,
    choose_trained,
    make_classifier,
    make_optimizer,
    make_tracker,
    text_made_once,
)
from openvclip.training.outputs import leave
from openvclip.training.processes import (
    agree,
    give_scalars_an_axis,
    gradient_error,
    loss_error,
    save_memory,
    training_processes,
    wrap,
)
from openvclip.training.recipe import Recipe, Run, learning_rate, total_steps
from openvclip.training.validation import Validation
from openvclip.weights.shards import no_sync, whole


def train(
    classifier: Classifier,
    loader: Iterable[Sequence[Any]],
    steps_per_epoch: int,
    recipe: Recipe,
    *,
    run: Run | None = None,
    processes: Processes | None = None,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], openvclip.SWATracker | None]:
    """Fine-tune the classifier's model in place, from the CLIP that it holds.

    Args:
        classifier: holds the CLIP, expanded or with prompts as the method asks for it, and the
            training classes.
        loader: gives ``(video [B, T, C, H, W], label [B])``, optionally with the videos' names;
            iterated once an epoch.
        steps_per_epoch: number of steps that the loader's batches make.
        recipe: how to train.
        run: how to run it.
        processes: the processes that train together, each with a loader of its own.
        checkpoints: go on from the last one, and save.
        on_step: called after each step.
        on_epoch: called after each epoch with the number of steps so far, and once more where a
            run goes on from the end of one.

    Returns:
        The original CLIP's state dict (the anchor), and the average where the method averages.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the text names the videos.
        UsageError: no model would enter the average, or the loader gives another number of steps.
        SystemExit: a checkpoint was saved because a signal asked for it.
    """
    run, processes = run or Run(), processes or Processes()
    model = classifier.model
    device = next(model.parameters()).device
    home = torch.device("cpu") if run.fsdp else device  # nobody holds a whole model there
    clip = {name: value.detach().to(home, copy=True) for name, value in model.state_dict().items()}
    choose_trained(model, recipe.method)
    if run.checkpointing:
        save_memory(model)
    forward = wrap(classifier, processes, device, fsdp=run.fsdp, compiler=run.compiler)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, recipe, run.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
    iwr = openvclip.InterpolatedWeightRegularizer(
        model,
        wrapper=forward,
        anchor=clip,
        interval=(run.alpha_min, recipe.alpha_max),
        weight=recipe.iwr_weight,
        seed=recipe.seed,
    )
    warmup = recipe.warmup_epochs * steps_per_epoch
    total = total_steps(recipe, run, steps_per_epoch)
    swa = make_tracker(model, recipe, steps_per_epoch, total) if recipe.uses_swa else None
    state = TrainingState(model, optimizer, scaler, iwr, swa)
    first = checkpoints.resume(state) if checkpoints is not None else 0

    def add_gradients(batches: list[Sequence[Any]], factor: float, *, reduce: bool) -> Tensor:
        """Add the gradients of ``factor`` times the mean loss; returns each batch's part of it."""
        videos = sum(len(label) for _, label, *_ in batches)
        parts = []
        for number, (video, label, *_) in enumerate(batches, start=1):
            # Gradients are summed over the processes once a step, in the last backward pass.
            with nullcontext() if reduce and number == len(batches) else no_sync([forward]):
                with torch.autocast(device.type, run.amp, enabled=run.amp is not None):
                    logits = forward(video.to(device, non_blocking=True))
                    loss = functional.cross_entropy(logits, label.to(device, non_blocking=True))
                loss = len(label) / videos * loss
                scaler.scale(factor * loss).backward()
            parts.append(loss.detach())
        return torch.stack(parts)

    model.train()
    # Sharded text weights can't be used outside a forward pass of the whole.
    once = nullcontext() if run.fsdp else text_made_once(classifier)
    quiet = None if processes.is_first else True
    with once, tqdm(total=total, initial=first, desc=recipe.method, disable=quiet) as bar:
        if on_epoch is not None and first and first % steps_per_epoch == 0:
            on_epoch(first)  # which a process that was killed may not have come to
        started = time.perf_counter()
        for step, batches in steps_of_run(loader, steps_per_epoch, run.accumulate, first, total):
            waiting = time.perf_counter() - started
            lr = learning_rate(step, warmup, total, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            twice, alpha = recipe.uses_iwr and step % run.every == 0, None
            between = torch.zeros((), device=device)
            if twice:  # first, so that its copy of the weights is gone before gradients are held
                with iwr.interpolated() as alpha:
                    between = add_gradients(batches, iwr.weight, reduce=False)
            losses = add_gradients(batches, 1.0, reduce=True)
            asked = checkpoints is not None and checkpoints.stop_requested
            values, stop = agree(processes, torch.stack([losses.sum(), between.sum()]), asked)
            if not all(map(math.isfinite, values)):
                raise loss_error(values, step + 1, batches, losses + between, processes)
            scaler.unscale_(optimizer)
            if recipe.method == "l2":
                add_distance_penalty(model, clip, recipe.l2_weight)
            norm = whole(nn.utils.clip_grad_norm_(trained, recipe.clip_grad_norm)).item()
            if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler skips the step
                raise gradient_error(norm, step + 1, batches, processes)
            scaler.step(optimizer)
            scaler.update()
            if swa is not None:
                swa.update(model)
            done = step + 1
            seconds = time.perf_counter() - started
            bar.set_postfix(loss=f"{values[0]:.3f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(Step(done, values[0], lr, alpha, waiting, seconds))
            if checkpoints is not None and (stop or checkpoints.due(done, total)):
                checkpoints.save(state, done)
            if on_epoch is not None and done % steps_per_epoch == 0:
                on_epoch(done)
            if stop:
                raise SystemExit(128 + signal.SIGTERM)
            started = time.perf_counter()
    return clip, swa


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every field of the recipe is a flag."""
    return options.parse_arguments(__doc__ or "", arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line and write the weights."""
    args = parse_arguments(arguments)
    with training_processes(args.device, args.timeout) as (processes, device):
        _fine_tune(args, processes, device)


def _fine_tune(args: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    recipe = options.recipe_of(args)
    torch.manual_seed(recipe.seed)
    model, tokenizer, pixels = build_model(args, device)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if args.fsdp:
        give_scalars_an_axis(model)
    videos = load_videos(args, recipe, pixels, processes, device)
    run = options.run_of(args, videos.batches.accumulate, device)
    attach_prompts(
        model,
        recipe.method,
        videos.names,
        args.frames,
        options.prompts_of(args),
        class_prompts=args.class_prompts,
    )
    classifier = make_classifier(model, tokenizer, videos.names, recipe.method, args.template)
    if not processes.is_first:
        torch.manual_seed(seed_of(recipe.seed, processes.rank))  # for what is random in a tower
    settings = options.settings_of(args, recipe, run)
    steps = videos.batches.steps
    checkpoints = Checkpoints(
        args.out,
        {**settings, **videos.about},
        every=args.save_every or steps,
        keep=args.keep,
        processes=processes,
    )
    validation = Validation(args, classifier, videos.names, pixels, run.amp, processes)
    log = RunLog(
        args.out if processes.is_first else None,
        total_steps(recipe, run, steps),
        first=checkpoints.last_step,
        every=args.log_every,
    )
    if processes.is_first:
        plan = options.plan(args, recipe, run, processes, videos.batches.batch_size)
        print(*videos.warnings, plan, sep="\n", flush=True)

    def validate(step: int) -> None:
        if any(processes.gather(log.tells(step, "val_top1"))):
            return
        if found := validation.accuracy():
            log.write(step, **{f"val_{name}": value for name, value in found.items()})

    before = signal.signal(signal.SIGTERM, checkpoints.request_stop)
    try:
        clip, swa = train(
            classifier,
            videos.batches,
            steps,
            recipe,
            run=run,
            processes=processes,
            checkpoints=checkpoints,
            on_step=log.step,
            on_epoch=validate,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        videos.batches.close()
        log.close()
    name = Path(args.hf or args.model).name.removesuffix(".json")
    leave(
        args.out,
        name,
        recipe,
        model,
        clip,
        swa,
        shapes,
        validation,
        processes,
        settings,
        videos.about,
    )


if __name__ == "__main__":
    main()
