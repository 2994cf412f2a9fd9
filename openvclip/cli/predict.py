"""``openvclip predict``."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvclip.cli.options.models import (
    add_frame_options,
    add_model_options,
    amp_of,
    load,
    sampling_of,
    templates_of,
)
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError, VideoError, VideoNotFoundError

if TYPE_CHECKING:
    from openvclip.models.classifier import ZeroShotClassifier
    from openvclip.models.timeline import Timeline
    from openvclip.video.transforms import Transform

_PREDICT = """\
Which of some labels fits a video best.

VIDEO is a file, a folder, or a pattern such as 'clips/**/*.mp4'. The weights
are the original CLIP's unless --checkpoint is given.
"""
_USAGE = """\
openvclip predict VIDEO [VIDEO ...] [options]
           (--labels TEXT [TEXT ...] | --labels-file FILE | --dataset NAME)
"""
_EXAMPLES = """\
examples:
  openvclip predict clip.mp4 --labels "playing guitar" archery "riding a bike"
  openvclip predict clips/ --dataset kinetics400 --checkpoint swa.pth --lam 0.5
  openvclip predict match.mkv --labels-file actions.txt --timeline
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "predict",
        help="say which labels fit a video",
        description=_PREDICT,
        epilog=_EXAMPLES,
        usage=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", help="a file, folder or pattern")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", metavar="TEXT", nargs="+", help="the labels to choose from")
    labels.add_argument(
        "--labels-file", type=Path, metavar="FILE", help="a file with a label on each line"
    )
    labels.add_argument(
        "--dataset",
        metavar="NAME",
        help="the classes of kinetics400, kinetics600-1, -2, -3, ucf101 or hmdb51",
    )
    parser.add_argument("--top", type=int, default=5, help="labels to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_timeline_options(parser)
    add_model_options(parser)
    parser.add_argument(
        "--lam",
        type=float,
        default=None,
        help="weight of the original CLIP to interpolate with; 0 is the checkpoint itself (0)",
    )
    add_frame_options(parser)
    parser.set_defaults(run=_predict)


def _add_timeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("long videos")
    group.add_argument(
        "--timeline",
        action="store_true",
        help="labels over time, as text and in NAME-timeline.png",
    )
    group.add_argument(
        "--seconds", type=float, default=None, help="length of a window (that of a clip: 4.27)"
    )
    group.add_argument(
        "--step", type=float, default=None, help="seconds from window to window (half a window)"
    )
    group.add_argument("--out", type=Path, default=None, help="folder for the PNG files (here)")


def _predict(options: argparse.Namespace) -> None:
    import torch

    if options.lam is not None and options.checkpoint is None:
        raise UsageError("--lam interpolates with fine-tuned weights: give --checkpoint too.")
    if options.top < 1:
        raise UsageError(f"--top {options.top}: expected at least 1.")
    labels, paths = _labels(options), _paths(options.videos)
    pictures = _pictures(paths, options)
    classifier, transform = _classifier(options, labels)
    amp, device = amp_of(options), classifier.text_features.device.type
    found, unreadable = [], 0
    for path, picture in zip(paths, pictures, strict=True):
        try:
            with torch.autocast(device, amp, enabled=amp is not None):
                entry = _entry(options, path, picture, classifier, transform)
        except VideoError as error:
            if len(paths) == 1:
                raise
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        found.append(entry)
    if options.json:
        print(json.dumps(found, indent=1))
    if unreadable:
        raise VideoError(f"{unreadable} of {len(paths)} videos can't be read; see above.")


def _entry(
    options: argparse.Namespace,
    path: str,
    picture: Path,
    classifier: ZeroShotClassifier,
    transform: Transform,
) -> dict[str, Any]:
    """Predict, print unless JSON is wanted, and return what JSON shows."""
    from openvclip.checkpoints.atomic import write_errors
    from openvclip.models.prediction import predict
    from openvclip.models.timeline import predict_timeline

    if options.timeline:
        timeline = predict_timeline(
            classifier,
            path,
            transform=transform,
            num_frames=options.frames,
            seconds=options.frames * options.sampling_rate / 30
            if options.seconds is None
            else options.seconds,
            step=options.step,
        )
        with write_errors(picture):
            timeline.figure(picture)
        if not options.json:
            print(f"{timeline}\nwrote {picture}", flush=True)
        return {**_timeline_as_json(timeline, options.top), "figure": str(picture)}
    prediction = predict(classifier, path, transform=transform, sampling=sampling_of(options))
    top = prediction.top(options.top)
    if not options.json:
        rows = [f"{probability:6.1%}  {label}" for label, probability in top]
        print("\n".join([path, *rows]), flush=True)
    return {"path": path, "labels": _pairs(top)}


def _timeline_as_json(timeline: Timeline, top: int) -> dict[str, Any]:
    windows = []
    for times, row in zip(timeline.times.tolist(), timeline.probabilities, strict=True):
        values, places = row.topk(min(top, len(timeline.labels)))
        names = [timeline.labels[place] for place in places.tolist()]
        best = list(zip(names, values.tolist(), strict=True))
        windows.append({"start": times[0], "end": times[1], "labels": _pairs(best)})
    segments = [segment._asdict() for segment in timeline.segments()]
    return {"path": timeline.path, "segments": segments, "windows": windows}


def _pairs(found: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "probability": probability} for label, probability in found]


