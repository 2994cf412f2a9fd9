"""Training in one process or several: process group, device, model wrapper, joint errors."""

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
    "Another process of this run is gone or does not answer, so all processes end. The message of "
    "torchrun below names the process that failed first. The same command resumes from the last "
    "checkpoint."
)


@contextmanager
def training_processes(
    device: str | None, minutes: float
) -> Iterator[tuple[Processes, torch.device]]:
    """Return a context with the processes of ``torchrun`` and the device of this process.

    Without ``torchrun`` this process is alone. In the context an :class:`OpenVCLIPError` or a
    ``FloatingPointError`` ends the process with the text of the error and without a traceback.
    If several processes raise the same error, one of them prints the text.

    Args:
        device: such as ``"cuda"`` or ``"cpu"``. Default: a GPU if there is one, else the CPU.
        minutes: time limit of a collective operation, after which a process counts as lost.
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
    except SystemExit:  # a signal stopped all processes after the same step
        _destroy_group(processes)
        raise
    _destroy_group(processes)


def _destroy_group(processes: Processes) -> None:
    if processes.world_size > 1:
        distributed.destroy_process_group()


def _is_loss_of_a_process(error: RuntimeError) -> bool:
    # Gloo raises a plain RuntimeError.
    has_class = isinstance(error, distributed.DistError)
    return has_class or (distributed.is_initialized() and "gloo" in str(error).lower())


def _end(text: str, processes: Processes) -> None:
    if processes.world_size == 1 or _is_first_to_print(text):
        print(text, file=sys.stderr, flush=True)
    if processes.world_size == 1:
        raise SystemExit(1)
    # Exit without clean-up: threads of the process group can wait for a process that is gone.
    sys.stdout.flush()
    os._exit(1)


def _is_first_to_print(text: str) -> bool:
    """Return whether this process prints the text first; torchrun's store counts the calls."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        c10d: Any = distributed  # the stores are missing from its type annotations
        store = c10d.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False
        )
        return bool(store.add(f"printed/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1)
    except (KeyError, RuntimeError):
        return True


def agree(processes: Processes, losses: Tensor, stop: bool) -> tuple[list[float], bool]:
    """Return the means of the losses over the processes, and whether any process asks to stop.

    All processes call this once in a step. The call waits for the losses of the step.

    Args:
        processes: the processes that train together.
        losses: losses of this process.
        stop: whether this process asks to stop.
    """
    if processes.world_size == 1:
        return losses.tolist(), stop
    values = torch.cat([losses.float() / processes.world_size, losses.new_full((1,), stop).float()])
    distributed.all_reduce(values)
    *means, n_stop = values.tolist()
    return means, n_stop > 0


def loss_error(
    values: list[float],
    step: int,
    batches: Sequence[Sequence[Any]],
    losses: Tensor,
    processes: Processes,
) -> FloatingPointError:
    """Return the error for a loss that is not finite.

    All processes call this and get the same text.

    Args:
        values: losses of the step, means over the processes.
        step: number of the step, from 1.
        batches: micro-batches of this process. A third entry of a batch names its videos.
        losses: loss of each of ``batches``.
        processes: the processes.
    """
    pairs = zip(batches, losses.tolist(), strict=True)
    names = _names_of([batch for batch, loss in pairs if not math.isfinite(loss)], processes)
    videos = f" Its videos: {', '.join(names)}." if names else ""
    value = next(value for value in values if not math.isfinite(value))
    return FloatingPointError(
        f"The loss is {value} at step {step}, expected a finite number; look at the videos, or "
        f"lower --lr.{videos}"
    )


def gradient_error(
    norm: float, step: int, batches: Sequence[Sequence[Any]], processes: Processes
) -> FloatingPointError:
    """Return the error for a gradient that is not finite although the loss is finite.

    All processes call this and get the same text.

    Args:
        norm: norm of the gradient.
        step: number of the step, from 1.
        batches: micro-batches of this process. A third entry of a batch names its videos.
        processes: the processes.
    """
    names = _names_of(batches, processes)
    videos = f" The step's videos: {', '.join(names)}." if names else ""
    return FloatingPointError(
        f"The norm of the gradient is {norm} at step {step}, where the loss is finite; expected a "
        "finite norm. The step did not change the weights. Look at the videos, or lower --lr."
        f"{videos}"
    )


def _names_of(batches: Sequence[Sequence[Any]], processes: Processes) -> list[str]:
    """The names of the videos in the batches of all processes."""
    names = [name for batch in batches for names in batch[2:] for name in names]
    return [name for part in processes.gather(names) for name in part]


def give_scalars_an_axis(model: nn.Module) -> None:
    """Replace scalar parameters (the logit scale) by vectors of length 1, in place, for FSDP2.

    FSDP2 can't shard a scalar.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(module, name, vector)


def save_memory(model: nn.Module) -> None:
    """Switch activation checkpointing on.

    Raises:
        UnsupportedModelError: the model has no activation checkpointing.
    """
    # The names in open_clip, in transformers 5 and in earlier versions of transformers.
    names = (
        "set_grad_checkpointing",
        "activation_checkpointing_enable",
        "gradient_checkpointing_enable",
    )
    switch = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if switch is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no activation checkpointing; expected one of the methods "
            f"{', '.join(names)}. Leave --checkpointing out."
        )
    switch()


def wrap(
    classifier: nn.Module,
    processes: Processes,
    device: torch.device,
    *,
    fsdp: bool,
    compiler: str | None,
) -> nn.Module:
    """Wrap a classifier for training in several processes, with DDP or FSDP2.

    Call the returned module in the training loop. In a single process it is the classifier itself.

    Args:
        classifier: the classifier, on its device. ``fsdp`` and ``compiler`` change it in place.
        processes: the processes that train together.
        device: device of the classifier.
        fsdp: shard the classifier (FSDP2). Otherwise each process has a copy (DDP).
        compiler: backend of ``torch.compile`` for each layer of the towers. ``None``: not compiled.

    Raises:
        UsageError: ``fsdp`` with a single process.
    """
    if fsdp and processes.world_size == 1:
        raise UsageError(
            "--fsdp shards the model among several processes, and this run has one process: start "
            "several processes with torchrun, or leave --fsdp out."
        )
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
    """Return the layers of the towers. Layers of inner lists come before layers of outer lists.

    Layers are the entries of a ``ModuleList`` or ``Sequential``, if the list has at least two
    entries and all entries have the same class.
    """
    lists: list[Any] = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    stacks = [m for m in lists if len(m) > 1 and len({type(part) for part in m}) == 1]
    return [layer for stack in reversed(stacks) for layer in stack]
