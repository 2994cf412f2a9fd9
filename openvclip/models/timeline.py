"""Predict labels over the time of a long video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openvclip.checkpoints.contract import Confidence
from openvclip.commands.progress import progress_bar
from openvclip.models.batching import require_batch_size
from openvclip.models.classifier import VIDEO_TEMPLATES, Template
from openvclip.models.drawing import new_figure, save_figure
from openvclip.models.prediction import classifier_for, logits_of
from openvclip.models.preprocess import transform_for
from openvclip.models.reading import require_source
from openvclip.models.tokenizers import Tokenizer
from openvclip.video.sliding import sliding_windows
from openvclip.video.sources import VideoSource, source_name
from openvclip.video.transforms import Transform


class Segment(NamedTuple):
    """A part of a video in which one label is the most probable.

    Attributes:
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video.
        label: the most probable label.
        probability: the mean probability of the label over the windows of the segment.
    """

    start: float
    end: float
    label: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """The probabilities of the labels in each window of a video.

    Attributes:
        path: the video file, or what the video is, such as ``"<32 frames>"``.
        labels: the K labels.
        times: start and end of the W windows, seconds, float64 ``[W, 2]``.
        probabilities: float32 ``[W, K]``. Each row sums to 1.
    """

    path: str
    labels: list[str]
    times: Tensor
    probabilities: Tensor

    def edges(self) -> list[float]:
        """Return ``W + 1`` times in seconds that divide the video among its windows.

        Windows overlap. The edge between two windows is halfway between their centres. The first
        edge is the start of the video, and the last edge is the end of the video.
        """
        centres = self.times.mean(dim=1)
        inner = ((centres[1:] + centres[:-1]) / 2).tolist()
        return [float(self.times[0, 0]), *inner, float(self.times[-1, 1])]

    def segments(self) -> list[Segment]:
        """Return the most probable label over time.

        Neighbouring windows with the same label form one segment.
        """
        best = self.probabilities.argmax(dim=1).tolist()
        edges = self.edges()
        cuts = [i for i in range(1, len(best)) if best[i] != best[i - 1]]
        segments = []
        for first, last in zip([0, *cuts], [*cuts, len(best)], strict=True):
            index = best[first]
            mean = float(self.probabilities[first:last, index].mean())
            segments.append(Segment(edges[first], edges[last], self.labels[index], mean))
        return segments

    def __str__(self) -> str:
        rows = [
            f"{clock(segment.start)} - {clock(segment.end)}  {segment.probability:6.1%}  "
            f"{segment.label}"
            for segment in self.segments()
        ]
        return "\n".join([self.path, *rows])

    def figure(self, path: str | os.PathLike[str], *, top: int = 6) -> None:
        """Draw the probabilities over time and save them as a PNG file.

        Args:
            path: the file to write.
            top: number of labels in the figure. Labels are ranked by their highest probability over
                all windows.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        indices = self.most_probable(top)
        figure = new_figure(8, 1.6 + 0.34 * len(indices))
        _draw(figure, figure.add_subplot(), self, indices)
        save_figure(figure, path)

    def most_probable(self, top: int) -> list[int]:
        """Return the indices of the labels to draw.

        Labels are ranked by their highest probability over all windows, and the first ``top``
        labels are taken. They are sorted by the window in which this probability occurs.
        """
        highest, window = self.probabilities.max(dim=0)
        chosen = highest.topk(min(top, len(self.labels))).indices.tolist()
        return sorted(chosen, key=lambda index: int(window[index]))


