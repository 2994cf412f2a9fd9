"""Evaluate models: accuracy, retrieval, published protocols, curves along λ, tables, figures."""

from openvclip.evaluation.accuracy import NO_RANK, Evaluation, evaluate, evaluate_each, score
from openvclip.evaluation.choosing import (
    CHOICE_LAMBDAS,
    LambdaChoice,
    choose_lambda,
    dawin_weights,
    evaluate_mixed,
    mix_logits,
)
from openvclip.evaluation.confidence import (
    ConfidenceReport,
    CoverageCurve,
    accuracy_coverage,
    auroc,
    confidence_report,
    expected_calibration_error,
)
from openvclip.evaluation.encoding import BatchOptions, encode_videos
from openvclip.evaluation.figures import Curve, tradeoff_figure
from openvclip.evaluation.lambda_sweep import FIGURE_LAMBDAS, sweep
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.predictions import (
    PREDICTIONS_FILE,
    Predictions,
    SplitPredictions,
    read_predictions,
    write_predictions,
)
from openvclip.evaluation.ranking import dual_softmax, retrieval_metrics
from openvclip.evaluation.records import Record, Records
from openvclip.evaluation.results import Answers, ProtocolEvaluation, SplitScore
from openvclip.evaluation.retrieval import evaluate_retrieval, require_captioned
from openvclip.evaluation.retrieval_results import (
    RetrievalEvaluation,
    RetrievalScore,
    retrieval_json,
    retrieval_table,
)
from openvclip.evaluation.runner import RunOptions, evaluate_protocol, require_videos
from openvclip.evaluation.saving import RESULTS_FILE, save_results
from openvclip.evaluation.tables import (
    as_json,
    as_table,
    markdown_table,
    mean_and_std,
    time_spent,
)
from openvclip.evaluation.timing import Timing
from openvclip.video.sampling import Sampling

__all__ = [
    "CHOICE_LAMBDAS",
    "FIGURE_LAMBDAS",
    "NO_RANK",
    "PREDICTIONS_FILE",
    "RESULTS_FILE",
    "Answers",
    "BatchOptions",
    "ConfidenceReport",
    "CoverageCurve",
    "Curve",
    "Evaluation",
    "LambdaChoice",
    "Mixture",
    "Predictions",
    "ProtocolEvaluation",
    "Record",
    "Records",
    "RetrievalEvaluation",
    "RetrievalScore",
    "RunOptions",
    "Sampling",
    "SplitPredictions",
    "SplitScore",
    "Timing",
    "accuracy_coverage",
    "as_json",
    "as_table",
    "auroc",
    "choose_lambda",
    "confidence_report",
    "dawin_weights",
    "dual_softmax",
    "encode_videos",
    "evaluate",
    "evaluate_each",
    "evaluate_mixed",
    "evaluate_protocol",
    "evaluate_retrieval",
    "expected_calibration_error",
    "markdown_table",
    "mean_and_std",
    "mix_logits",
    "read_predictions",
    "require_captioned",
    "require_videos",
    "retrieval_json",
    "retrieval_metrics",
    "retrieval_table",
    "save_results",
    "score",
    "sweep",
    "time_spent",
    "tradeoff_figure",
    "write_predictions",
]
