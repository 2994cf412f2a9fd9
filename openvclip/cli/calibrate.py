"""The subcommand ``openvclip calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openvclip.cli.options.failures import report_failures
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError, VideoError, listed

if TYPE_CHECKING:
    from torch import Tensor

    from openvclip.checkpoints.contract import Confidence
    from openvclip.models.prediction import Prediction
    from openvclip.models.video_clip import VideoCLIP

_DESCRIPTION = """\
Calibrate a model on videos of your own, and store the result in its folder.

The result is a threshold, below which a video is none of the labels. If the
labels of the videos are known, a temperature is fitted too: it makes the
probabilities right on average. openvclip predict and VideoCLIP then use both.

Give at least 100 videos like those of later use, and the labels of later use.
The model must not have been trained on these videos.
"""
_EXAMPLES = """\
examples:
  openvclip calibrate runs/b16 clips/ --labels archery surfing
  openvclip calibrate runs/b16 clips/ --class-folders
  openvclip calibrate runs/b16 videos/ --annotations mine.csv --keep 0.9
"""


_BATCHES_AT_A_TIME = 16  # threads decode ahead within a group of batches


class _Clips(NamedTuple):
    """The videos, the labels, and the target of each video if the videos are labelled."""

    paths: list[str]
    labels: list[str]
    targets: list[str | None] | None


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    from openvclip.models.confidence import DEFAULT_SCORE, SCORES

    parser = commands.add_parser(
        "calibrate",
        help="choose the threshold of 'none of these' and the temperature of a model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="the folder of a model")
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="a file, folder, pattern or URL")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="TEXT", nargs="+", help="the labels of later use")
    labels.add_argument(
        "--labels-file", type=Path, metavar="FILE", help="file with one label on each line"
    )
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--class-folders",
        action="store_true",
        help="the label of a video is the name of its folder",
    )
    known.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="a file with a line 'path,class name' for each video below the folder VIDEO",
    )
    parser.add_argument(
        "--background",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="the background texts of later use (default: none)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=0.95,
        help="share of the videos of the labels that the threshold keeps (default: %(default)s)",
    )
    parser.add_argument(
        "--score",
        choices=SCORES,
        default=DEFAULT_SCORE,
        help="the number that is compared with the threshold (default: %(default)s)",
    )
    parser.add_argument(
        "--device", help="device, such as cuda or cpu (default: cuda if available, else cpu)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, help="videos at a time (default: %(default)s)"
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.contract_files import store_confidence
    from openvclip.cli.options.models import device_of
    from openvclip.models.confidence import calibrate, require_calibration
    from openvclip.models.folders import weights_of
    from openvclip.models.video_clip import VideoCLIP

    folder: Path = options.model
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder. The calibration is stored in the folder of a model, as "
            "VideoCLIP.save_pretrained writes it: give the path of such a folder."
        )
    require_calibration(options.keep, options.score)
    clips = _clips(options)
    model = VideoCLIP.from_pretrained(folder, device=device_of(options))
    predictions, clips, reasons = _predictions(model, clips, options)
    confidence = calibrate(predictions, clips.targets, keep=options.keep, score=options.score)
    print(_report(predictions, clips, confidence))
    model.confidence = confidence
    files = store_confidence(folder, model.contract, weights_of(folder, model.contract))
    print("\n".join(f"wrote {file}" for file in files))
    report_failures(reasons, "left out")


def _predictions(
    model: VideoCLIP, clips: _Clips, options: argparse.Namespace
) -> tuple[list[Prediction], _Clips, list[str]]:
    """Return the predictions, the videos that can be read, and the errors of the other videos.

    Raises:
        VideoError: no video can be read.
    """
    from openvclip.commands.progress import progress_bar

    settings: dict[str, Any] = {
        "labels": clips.labels,
        "background": options.background,
        "reject": False,
        "batch_size": options.batch_size,
        "progress": False,
    }
    predictions: dict[str, Prediction] = {}
    reasons: list[str] = []
    # A video that can't be read stops its group: the videos of the group are then read one by one.
    size = max(options.batch_size, 1) * _BATCHES_AT_A_TIME
    with progress_bar(total=len(clips.paths), desc="calibrate") as bar:
        for first in range(0, len(clips.paths), size):
            group = clips.paths[first : first + size]
            try:
                predictions.update(zip(group, model.classify(group, **settings), strict=True))
            except VideoError:
                for path in group:
                    try:
                        predictions[path] = model.classify(path, **settings)
                    except VideoError as error:
                        reasons.append(str(error))
            bar.update(len(group))
    if not predictions:
        raise VideoError(f"None of the {len(reasons)} videos can be read: {reasons[0]}")
    kept = [i for i, path in enumerate(clips.paths) if path in predictions]
    targets = None if clips.targets is None else [clips.targets[i] for i in kept]
    paths = [clips.paths[i] for i in kept]
    return [predictions[path] for path in paths], _Clips(paths, clips.labels, targets), reasons


def _clips(options: argparse.Namespace) -> _Clips:
    """Return the videos, their labels if they are known, and the labels to choose from."""
    from openvclip.models.background import with_background
    from openvclip.models.classifier import require_names
    from openvclip.models.labels import read_labels

    paths, names = _videos(options)
    given = options.labels or (read_labels(options.labels_file) if options.labels_file else None)
    if given is None and names is None:
        raise UsageError(
            "The labels are not known. Give the labels of later use with --labels or "
            "--labels-file, or the labels of the videos with --class-folders or --annotations."
        )
    labels = require_names(given or sorted(set(names or ())))
    require_names(with_background(labels, options.background))
    if names is None:
        return _Clips(paths, labels, None)
    targets = [name if name in labels else None for name in names]
    if not any(targets):
        raise UsageError(
            f"No video has one of the labels. The videos have {listed(sorted(set(names)), 10)}; "
            f"the labels are {listed(labels, 10)}."
        )
    return _Clips(paths, labels, targets)


def _videos(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Return the paths of the videos, and the class name of each video if they are known."""
    from openvclip.evaluation import require_videos
    from openvclip.video import read_annotations
    from openvclip.video.files import video_paths

    if options.annotations is None:
        named = [path for argument in options.videos for path in video_paths(argument)]
        paths = list(dict.fromkeys(named))
        return paths, [Path(p).parent.name for p in paths] if options.class_folders else None
    root = options.videos[0]
    if len(options.videos) != 1 or not Path(root).is_dir():
        raise UsageError("--annotations lists videos of one folder: give this folder as VIDEO.")
    samples, names = read_annotations(options.annotations, root=root)
    if names is None:
        raise UsageError(
            f"{options.annotations} holds class indices; expected lines of path and class name."
        )
    require_videos([path for path, _ in samples], root)
    return [str(Path(root, path)) for path, _ in samples], [names[index] for _, index in samples]


