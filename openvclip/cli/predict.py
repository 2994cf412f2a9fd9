"""The subcommand ``openvclip predict``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvclip.cli.options.contract import use_contract
from openvclip.cli.options.models import (
    add_frame_options,
    add_lam_option,
    add_model_options,
    amp_of,
    cache_of,
    load,
    pooling_of,
    require_effects,
    sampling_of,
    templates_of,
)
from openvclip.cli.options.rejection import add_rejection_options, require_threshold
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused
from openvclip.commands.progress import progress_bar
from openvclip.errors import UsageError, VideoError

if TYPE_CHECKING:
    from openvclip.checkpoints.contract import Confidence
    from openvclip.models.classifier import ZeroShotClassifier
    from openvclip.models.timeline import Timeline
    from openvclip.video.transforms import Transform

_DESCRIPTION = """\
Print the most probable labels of videos.

VIDEO is a file, a folder, or a pattern such as 'clips/**/*.mp4'. The model has
the weights of the original CLIP unless --checkpoint or the folder of a model is
given. A model that was trained with openvclip brings its settings with it: the
options for the model and the frames are then not needed.
"""
_USAGE = """\
openvclip predict VIDEO [VIDEO ...] [options]
           (--labels TEXT [TEXT ...] | --labels-file FILE | --dataset NAME)
"""
_EXAMPLES = """\
examples:
  openvclip predict clip.mp4 --labels "playing guitar" archery "riding a bike"
  openvclip predict clips/ --dataset kinetics400 --checkpoint swa.pth --lam 0.5
  openvclip predict clip.mp4 --labels archery surfing --model runs/b16
  openvclip predict match.mkv --labels-file actions.txt --timeline
  openvclip predict clip.mp4 --labels archery --background "empty room" --json
