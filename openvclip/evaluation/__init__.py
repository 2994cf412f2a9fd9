"""A model on a data set: accuracy; published protocols, resumable and shared among processes."""

from openvclip.evaluation.accuracy import NO_RANK, Evaluation, evaluate, evaluate_each, score
from openvclip.evaluation.encoding import Timing
from openvclip.evaluation.lambda_sweep import FIGURE_LAMBDAS, sweep
from openvclip.evaluation.runner import (
    ProtocolEvaluation,
    SplitScore,
    evaluate_protocol,
    require_videos,
)
from openvclip.video.sampling import Sampling

__all__ = [
    "FIGURE_LAMBDAS",
    "NO_RANK",
    "Evaluation",
    "ProtocolEvaluation",
    "Sampling",
    "SplitScore",
    "Timing",
    "evaluate",
    "evaluate_each",
    "evaluate_protocol",
    "require_videos",
    "score",
    "sweep",
]
