"""Write the results of an evaluation to a folder, for ``openvclip report`` and other readers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from openvclip.checkpoints.atomic import write_errors, write_text
from openvclip.evaluation.predictions import PREDICTIONS_FILE, write_predictions
from openvclip.evaluation.results import ProtocolEvaluation
from openvclip.evaluation.tables import as_json

__all__ = ["RESULTS_FILE", "save_results"]

RESULTS_FILE = "results.json"
"""The name of the file of accuracies in a folder of results."""


def save_results(
    folder: str | os.PathLike[str],
    result: ProtocolEvaluation,
    *,
    per_class: bool = False,
    confusion: bool = False,
) -> None:
    """Write ``results.json`` and, if the answers are known, the file of predictions.

    Args:
        folder: the folder to write to. Existing files of these names are replaced.
        result: the result of :func:`openvclip.evaluation.evaluate_protocol`.
        per_class: see :func:`openvclip.evaluation.as_json`.
        confusion: see :func:`openvclip.evaluation.as_json`.

    Raises:
        CheckpointError: a file can't be written.
    """
    path = Path(folder) / RESULTS_FILE
    content = as_json(result, per_class=per_class, confusion=confusion)
    # An older file of predictions would contradict the new accuracies.
    if not write_predictions(Path(folder) / PREDICTIONS_FILE, result):
        with write_errors(path):
            (Path(folder) / PREDICTIONS_FILE).unlink(missing_ok=True)
    write_text(path, [json.dumps(content, indent=1), "\n"])
