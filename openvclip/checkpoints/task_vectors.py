"""Files of task vectors: the mark in their header, and the refusal to use them as models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from openvclip.errors import CheckpointError

TASK_VECTOR_KEY = "openvclip_task_vector"
"""The mark of a task vector among the texts of a safetensors header. The text is JSON."""


def task_vector_mark(base_hash: str) -> dict[str, str]:
    """Return the text that marks a file as a task vector.

    Args:
        base_hash: hash of the weights of the original model.
    """
    return {TASK_VECTOR_KEY: json.dumps({"base_weights_hash": base_hash})}


def is_task_vector(texts: Mapping[str, str]) -> bool:
    """Return whether the texts in the header of a file mark a task vector."""
    return TASK_VECTOR_KEY in texts


def base_hash_of(texts: Mapping[str, str]) -> str | None:
    """Return the hash of the original model of a task vector; ``None`` if it is not known."""
    try:
        content = json.loads(texts[TASK_VECTOR_KEY])
    except (ValueError, KeyError):
        return None
    base_hash = content.get("base_weights_hash") if isinstance(content, dict) else None
    return base_hash if isinstance(base_hash, str) else None


def require_model(texts: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Check that a file holds a model.

    Raises:
        CheckpointError: the file is a task vector.
    """
    if is_task_vector(texts):
        raise CheckpointError(
            f"{os.fspath(path)} is a task vector: the change of a model, and no model. Add it to "
            "the original model first: openvclip merge task_arithmetic VECTOR --base CLIP -o OUT. "
            "To read the changes, use load_checkpoint(path, names='original')."
        )