def _report(predictions: Sequence[Prediction], clips: _Clips, confidence: Confidence) -> str:
    """Return what was measured, as text."""
    import torch

    from openvclip.models.confidence import DEFAULT_SCORE, confidence_score, require_score, stacked

    _, cosines, logits = stacked(predictions)
    targets = clips.targets or [clips.labels[0]] * len(clips.paths)
    inside = torch.tensor([target is not None for target in targets])
    score = require_score(confidence.score or DEFAULT_SCORE)
    kept = confidence_score(score, cosines, logits / confidence.temperature)
    kept = kept >= (confidence.threshold or 0.0)
    known = "of the labels" if clips.targets else "without known labels"
    rows = [("videos", f"{int(inside.sum())} {known}")]
    if not bool(inside.all()):
        rows[0] = ("videos", f"{rows[0][1]}, {int((~inside).sum())} of none of the labels")
    if clips.targets is not None:
        rows += _of_labels(logits[inside], [t for t in targets if t], clips, confidence)
    rows += [
        ("threshold", f"{confidence.threshold:.4g} ({confidence.score})"),
        ("kept", f"{float(kept[inside].double().mean()):.1%} of the videos of the labels"),
    ]
    if not bool(inside.all()):
        share = float((~kept[~inside]).double().mean())
        rows.append(("rejected", f"{share:.1%} of the videos of none of the labels"))
    text = "\n".join(f"{title:<12} {value}" for title, value in rows)
    return f"{text}\nThese numbers are of the videos of the calibration; measure on other videos."


def _of_labels(
    logits: Tensor, targets: Sequence[str], clips: _Clips, confidence: Confidence
) -> list[tuple[str, str]]:
    """Return the accuracy, and the calibration error before and after."""
    import torch

    from openvclip.evaluation import expected_calibration_error

    indices = torch.tensor([clips.labels.index(target) for target in targets])
    errors = []
    for temperature in (1.0, confidence.temperature):
        rows = (logits.double() / temperature).softmax(dim=1)[:, : len(clips.labels)]
        best = rows.max(dim=1)
        errors.append(expected_calibration_error(best.values, best.indices == indices))
    right = float((best.indices == indices).double().mean())
    return [
        ("accuracy", f"{right:.1%} of the videos of the labels"),
        ("temperature", f"{confidence.temperature:.4g}"),
        ("ECE", f"{errors[0]:.1%} before, {errors[1]:.1%} after"),
    ]
