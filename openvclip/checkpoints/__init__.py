"""Files of weights: load them safely, write them atomically, inspect, convert and merge them."""

from openvclip.checkpoints.adapter_files import load_adapter
from openvclip.checkpoints.adapter_saving import save_adapter
from openvclip.checkpoints.api import (
    CheckpointInfo,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.contract import (
    Base,
    Confidence,
    Contract,
    Expansion,
    Frames,
    Pixels,
)
from openvclip.checkpoints.contract_files import read_contract
from openvclip.checkpoints.formats import WeightFile, read_weights
from openvclip.checkpoints.sizes import Sizes
from openvclip.checkpoints.streaming import (
    Merge,
    average_files,
    interpolate_files,
    merge_files,
    task_vector_file,
)

__all__ = [
    "Base",
    "CheckpointInfo",
    "Confidence",
    "Contract",
    "Expansion",
    "Frames",
    "Merge",
    "Pixels",
    "Sizes",
    "WeightFile",
    "atomic_path",
    "average_files",
    "convert_checkpoint",
    "inspect_checkpoint",
    "interpolate_files",
    "load_adapter",
    "load_checkpoint",
    "merge_files",
    "read_contract",
    "read_weights",
    "save_adapter",
    "save_checkpoint",
    "task_vector_file",
    "write_errors",
]