def predict_timeline(
    model: nn.Module,
    video: VideoSource,
    labels: Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    transform: Transform | None = None,
    templates: Sequence[Template] = VIDEO_TEMPLATES,
    num_frames: int = 8,
    seconds: float = 128 / 30,
    step: float | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
    fps: float | None = None,
    confidence: Confidence | None = None,
) -> Timeline:
    """Compute the probabilities of labels in each window of a long video.

    The video is decoded once. Memory holds the frames of a few windows only.

    Args:
        model: see :func:`openvclip.predict`.
        video: the video file; or a URL, bytes, a file object, an array of frames or an open
            decoder, see :data:`openvclip.video.VideoSource`.
        labels: see :func:`openvclip.predict`.
        tokenizer: see :func:`openvclip.predict`.
        transform: see :func:`openvclip.predict`. The transform must not be random. Of a transform
            with three crops, the centre is taken.
        templates: see :func:`openvclip.predict`.
        num_frames: number of frames in a window.
        seconds: length of a window. Default: 128 / 30, the length of a clip in the paper.
        step: seconds from the start of a window to the start of the next window. Default: half of
            ``seconds``.
        batch_size: number of windows to encode at a time.
        progress: whether to show a progress bar. Default: only in a terminal.
        fps: frames per second, if ``video`` is an array of frames.
        confidence: see :func:`openvclip.predict`. The temperature is used. No window is rejected.

    Raises:
        VideoError, VideoOptionError, VideoShapeError, ClassNamesError, UsageError: see
            :func:`openvclip.predict`.
        UnsupportedModelError, NonFiniteWeightsError, EvaluationError: see
            :func:`openvclip.predict`.

    Warns:
        LabelWarning, TextFeaturesWarning: see :func:`openvclip.predict`.
    """
    require_source(video)
    require_batch_size(batch_size)
    classifier = classifier_for(model, labels, tokenizer, templates)
    transform = transform or transform_for(classifier.model)
    windows = sliding_windows(
        video,
        transform=transform.with_(crops=1) if transform.crops > 1 else transform,
        num_frames=num_frames,
        seconds=seconds,
        step=step,
        fps=fps,
    )
    temperature = 1.0 if confidence is None else confidence.temperature
    times: list[tuple[float, float]] = []
    rows: list[Tensor] = []
    batch: list[Tensor] = []

    def encode_batch() -> None:
        logits = logits_of(classifier, torch.stack(batch))
        rows.append((logits / temperature).softmax(dim=-1).cpu())
        batch.clear()

    disable = None if progress is None else not progress
    for window in progress_bar(windows, desc="timeline", unit="window", disable=disable):
        times.append((window.start, window.end))
        batch.append(window.clip)
        if len(batch) == batch_size:
            encode_batch()
    if batch:
        encode_batch()
    window_times = torch.tensor(times, dtype=torch.float64)
    return Timeline(source_name(video), classifier.class_names, window_times, torch.cat(rows))


def clock(seconds: float) -> str:
    """Format seconds as hours, minutes and tenths of seconds.

    Example:
        >>> clock(7.3), clock(724), clock(3724)
        ('0:07.3', '12:04.0', '1:02:04.0')
    """
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    lead = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{lead}:{rest / 10:04.1f}"


def _draw(figure: Any, axes: Any, timeline: Timeline, indices: list[int]) -> None:
    """Draw a row of colours for each label; the most probable label of a window is underlined."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges = timeline.edges()
    values = timeline.probabilities[:, indices].T.numpy()
    rows = range(len(indices) + 1)
    mesh = axes.pcolormesh(edges, rows, values, cmap="Blues", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(indices))])
    axes.set_yticklabels([timeline.labels[index] for index in indices])
    axes.tick_params(axis="y", length=0)
    axes.hlines(range(1, len(indices)), edges[0], edges[-1], color="white", linewidth=2)
    best = timeline.probabilities.argmax(dim=1).tolist()
    for row, index in enumerate(indices):
        for i, winner in enumerate(best):
            if winner == index:
                axes.hlines(row + 0.93, edges[i], edges[i + 1], color="C1", linewidth=3)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x).removesuffix(".0")))
    axes.set(xlabel="time (min:s)", title=os.path.basename(timeline.path))
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, format=FuncFormatter(lambda x, _: f"{x:.0%}"))
    bar.set_label("probability")
    bar.outline.set_visible(False)
