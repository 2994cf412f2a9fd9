"""Turn an image CLIP into an open-vocabulary video model by changing its weights alone.

The names in ``__all__`` are the public API. The subpackages (``openvclip.video``,
``openvclip.evaluation``, ...) are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openvclip.checkpoints import (
    CheckpointInfo,
    average_files,
    convert_checkpoint,
    inspect_checkpoint,
    interpolate_files,
    load_checkpoint,
    merge_files,
    save_checkpoint,
)
from openvclip.errors import OpenVCLIPError
from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier
from openvclip.models.prediction import Prediction, predict
from openvclip.towers.temporal import (
    encode_video,
    expand_temporal_attention,
    restore_spatial_attention,
)
from openvclip.towers.view import Boundary
from openvclip.weights.averaging import EMATracker, LAWATracker, SWATracker
from openvclip.weights.gaussian import GaussianTracker
from openvclip.weights.interpolation import Lambda, interpolate, interpolate_into
from openvclip.weights.l2 import L2ToAnchor
from openvclip.weights.regularization import InterpolatedWeightRegularizer
from openvclip.weights.statistics import update_statistics

if TYPE_CHECKING:
    from openvclip import (
        checkpoints,
        evaluation,
        integrations,
        merging,
        models,
        prompting,
        search,
        towers,
        training,
        video,
        weights,
    )
    from openvclip.models.video_clip import VideoCLIP

__version__ = "0.1.0"

__all__ = [
    "VIDEO_TEMPLATES",
    "Boundary",
    "CheckpointInfo",
    "EMATracker",
    "GaussianTracker",
    "InterpolatedWeightRegularizer",
    "L2ToAnchor",
    "LAWATracker",
    "Lambda",
    "OpenVCLIPError",
    "Prediction",
    "SWATracker",
    "VideoCLIP",
    "ZeroShotClassifier",
    "average_files",
    "checkpoints",
    "convert_checkpoint",
    "encode_video",
    "evaluation",
    "expand_temporal_attention",
    "inspect_checkpoint",
    "integrations",
    "interpolate",
    "interpolate_files",
    "interpolate_into",
    "load_checkpoint",
    "merge_files",
    "merging",
    "models",
    "predict",
    "prompting",
    "restore_spatial_attention",
    "save_checkpoint",
    "search",
    "towers",
    "training",
    "update_statistics",
    "video",
    "weights",
]

_ROOMS = frozenset(
    {
        "checkpoints",
        "evaluation",
        "integrations",
        "merging",
        "models",
        "prompting",
        "search",
        "towers",
        "training",
        "video",
        "weights",
    }
)


def __getattr__(name: str) -> Any:
    """Import a subpackage or VideoCLIP on first use (PEP 562)."""
    if name == "VideoCLIP":
        return importlib.import_module("openvclip.models.video_clip").VideoCLIP
    if name in _ROOMS:
        return importlib.import_module(f"openvclip.{name}")
    raise AttributeError(f"module 'openvclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