def _labels(options: argparse.Namespace) -> list[str]:
    from openvclip.models.classifier import require_names
    from openvclip.models.labels import read_labels
    from openvclip.video import class_names

    if options.dataset:
        return class_names(options.dataset)
    return require_names(options.labels or read_labels(options.labels_file))


def _pictures(paths: list[str], options: argparse.Namespace) -> list[Path]:
    """Where the figures go; videos in several folders may have one name."""
    from openvclip.models.timeline import require_matplotlib

    if not options.timeline:
        given = [name for name in ("seconds", "step", "out") if getattr(options, name) is not None]
        if given:
            raise UsageError(f"--{given[0]} is for --timeline: give that too.")
        return [Path()] * len(paths)
    require_matplotlib()  # before hours of video are watched
    folder: Path = options.out or Path()
    seen: Counter[str] = Counter()
    found = []
    for path in paths:
        stem = Path(path).stem
        seen[stem] += 1
        number = f"-{seen[stem]}" if seen[stem] > 1 else ""
        found.append(folder / f"{stem}-timeline{number}.png")
    return found


def _paths(given: list[str]) -> list[str]:
    """The files, the video files in the folders, and those that the patterns fit; each once."""
    from openvclip.video import find_videos

    found: list[str] = []
    for one in given:
        if os.path.isdir(one):
            inside = [os.path.join(one, path) for path in find_videos(one)]
            if not inside:
                raise VideoNotFoundError(f"{one}: no video files in this folder or those below it.")
            found.extend(inside)
        elif not os.path.exists(one) and glob.has_magic(one):
            fitting = [path for path in glob.glob(one, recursive=True) if os.path.isfile(path)]
            if not fitting:
                raise VideoNotFoundError(f"{one}: no file fits this pattern.")
            found.extend(sorted(fitting))
        elif not os.path.exists(one):  # before a model is loaded, or even downloaded
            raise VideoNotFoundError(f"{one}: no such file, nor a folder or a pattern.")
        else:
            found.append(one)
    return list(dict.fromkeys(found))


def _classifier(
    options: argparse.Namespace, labels: list[str]
) -> tuple[ZeroShotClassifier, Transform]:
    """With the text features of the original CLIP, and the weights that were asked for."""
    from openvclip.models.classifier import ZeroShotClassifier
    from openvclip.weights.interpolation import interpolate_into

    loaded = load(options)
    classifier = ZeroShotClassifier(loaded.model, loaded.tokenizer, labels, templates_of(options))
    if loaded.tuned is not None:
        clip = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        interpolate_into(loaded.model, clip, loaded.tuned, options.lam or 0.0)
    return classifier, loaded.transform
