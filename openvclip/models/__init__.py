"""CLIP models for videos: loading, preprocessing, zero-shot classification and prediction."""

from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier, class_features
from openvclip.models.confidence import (
    SCORES,
    Score,
    calibrate,
    confidence_score,
    fit_temperature,
    threshold_to_keep,
)
from openvclip.models.export import ExportSettings, export_model
from openvclip.models.exported_writing import ExportFacts, read_export
from openvclip.models.features import encode_text, similarity_logits
from openvclip.models.labels import read_labels
from openvclip.models.loading import LoadedModel, fine_tuned, load_model
from openvclip.models.prediction import Prediction, predict
from openvclip.models.preprocess import transform_for
from openvclip.models.timeline import Segment, Timeline, predict_timeline
from openvclip.models.tokenizers import as_tokenizer
from openvclip.models.video_clip import VideoCLIP

__all__ = [
    "SCORES",
    "VIDEO_TEMPLATES",
    "ExportFacts",
    "ExportSettings",
    "LoadedModel",
    "Prediction",
    "Score",
    "Segment",
    "Timeline",
    "VideoCLIP",
    "ZeroShotClassifier",
    "as_tokenizer",
    "calibrate",
    "class_features",
    "confidence_score",
    "encode_text",
    "export_model",
    "fine_tuned",
    "fit_temperature",
    "load_model",
    "predict",
    "predict_timeline",
    "read_export",
    "read_labels",
    "similarity_logits",
    "threshold_to_keep",
    "transform_for",
]
