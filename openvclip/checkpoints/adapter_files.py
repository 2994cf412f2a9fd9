"""Read folders of peft that hold a LoRA adapter. peft itself is not needed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openvclip.checkpoints.file_kinds import kind_of_file
from openvclip.checkpoints.folders import ADAPTER_CONFIG, advice_for_folder
from openvclip.checkpoints.formats import WeightFile, read_weights
from openvclip.checkpoints.layout import LayoutError, json_object, read_errors
from openvclip.errors import CheckpointError, UsageError, near_path
from openvclip.weights.adapter import Adapter
from openvclip.weights.adapter_names import LoRASettings, adapter_from_state

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHT_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder of peft, or the file of weights in such a folder."""
    path = Path(path)
    folder = path.parent if path.name in _WEIGHT_FILES else path
    return (folder / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA adapter in a file.

    Attributes:
        file: the file of weights, as it is stored.
        adapter: the adapter.
    """

    file: WeightFile
    adapter: Adapter


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter and the file that holds it; see :func:`load_adapter`."""
    weights = _weights_of(Path(path))
    config = _config(weights.with_name(ADAPTER_CONFIG))
    settings = LoRASettings.from_config(config, str(path))
    file = read_weights(weights)
    return AdapterFile(file, adapter_from_state(file.weights, settings, str(path)))


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Load a LoRA adapter that peft or :func:`save_adapter` wrote. peft need not be installed.

    The scale of each product follows the settings in the folder: ``r``, ``lora_alpha``,
    ``use_rslora``, ``rank_pattern``, ``alpha_pattern`` and ``fan_in_fan_out``. Layers of the kinds
    linear, embedding, convolution and ``nn.MultiheadAttention`` are supported, and modules that
    were trained whole (``modules_to_save``, biases).

    Args:
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``),
            or the file of weights in this folder.

    Returns:
        The adapter on the CPU, by the names of the base model.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind.
        UnsafeCheckpointError: a PyTorch file contains a pickle that could run arbitrary code.
        WeightTypeError: the adapter is not plain LoRA: DoRA, AdaLoRA, LoHa, LoKr, IA3 and others;
            or its initialisation changed the base model (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
        StateMismatchError: a factor is missing, or its rank is not that of the settings.
    """
    return read_adapter(path).adapter


def read_fine_tune(path: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> WeightFile:
    """Read a file of weights, or merge an adapter with the file of its base model.

    Args:
        path: a file of weights, or an adapter.
        base: the file of the base model, if ``path`` is an adapter.

    Raises:
        CheckpointError: an adapter has no base, or a file can't be read.
        UsageError: a base is given, but ``path`` is no adapter.
        StateMismatchError: the adapter does not fit the base.
    """
    if base is None:
        require_whole(path)
        return read_weights(path)
    if not is_adapter(path):
        raise UsageError(
            f"base={os.fspath(base)} with {path}, which is no adapter of peft: its folder has no "
            f"{ADAPTER_CONFIG}. Leave base out for a file of whole weights."
        )
    read, original = read_adapter(path), read_weights(base)
    weights = read.adapter.merged(original.weights)
    metadata = {**original.metadata, **read.file.metadata}
    return replace(original, path=read.file.path, weights=weights, metadata=metadata)


def require_whole(path: str | os.PathLike[str]) -> None:
    """Raise an error if a path is an adapter, which has no whole weights without its base model.

    Raises:
        CheckpointError: the path is an adapter.
    """
    if is_adapter(path):
        kind_of_file(Path(path))  # says what to do with a folder
        advice = advice_for_folder(Path(path).parent)
        raise CheckpointError(f"{path} holds no whole weights. {advice}")


def _weights_of(path: Path) -> Path:
    if path.name in _WEIGHT_FILES and path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"There is no folder {path}{near_path(path)}; expected a folder of peft with "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        )
    for name in _WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    advice = advice_for_folder(path) if not is_adapter(path) else ""
    raise CheckpointError(
        f"{path} holds no adapter of peft: {ADAPTER_WEIGHTS} is missing. {advice}".rstrip()
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}, which holds the scale of the adapter (r, lora_alpha). Copy "
            "it from the folder in which peft saved the adapter."
        )
    try:
        with read_errors(path):
            return json_object(path.read_bytes(), "it")
    except LayoutError as error:
        raise CheckpointError(f"{path} is not the settings of an adapter: {error}.") from error
