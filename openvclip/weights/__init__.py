"""Tensors by name: interpolation, averages and regularisation of weights.

This package works on state dicts and on any ``torch.nn.Module``. It reads no files and does not
depend on a model architecture.
"""

from openvclip.weights.adapter import Adapter
from openvclip.weights.adapter_anchor import lora_anchor
from openvclip.weights.adapter_averaging import (
    AdapterEMATracker,
    AdapterSWATracker,
    AdapterTracker,
)
from openvclip.weights.adapter_model import adapter_of
from openvclip.weights.averaging import EMATracker, LAWATracker, SWATracker
from openvclip.weights.gaussian import GaussianTracker
from openvclip.weights.hashing import weights_hash
from openvclip.weights.interpolation import Lambda, interpolate, interpolate_into
from openvclip.weights.l2 import L2ToAnchor
from openvclip.weights.lambdas import by_depth, visual_only
from openvclip.weights.low_rank import CompressionLoss, LowRank
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.shards import full_state
from openvclip.weights.statistics import update_statistics
from openvclip.weights.tracker import WeightTracker

__all__ = [
    "Adapter",
    "AdapterEMATracker",
    "AdapterSWATracker",
    "AdapterTracker",
    "CompressionLoss",
    "EMATracker",
    "GaussianTracker",
    "InterpolatedWeightRegularizer",
    "L2ToAnchor",
    "LAWATracker",
    "Lambda",
    "LowRank",
    "SWATracker",
    "WeightTracker",
    "adapter_of",
    "by_depth",
    "full_state",
    "interpolate",
    "interpolate_into",
    "lora_anchor",
    "update_statistics",
    "visual_only",
    "weights_hash",
]
