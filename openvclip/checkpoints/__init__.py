"""Files of weights: recognised from their content, loaded safely, written atomically, merged."""

from openvclip.checkpoints.api import (
    CheckpointInfo,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.streaming import average_files, interpolate_files, merge_files

__all__ = [
    "CheckpointInfo",
    "atomic_path",
    "average_files",
    "convert_checkpoint",
    "inspect_checkpoint",
    "interpolate_files",
    "load_checkpoint",
    "merge_files",
    "save_checkpoint",
    "write_errors",
]
