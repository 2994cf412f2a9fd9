"""Labels over the time of a long video."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import MissingDependencyError
from openvclip.models.classifier import VIDEO_TEMPLATES
from openvclip.models.prediction import classifier_for, logits_of
from openvclip.models.preprocess import transform_for
from openvclip.video.sliding import sliding_windows
from openvclip.video.transforms import Transform


class Segment(NamedTuple):
    """A stretch of a video over which one label is the most probable.

    Attributes:
        start: seconds from the first frame.
        end: seconds.
        label: the label.
        probability: its mean over the windows of the stretch.
    """

    start: float
    end: float
    label: str
    probability: float


@dataclass(frozen=True)
class Timeline:
    """What a model says of each window of a video.

    Attributes:
        path: the file.
        labels: the K labels.
        times: start and end of the W windows in seconds, float64 ``[W, 2]``.
        probabilities: float32 ``[W, K]``, rows sum to 1.
    """

    path: str
    labels: list[str]
    times: Tensor
    probabilities: Tensor

    def edges(self) -> list[float]:
        """``W + 1`` times: windows overlap, so each speaks for what is nearest to its centre.

        The first and the last edge are the beginning and the end of the video.
        """
        centres = self.times.mean(dim=1)
        inner = ((centres[1:] + centres[:-1]) / 2).tolist()
        return [float(self.times[0, 0]), *inner, float(self.times[-1, 1])]

    def segments(self) -> list[Segment]:
        """The most probable label over time; neighbouring windows with the same one are joined."""
        best = self.probabilities.argmax(dim=1).tolist()
        edges = self.edges()
        cuts = [i for i in range(1, len(best)) if best[i] != best[i - 1]]
        found = []
        for first, last in zip([0, *cuts], [*cuts, len(best)], strict=True):
            place = best[first]
            mean = float(self.probabilities[first:last, place].mean())
            found.append(Segment(edges[first], edges[last], self.labels[place], mean))
        return found

    def __str__(self) -> str:
        rows = [
            f"{clock(one.start)} - {clock(one.end)}  {one.probability:6.1%}  {one.label}"
            for one in self.segments()
        ]
        return "\n".join([self.path, *rows])

    def figure(self, path: str | os.PathLike[str], *, top: int = 6) -> None:
        """Draw the probabilities over time into a PNG.

        Args:
            path: the file to write.
            top: how many labels to show: those whose probability is highest anywhere.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        require_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        shown = self._most_probable(top)
        figure = Figure(figsize=(8, 1.6 + 0.34 * len(shown)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, figure.add_subplot(), self, shown)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)

    def _most_probable(self, top: int) -> list[int]:
        """Places of labels, in the order in which they reach their highest probability."""
        highest, when = self.probabilities.max(dim=0)
        chosen = highest.topk(min(top, len(self.labels))).indices.tolist()
        return sorted(chosen, key=lambda place: int(when[place]))


def predict_timeline(
    model: nn.Module,
    video: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    *,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    transform: Transform | None = None,
    templates: Sequence[str] = VIDEO_TEMPLATES,
    num_frames: int = 8,
    seconds: float = 128 / 30,
    step: float | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> Timeline:
    """Which of some labels fits each part of a long video best.

    The video is decoded once, from the beginning to the end, and memory holds a few windows.

    Args:
        model: see :func:`openvclip.predict`; so for the following ones.
        video: a file.
        labels: K labels, no two alike; ``None`` with a :class:`ZeroShotClassifier`.
        tokenizer: of the model's text tower.
        transform: from 8-bit frames to what the model takes; no random one.
        templates: texts with ``{}`` for the label.
        num_frames: frames of a window.
        seconds: length of a window; the papers' clip by default.
        step: from the start of one window to the next; half a window by default.
        batch_size: windows encoded at a time.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        VideoError, VideoOptionError, ClassNamesError, UsageError, UnsupportedModelError: as for
            :func:`openvclip.predict`.
    """
    from tqdm import tqdm  # comes with open_clip

    classifier = classifier_for(model, labels, tokenizer, templates)
    windows = sliding_windows(
        video,
        transform=transform or transform_for(classifier.model),
        num_frames=num_frames,
        seconds=seconds,
        step=step,
    )
    device = classifier.text_features.device
    times: list[tuple[float, float]] = []
    rows: list[Tensor] = []
    batch: list[Tensor] = []

    def encode() -> None:
        logits = logits_of(classifier, torch.stack(batch).to(device))
        rows.append(logits.softmax(dim=-1).cpu())
        batch.clear()

    disable = None if progress is None else not progress
    for window in tqdm(windows, desc="timeline", unit="window", disable=disable):
        times.append((window.start, window.end))
        batch.append(window.clip)
        if len(batch) == batch_size:
            encode()
    if batch:
        encode()
    stamps = torch.tensor(times, dtype=torch.float64)
    return Timeline(os.fspath(video), classifier.class_names, stamps, torch.cat(rows))


def require_matplotlib() -> None:
    """Raise :class:`MissingDependencyError` where figures can't be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'Figures need matplotlib: pip install "openvclip[examples]".'
        ) from error


def clock(seconds: float) -> str:
    """``"0:07.3"``, ``"12:04.0"``, ``"1:02:04.0"``."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    lead = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{lead}:{rest / 10:04.1f}"


def _draw(figure: Any, axes: Any, timeline: Timeline, shown: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges = timeline.edges()
    values = timeline.probabilities[:, shown].T.numpy()
    rows = range(len(shown) + 1)
    mesh = axes.pcolormesh(edges, rows, values, cmap="Blues", vmin=0, vmax=1)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(shown))])
    axes.set_yticklabels([timeline.labels[place] for place in shown])
    axes.tick_params(axis="y", length=0)
    axes.hlines(range(1, len(shown)), edges[0], edges[-1], color="white", linewidth=2)
    best = timeline.probabilities.argmax(dim=1).tolist()
    for row, place in enumerate(shown):  # the most probable label of each time is underlined
        for i, winner in enumerate(best):
            if winner == place:
                axes.hlines(row + 0.93, edges[i], edges[i + 1], color="C1", linewidth=3)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x).removesuffix(".0")))
    axes.set(xlabel="time (min:s)", title=os.path.basename(timeline.path))
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, format=FuncFormatter(lambda x, _: f"{x:.0%}"))
    bar.set_label("probability")
    bar.outline.set_visible(False)
