"""Merge files of weights without loading the models."""

from openvclip.checkpoints.streaming.arithmetic import Merge
from openvclip.checkpoints.streaming.inputs import entry_names
from openvclip.checkpoints.streaming.merges import (
    average_files,
    interpolate_files,
    merge_files,
)
from openvclip.checkpoints.streaming.vectors import task_vector_file

__all__ = [
    "Merge",
    "average_files",
    "entry_names",
    "interpolate_files",
    "merge_files",
    "task_vector_file",
]
