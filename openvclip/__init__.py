"""openvclip: turn an image CLIP into an open-vocabulary video model by its weights alone."""

from openvclip import merging
from openvclip.checkpoints.api import (
    CheckpointInfo,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openvclip.checkpoints.streaming import average_files, interpolate_files, merge_files
from openvclip.errors import OpenVCLIPError
from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier
from openvclip.models.prediction import Prediction, predict
from openvclip.towers.temporal import (
    encode_video,
    expand_temporal_attention,
    restore_spatial_attention,
)
from openvclip.weights.averaging import EMATracker, LAWATracker, SWATracker
from openvclip.weights.interpolation import interpolate, interpolate_into
from openvclip.weights.regularization import InterpolatedWeightRegularizer

__version__ = "0.1.0"

__all__ = [
    "VIDEO_TEMPLATES",
    "CheckpointInfo",
    "EMATracker",
    "InterpolatedWeightRegularizer",
    "LAWATracker",
    "OpenVCLIPError",
    "Prediction",
    "SWATracker",
    "ZeroShotClassifier",
    "average_files",
    "convert_checkpoint",
    "encode_video",
    "expand_temporal_attention",
    "inspect_checkpoint",
    "interpolate",
    "interpolate_files",
    "interpolate_into",
    "load_checkpoint",
    "merge_files",
    "merging",
    "predict",
    "restore_spatial_attention",
    "save_checkpoint",
]
