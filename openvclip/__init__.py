"""openvclip: turn an image CLIP into an open-vocabulary video model by its weights alone."""

from openvclip.averaging import SWATracker
from openvclip.checkpoints import (
    CheckpointInfo,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from openvclip.errors import OpenVCLIPError
from openvclip.interpolation import interpolate, interpolate_into
from openvclip.regularization import InterpolatedWeightRegularizer
from openvclip.temporal import (
    encode_video,
    expand_temporal_attention,
    restore_spatial_attention,
)
from openvclip.zeroshot import VIDEO_TEMPLATES, ZeroShotClassifier

__version__ = "0.1.0"

__all__ = [
    "VIDEO_TEMPLATES",
    "CheckpointInfo",
    "InterpolatedWeightRegularizer",
    "OpenVCLIPError",
    "SWATracker",
    "ZeroShotClassifier",
    "convert_checkpoint",
    "encode_video",
    "expand_temporal_attention",
    "inspect_checkpoint",
    "interpolate",
    "interpolate_into",
    "load_checkpoint",
    "restore_spatial_attention",
    "save_checkpoint",
]
