"""Merging files of weights without loading them."""

from openvclip.checkpoints.streaming.merges import average_files, interpolate_files, merge_files

__all__ = ["average_files", "interpolate_files", "merge_files"]
