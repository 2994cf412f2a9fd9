"""Merge files of weights without loading the models."""

from openvclip.checkpoints.streaming.arithmetic import Merge
from openvclip.checkpoints.streaming.merges import (
    average_files,
    interpolate_files,
    merge_files,
)

__all__ = ["Merge", "average_files", "interpolate_files", "merge_files"]