"""
_NOT_OVER_TIME = "with --timeline, which prints the most probable label of each window"
_TOP = 5  # labels of a video that are printed


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "predict",
        help="print the most probable labels of videos",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="a file, folder, pattern or URL")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="TEXT", nargs="+", help="the labels to choose from")
    labels.add_argument(
        "--labels-file", type=Path, metavar="FILE", help="file with one label on each line"
    )
    labels.add_argument(
        "--dataset",
        metavar="NAME",
        help="take the class names of a data set as labels: kinetics400, kinetics600-1, "
        "kinetics600-2, kinetics600-3, ucf101 or hmdb51",
    )
    parser.add_argument(
        "--top",
        type=int,
        metavar="N",
        help="number of labels to print, or with --timeline to draw (default: 5, or 6 to draw)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: plain text)")
    add_rejection_options(parser)
    _add_timeline_options(parser)
    add_model_options(parser)
    add_lam_option(parser)
    add_frame_options(parser)
    parser.set_defaults(run=_predict)


def _add_timeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("long videos")
    group.add_argument(
        "--timeline",
        action="store_true",
        help="print the labels over time, and draw them to NAME-timeline.png",
    )
    group.add_argument(
        "--seconds",
        type=float,
        help="length of a window (default: the length of a clip, frames x sampling rate / 30)",
    )
    group.add_argument(
        "--step",
        type=float,
        metavar="SECONDS",
        help="time from the start of a window to the start of the next window (default: half the "
        "length of a window)",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the PNG files (default: the current folder)",
    )


def _predict(options: argparse.Namespace) -> None:
    use_contract(options)
    _require_effects(options)
    labels, paths = _labels(options), _paths(options.videos)
    figures = _figure_paths(paths, options)
    confidence = _confidence(options)
    require_threshold(options, confidence)
    with cache_of(options):
        classifier, transform = _classifier(options, labels)
    entries: list[dict[str, Any]] = []
    # In a terminal, the printed labels show the progress.
    hidden = True if len(paths) == 1 or (sys.stdout.isatty() and not options.json) else None
    with progress_bar(total=len(paths), desc="predict", disable=hidden) as bar:
        for path, figure in zip(paths, figures, strict=True):
            try:
                entries.append(
                    _predict_file(options, path, figure, classifier, transform, confidence)
                )
            except VideoError as error:
                entries.append({"path": path, "error": str(error)})
                if len(paths) > 1:
                    bar.write(str(error), file=sys.stderr)
            bar.update()
    if options.json:
        print(json.dumps(entries, indent=1))
    errors = [entry["error"] for entry in entries if "error" in entry]
    if errors and len(paths) == 1:
        raise VideoError(errors[0])
    if errors:
        raise VideoError(f"{len(errors)} of {len(paths)} videos can't be read; see above.")


def _require_effects(options: argparse.Namespace) -> None:
    """Check that each option that is given has an effect.

    Raises:
        UsageError: an option has no effect, or is out of range.
    """
    require_effects(options)
    if options.top is not None and options.top < 1:
        raise UsageError(f"--top {options.top}: expected at least 1.")
    if not options.timeline:
        for name in ("seconds", "step", "out"):
            if name in options.given:
                raise UsageError(f"--{name} is for --timeline: give --timeline too.")
        return
    windows = "with --timeline: the windows choose the frames"
    refuse_unused(
        options.given,
        {
            "views": windows,
            "sampler": windows,
            "background": _NOT_OVER_TIME,
            "reject": _NOT_OVER_TIME,
            "sampling_rate": "with --seconds" if "seconds" in options.given else "",
            "backend": "with --timeline: PyAV reads the windows"
            if options.backend != "pyav"
            else "",
        },
    )


def _predict_file(
    options: argparse.Namespace,
    path: str,
    figure: Path,
    classifier: ZeroShotClassifier,
    transform: Transform,
    confidence: Confidence | None,
) -> dict[str, Any]:
    import torch

    amp = amp_of(options)
    with torch.autocast(next(classifier.parameters()).device.type, amp, enabled=amp is not None):
        if options.timeline:
            return _predict_timeline(options, path, figure, classifier, transform, confidence)
        return _predict_video(options, path, classifier, transform, confidence)


def _predict_video(
    options: argparse.Namespace,
    path: str,
    classifier: ZeroShotClassifier,
    transform: Transform,
    confidence: Confidence | None,
) -> dict[str, Any]:
    """Predict the labels of a video and return them as JSON objects.

    The labels are printed as text unless ``--json`` is given.
    """
    from openvclip.models.prediction import predict

    prediction = predict(
        classifier,
        path,
        transform=transform,
        sampling=sampling_of(options),
        background=options.background,
        confidence=confidence,
        reject=options.reject,
    )
    top = options.top or _TOP
    if not options.json:
        print(prediction.text(top), flush=True)
    return prediction.as_json(top)


def _predict_timeline(
    options: argparse.Namespace,
    path: str,
    figure: Path,
    classifier: ZeroShotClassifier,
    transform: Transform,
    confidence: Confidence | None,
) -> dict[str, Any]:
    """Predict labels over time, draw them, and return them as JSON objects.

    The labels are printed as text unless ``--json`` is given.
    """
    from openvclip.checkpoints.atomic import write_errors
    from openvclip.models.timeline import predict_timeline

    sampling = sampling_of(options)
    clip_length = sampling.num_frames * sampling.sampling_rate / sampling.target_fps
    timeline = predict_timeline(
        classifier,
        path,
        transform=transform,
        num_frames=sampling.num_frames,
        seconds=clip_length if options.seconds is None else options.seconds,
        step=options.step,
        confidence=confidence,
    )
    drawn = {} if options.top is None else {"top": options.top}
    with write_errors(figure):
        timeline.figure(figure, **drawn)
    if not options.json:
        print(f"{timeline}\nwrote {figure}", flush=True)
    return {**_timeline_as_json(timeline, options.top or _TOP), "figure": str(figure)}


def _timeline_as_json(timeline: Timeline, top: int) -> dict[str, Any]:
    windows = []
    for times, row in zip(timeline.times.tolist(), timeline.probabilities, strict=True):
        values, indices = row.topk(min(top, len(timeline.labels)))
        labels = [timeline.labels[index] for index in indices.tolist()]
        best = list(zip(labels, values.tolist(), strict=True))
        windows.append({"start": times[0], "end": times[1], "labels": _as_json(best)})
    segments = [segment._asdict() for segment in timeline.segments()]
    return {"path": timeline.path, "segments": segments, "windows": windows}


def _as_json(top: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "probability": probability} for label, probability in top]


def _confidence(options: argparse.Namespace) -> Confidence | None:
    """Return the calibration in the contract. It belongs to the weights without ``--lam``."""
    if options.contract is None or options.lam is not None:
        return None
    confidence: Confidence | None = options.contract.confidence
    return confidence


def _labels(options: argparse.Namespace) -> list[str]:
    """Return the labels, then the background texts."""
    from openvclip.models.background import with_background
    from openvclip.models.classifier import require_names
    from openvclip.models.labels import read_labels
    from openvclip.video import class_names

    if options.dataset:
        labels = class_names(options.dataset)
    else:
        labels = require_names(options.labels or read_labels(options.labels_file), "labels")
    return require_names(with_background(labels, options.background), "labels")


def _figure_paths(paths: list[str], options: argparse.Namespace) -> list[Path]:
    """Return a different PNG file for each video, also if two videos have the same name."""
    from openvclip.models.drawing import require_matplotlib

    if not options.timeline:
        return [Path()] * len(paths)
    require_matplotlib()  # before hours of video are decoded
    folder: Path = options.out or Path()
    count: Counter[str] = Counter()
    figures = []
    for path in paths:
        stem = Path(path).stem
        count[stem] += 1
        number = f"-{count[stem]}" if count[stem] > 1 else ""
        figures.append(folder / f"{stem}-timeline{number}.png")
    return figures


def _paths(arguments: list[str]) -> list[str]:
    """Return the video files that the arguments name, each once.

    This runs before the model is loaded, so that a wrong path is reported first.
    """
    from openvclip.video.files import video_paths

    paths = [path for argument in arguments for path in video_paths(argument)]
    return list(dict.fromkeys(paths))


def _classifier(
    options: argparse.Namespace, labels: list[str]
) -> tuple[ZeroShotClassifier, Transform]:
    """Return a classifier with the weights that the options describe, and its transform."""
    from openvclip.models.classifier import ZeroShotClassifier, class_features
    from openvclip.weights.interpolation import interpolate_into

    loaded = load(options)
    model, templates = loaded.model, templates_of(options)
    features = None
    if options.text == "original":
        features = class_features(model, loaded.tokenizer, labels, templates)
    if loaded.tuned is not None:
        original = {name: value.clone() for name, value in model.state_dict().items()}
        interpolate_into(model, original, loaded.tuned, options.lam or 0.0)
    classifier = ZeroShotClassifier(
        model,
        loaded.tokenizer,
        labels,
        templates,
        text_features=features,
        pooling=pooling_of(options),
    )
    return classifier, loaded.transform
