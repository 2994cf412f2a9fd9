"""Tensors by name: interpolation, averages and regularisation of weights.

This package works on state dicts and on any ``torch.nn.Module``. It reads no files and does not
depend on a model architecture.
"""

from openvclip.weights.averaging import EMATracker, LAWATracker, SWATracker
from openvclip.weights.hashing import weights_hash
from openvclip.weights.interpolation import Lambda, interpolate, interpolate_into
from openvclip.weights.lambdas import by_depth, visual_only
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.shards import full_state
from openvclip.weights.statistics import update_statistics
from openvclip.weights.tracker import WeightTracker

__all__ = [
    "EMATracker",
    "InterpolatedWeightRegularizer",
    "LAWATracker",
    "Lambda",
    "SWATracker",
    "WeightTracker",
    "by_depth",
    "full_state",
    "interpolate",
    "interpolate_into",
    "update_statistics",
    "visual_only",
    "weights_hash",
]
