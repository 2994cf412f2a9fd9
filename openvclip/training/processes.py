"""One process or many: the process group, the model wrapped for it, what is said and agreed on."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from openvclip.errors import OpenVCLIPError, UnsupportedModelError, UsageError
from openvclip.processes import Processes, local_rank

_LOST = (
    "Another process of this run is gone or does not answer, so all of them end; torchrun says "
    "below which one was first. The same command goes on from the last checkpoint."
)


@contextmanager
def training_processes(
    device: str | None, minutes: float
) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that ``torchrun`` started, or this one alone, and this one's device.

    Errors that say themselves what is wrong end the process with their text, printed by one of
    the processes that meet them.

    Args:
        device: such as ``"cuda"`` or ``"cpu"``; by default a GPU where there is one.
        minutes: how long a process waits for the others before it takes them for lost.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processes = Processes(int(os.environ.get("RANK", "0")), world)
    if world > 1:
        if place == torch.device("cuda"):  # without a number
            place = torch.device("cuda", local_rank())
        if place.type == "cuda":
            torch.cuda.set_device(place)
        backend = "nccl" if place.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(minutes=minutes))
    try:
        yield processes, place
    except (OpenVCLIPError, FloatingPointError) as error:
        _end(str(error), processes)
    except RuntimeError as error:
        if not _is_loss_of_a_process(error):
            raise
        _end(_LOST, processes)
    except SystemExit:  # stopped by a signal, all of them after the same step
        _leave(processes)
        raise
    _leave(processes)


def _leave(processes: Processes) -> None:
    if processes.world_size > 1:
        distributed.destroy_process_group()


def _is_loss_of_a_process(error: RuntimeError) -> bool:
    # Gloo's errors have no class of their own.
    known = isinstance(error, distributed.DistError)
    return known or (distributed.is_initialized() and "gloo" in str(error).lower())


def _end(text: str, processes: Processes) -> None:
    if processes.world_size == 1 or _is_first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    if processes.world_size == 1:
        raise SystemExit(1)
    # Without clean-up: the threads of the process group can wait for a process that is gone.
    sys.stdout.flush()
    os._exit(1)


def _is_first_to_say(text: str) -> bool:
    """Whether no other process has said the same; torchrun's store outlives the processes."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        c10d: Any = distributed  # does not say that its stores are public
        store = c10d.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        return bool(store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
    except (KeyError, RuntimeError):
        return True


def agree(processes: Processes, losses: Tensor, stop: bool) -> tuple[list[float], bool]:
    """The means of the processes' losses, and whether any of them is to stop.

    This is where a step waits for its losses.
    """
    if processes.world_size == 1:
        return losses.tolist(), stop
    all_of_it = torch.cat(
        [losses.float() / processes.world_size, losses.new_full((1,), stop).float()]
    )
    distributed.all_reduce(all_of_it)
    *means, wishes = all_of_it.tolist()
    return means, wishes > 0


def loss_error(
    values: list[float],
    step: int,
    batches: list[Sequence[Any]],
    losses: Tensor,
    processes: Processes,
) -> FloatingPointError:
    """The error of a loss that is not finite, the same in all processes.

    Args:
        values: the losses of the step, means over the processes.
        step: its number, from 1.
        batches: this process's, with the videos' names where they have them.
        losses: of each of ``batches``.
        processes: the processes.
    """
    pairs = zip(batches, losses.tolist(), strict=True)
    own = [
        n for batch, loss in pairs if not math.isfinite(loss) for names in batch[2:] for n in names
    ]
    names = [name for part in processes.gather(own) for name in part]
    videos = f" Its videos: {', '.join(names)}." if names else ""
    value = next(value for value in values if not math.isfinite(value))
    return FloatingPointError(
        f"The loss is {value} at step {step}; look at what was read, or lower --lr.{videos}"
    )


def gradient_error(
    norm: float, step: int, batches: list[Sequence[Any]], processes: Processes
) -> FloatingPointError:
    """The error of a gradient that is not finite though the loss is, the same in all processes."""
    own = [name for batch in batches for names in batch[2:] for name in names]
    names = [name for part in processes.gather(own) for name in part]
    videos = f" The step's videos: {', '.join(names)}." if names else ""
    return FloatingPointError(
        f"The norm of the gradient is {norm} at step {step}, where the loss is finite; the weights "
        f"are as before the step. Look at what was read, or lower --lr.{videos}"
    )


def give_scalars_an_axis(model: nn.Module) -> None:
    """Make scalar parameters (the logit scale) vectors of one number: FSDP2 takes no scalars."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(module, name, vector)


def save_memory(model: nn.Module) -> None:
    """Switch activation checkpointing on, as open_clip and Hugging Face (5, before) call it."""
    names = (
        "set_grad_checkpointing",
        "activation_checkpointing_enable",
        "gradient_checkpointing_enable",
    )
    switch = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if switch is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no activation checkpointing.")
    switch()


def wrap(
    classifier: nn.Module,
    processes: Processes,
    device: torch.device,
    *,
    fsdp: bool,
    compiler: str | None,
) -> nn.Module:
    """What to call in place of the classifier, so that gradients are those of the joint batch.

    Args:
        classifier: on its device. It is changed in place by ``fsdp`` and ``compiler``.
        processes: the processes that train together.
        device: where the classifier is.
        fsdp: shard it (FSDP2) instead of keeping a copy in each process.
        compiler: backend of ``torch.compile`` for each layer of the towers, or ``None``.
    """
    if fsdp and processes.world_size == 1:
        raise UsageError("--fsdp shards the model among processes: start several with torchrun.")
    if compiler is not None:
        for layer in _layers(classifier):
            layer.compile(backend=compiler)
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (processes.world_size,))
        for layer in _layers(classifier):
            fully_shard(layer, mesh=mesh)
        fully_shard(classifier, mesh=mesh)
        return classifier
    if processes.world_size > 1:
        return DistributedDataParallel(classifier)
    return classifier


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of lists of modules of one kind, inner lists first: the towers' layers."""
    lists: list[Any] = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    alike = [m for m in lists if len(m) > 1 and len({type(part) for part in m}) == 1]
    return [layer for found in reversed(alike) for layer in found]
