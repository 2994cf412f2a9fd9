"""Running statistics of normalisation layers: made anew after weights were averaged."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from openvclip.errors import NonFiniteWeightsError, StatisticsWarning, UsageError, listed
from openvclip.weights.names import canonical_names, unwrap
from openvclip.weights.numerics import non_finite_names


def statistics_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that keep running statistics, by canonical name."""
    modules = {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    return {short: modules[name] for short, name in canonical_names(modules).items()}


def warn_of_old_statistics(layers: int) -> None:
    """Warn that an average holds the running statistics of one of its models.

    Args:
        layers: number of layers with running statistics.

    Warns:
        StatisticsWarning: always.
    """
    warnings.warn(
        f"The model has {layers} layers with running statistics (batch norm), and the average "
        "holds the statistics of the last model. Put the average into the model, then call "
        "openvclip.update_statistics(model, loader).",
        StatisticsWarning,
        stacklevel=4,
    )


@torch.no_grad()
def update_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Compute the running statistics of batch norm anew, from the batches of a loader.

    Call this function after the weights of a model were averaged or interpolated. The running
    statistics belong to the weights with which they were made: those of an average of models are
    not the average of the statistics. A model without such statistics (each ViT) is left as it
    is, and no batch is read::

        model.load_state_dict(openvclip.interpolate(clip, swa.averaged_state_dict(), 0.5))
        openvclip.update_statistics(classifier, loader)

    The new statistics are the mean over the batches, as in ``torch.optim.swa_utils.update_bn``.
    During the passes, only the layers with statistics are in training mode. Dropout is off. All
    modes are restored afterwards, module by module. If the model is in training mode, a layer in
    evaluation mode is frozen and keeps its statistics. If the whole model is in evaluation mode,
    all layers get new statistics. A layer that no batch reaches keeps its statistics.

    Each of several processes uses its own batches, except in ``SyncBatchNorm``.

    Args:
        model: the module that is called with the batches, for example a classifier of videos.
        loader: batches, for example of the training videos. A batch is a tensor, or a tuple or
            list whose first entry is the input, or a mapping from the names of arguments to
            tensors. Entries of a mapping that the model does not take are left out.
        forward: function that runs the model on a batch, for batches of another kind, such as
            ``lambda batch: openvclip.encode_video(model, batch["clip"])``.
        device: device to which the batches are moved. Default: the device of the model.

    Returns:
        The names of the layers with new statistics.

    Raises:
        UsageError: the loader has no batches.
        NonFiniteWeightsError: the new statistics hold NaN or infinity. After any error, the old
            statistics are back.
    """
    model = unwrap(model)  # DistributedDataParallel would replace the buffers before each pass
    layers = {
        name: layer
        for name, layer in statistics_modules(model).items()
        if layer.training or not model.training
    }
    if not layers:
        return []
    run = _caller(model) if forward is None else forward
    target = _device_of(model) if device is None else torch.device(device)
    old = {
        name: [b.clone() for b in layer.buffers(recurse=False)] for name, layer in layers.items()
    }
    try:
        with _gathering(model, layers.values()) as start_batch:
            number = 0
            for number, batch in enumerate(loader, start=1):
                start_batch(number)
                run(_moved(batch, target))
        if number == 0:
            raise UsageError("The loader has no batches: statistics need at least one batch.")
        _require_finite(layers)
    except BaseException:
        for name, layer in layers.items():
            _set_buffers(layer, old[name])
        raise
    unseen = [name for name, layer in layers.items() if _is_reset(layer)]
    for name in unseen:
        _set_buffers(layers[name], old[name])
    return [name for name in layers if name not in unseen]


@contextmanager
def _gathering(model: nn.Module, layers: Iterable[Any]) -> Iterator[Callable[[int], None]]:
    """Make the layers gather means. Yield a function to be called with each batch's number."""
    layers = list(layers)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        for module, _ in modes:
            module.training = False  # train() and eval() may be overridden to freeze layers
        for layer in layers:
            layer.training = True
            layer.reset_running_stats()
            if isinstance(layer, _BatchNorm):
                layer.momentum = None  # the mean over all calls

        def start_batch(number: int) -> None:
            for layer in layers:
                if not isinstance(layer, _BatchNorm):
                    layer.momentum = 1.0 / number

        yield start_batch
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _caller(model: nn.Module) -> Callable[[Any], Any]:
    """Return a function that calls the model with a batch of a usual kind."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def call(batch: Any) -> Any:
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Mapping):
            named = {n: v for n, v in batch.items() if takes_any or n in parameters}
            if named:
                return model(**named)
        if isinstance(batch, Tensor):
            return model(batch)
        raise UsageError(
            f"A batch of type {type(batch).__name__} can't be given to the model. Give `forward`, "
            "a function that runs the model on a batch, or batches that are a tensor, a tuple "
            "with the input first, or a mapping with names of the model's arguments."
        )

    return call


def _device_of(model: nn.Module) -> torch.device | None:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _set_buffers(layer: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(layer.buffers(False), values, strict=True):
        buffer.copy_(value)


def _is_reset(layer: Any) -> bool:
    return not bool(layer.running_mean.any()) and bool((layer.running_var == 1).all())


def _require_finite(layers: Mapping[str, nn.Module]) -> None:
    state = {
        f"{name}.{entry}": buffer
        for name, layer in layers.items()
        for entry, buffer in layer.named_buffers(recurse=False)
    }
    broken = non_finite_names(state)
    if broken:
        raise NonFiniteWeightsError(
            f"The new statistics hold NaN or infinity in {len(broken)} entries ({listed(broken)}). "
            "Look for NaN or infinity in the batches or in the weights. The old statistics are "
            "back."
        )
