"""Write folders of peft that hold a LoRA adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from openvclip.checkpoints.adapter_files import ADAPTER_WEIGHTS
from openvclip.checkpoints.api import save_checkpoint
from openvclip.checkpoints.atomic import write_text
from openvclip.checkpoints.folders import ADAPTER_CONFIG
from openvclip.weights.adapter import Adapter
from openvclip.weights.adapter_storage import state_of_adapter


def save_adapter(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a LoRA adapter as a folder that peft and :func:`load_adapter` read.

    Layers may have different ranks and scales. The folder lists them by layer (``rank_pattern``,
    ``alpha_pattern``)::

        average, error = swa.averaged_adapter().compressed(16)
        save_adapter(average, "lora-swa")
        model = peft.PeftModel.from_pretrained(base_model, "lora-swa")

    Args:
        adapter: the adapter.
        folder: the folder to write. It is created if it is missing. Existing files of an adapter
            are replaced, each atomically.
        metadata: texts to store in the header of the file of weights. Default: none.

    Raises:
        WeightTypeError: peft can't store a change: that of a bias without its weight.
        CheckpointError: a file could not be written.
    """
    state, config = state_of_adapter(adapter)
    path = Path(folder) / ADAPTER_CONFIG
    save_checkpoint(state, Path(folder) / ADAPTER_WEIGHTS, metadata=metadata)
    write_text(path, [json.dumps(config, indent=2, sort_keys=True), "\n"])
