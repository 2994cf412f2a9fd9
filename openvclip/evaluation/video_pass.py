"""Encode the videos of an evaluation once: settings, results folder, features, failures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError, VideoNotFoundError, listed, near_path
from openvclip.evaluation.encoding import BatchOptions, batches_of, encode_videos
from openvclip.evaluation.mixture import Mixture
from openvclip.evaluation.records import Records
from openvclip.evaluation.timing import Timing
from openvclip.models.finite import require_finite
from openvclip.processes import Processes, joined_processes
from openvclip.towers.view import FrameView
from openvclip.video import Failure, VideoDataset
from openvclip.video.sampling import Sampling
from openvclip.video.transforms import Transform
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import named_state


@dataclass(frozen=True)
class RunOptions(BatchOptions):
    """How an evaluation runs, and how it treats videos that can't be read.

    Attributes:
        batch_size: number of videos to encode at a time, each with all its views.
        num_workers: number of processes that decode. 0 decodes in the calling process.
        amp: dtype for autocast while encoding. ``None`` encodes without autocast.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.
        pooling: how the features of frames become the feature of a clip.
        leave_out_broken: whether the accuracies are computed without the videos that can't be read.
            Default: such videos count as wrong.
        allow_missing: whether to treat missing videos as videos that can't be read. Default:
            missing videos are an error, which is raised before a video is encoded.
        settings: further settings of the run, as JSON objects, such as the name of the model. A run
            with different settings can't continue in the same folder.
    """

    description: str = "evaluate"
    leave_out_broken: bool = False
    allow_missing: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """What a pass over the videos of an evaluation gives.

    Attributes:
        features: float32 ``[N, L, D]``: the features of :func:`encode_videos` for each video and
            each λ. NaN for videos that can't be read.
        texts: the text features ``[K, D]`` at each λ.
        failures: the videos that can't be read.
        timing: the time of this run.
        settings: everything that the features depend on.
    """

    features: Tensor
    texts: list[Tensor]
    failures: list[Failure]
    timing: Timing
    settings: dict[str, Any]

    @property
    def errors(self) -> set[int]:
        """The indices of the videos that can't be read."""
        return {failure.position for failure in self.failures}


@dataclass(frozen=True)
class VideoPass:
    """Videos to encode once, and how.

    Attributes:
        paths: path of each video, relative to ``root``.
        root: folder of the videos.
        mixture: the weights to encode with.
        sampling: the frames to read.
        transform: the transform from 8-bit frames to the input of the model.
        out: folder for the results, or ``None`` to keep them in memory.
        run: batch size, worker processes, progress bar and treatment of unreadable videos.
    """

    paths: Sequence[str]
    root: str
    mixture: Mixture
    sampling: Sampling
    transform: Transform
    out: str | os.PathLike[str] | None
    run: RunOptions

    def encode(
        self,
        model: nn.Module,
        encode_texts: Callable[[], Tensor],
        check_texts: Callable[[Tensor], None] = lambda texts: None,
    ) -> Encoded:
        """Encode the texts and the videos.

        The videos are shared by the processes. A run that was stopped goes on in its folder.

        Args:
            model: a model with the weights of the original CLIP. On exit it has these weights,
                bitwise.
            encode_texts: returns the text features ``[K, D]`` at the present weights of the model.
            check_texts: is called with the first text features before a video is read.

        Raises:
            RecordsError, UsageError, StateMismatchError, NonFiniteWeightsError, VideoOptionError:
                see :func:`openvclip.evaluation.evaluate_protocol`.
        """
        mixture, settings = self.mixture, self._settings(model)
        samples = [(path, 0) for path in self.paths]
        dataset = VideoDataset(
            samples, self.root, transform=self.transform, sampling=self.sampling, details=True
        )
        with joined_processes() as processes:
            _require_folder(processes, self.out)
            folder = None if self.out is None else Path(self.out)
            with Records(folder, settings, processes.rank) as records:
                texts = mixture.text_features(model, encode_texts)
                check_texts(texts[0])
                timing = encode_videos(
                    model, dataset, records, mixture=mixture, options=self.run, processes=processes
                )
        shape = (len(samples), max(1, len(mixture.lams)), texts[0].shape[1])
        features, errors = _features_of(records, shape, self.run.batch_size)
        _require_finite(features, errors, model, mixture)
        failures = [Failure(i, dataset.path(i), reason) for i, reason in sorted(errors.items())]
        # The features of the videos do not depend on the texts: a run with other texts reuses them.
        return Encoded(features, texts, failures, timing, {**settings, "text": mixture.text})

    def _settings(self, model: nn.Module) -> dict[str, Any]:
        """Return everything that the features depend on: the content of ``settings.json``."""
        mixture, run = self.mixture, self.run
        tuned = mixture.tuned_state(model)
        return {
            **run.settings,
            "videos": len(self.paths),
            "list": _digest_text(json.dumps(self.paths)),
            **_model_settings(model),
            "tuned": None if tuned is None else weights_hash(tuned),
            "lams": list(mixture.lams),
            **_sampling_settings(self.sampling),
            "transform": asdict(self.transform),
            "batch_size": run.batch_size,
            "amp": None if run.amp is None else str(run.amp),
            "device": next(model.parameters()).device.type,
            # Folders of results that were written before there was this option go on.
            **({} if run.pooling == "unit_frames" else {"pooling": run.pooling}),
        }


def require_videos(paths: Sequence[str], root: str) -> None:
    """Check that all videos exist.

    Args:
        paths: paths of the videos, relative to ``root``.
        root: the folder of the videos.

    Raises:
        VideoNotFoundError: the folder or videos do not exist. The error states how many videos are
            missing.
    """
    missing = missing_videos(paths, root)
    if missing:
        raise VideoNotFoundError(
            f"{len(missing)} of {len(paths)} videos are not in {root} ({listed(missing)})"
            f"{near_path(os.path.join(root, missing[0]))}. Check that the paths start from this "
            "folder, or allow missing videos (--allow-missing-videos, allow_missing=True)."
        )


def missing_videos(paths: Sequence[str], root: str) -> list[str]:
    """Return the videos that do not exist.

    Args:
        paths: paths of the videos, relative to ``root``.
        root: the folder of the videos.

    Raises:
        VideoNotFoundError: the folder does not exist.
    """
    if not os.path.isdir(root):
        raise VideoNotFoundError(f"{root}: no such folder of videos{near_path(root)}.")
    return [path for path in paths if not os.path.isfile(os.path.join(root, path))]


def _require_folder(processes: Processes, out: str | os.PathLike[str] | None) -> None:
    if processes.world_size > 1 and out is None:
        raise UsageError(
            f"out is None with {processes.world_size} processes. Give out, a folder that all "
            "processes can reach: the processes exchange their results through this folder."
        )


def _features_of(
    records: Records, shape: tuple[int, ...], batch_size: int
) -> tuple[Tensor, dict[int, str]]:
    """Return the features ``[N, L, D]`` of all videos, NaN for unreadable videos, and the errors.

    The errors are the reasons why videos are unreadable, by index of the video.
    """
    features = torch.full(shape, float("nan"))
    errors: dict[int, str] = {}
    for key, indices in enumerate(batches_of(len(features), batch_size)):
        record = records.by_key[key]
        errors.update({indices[index]: reason for index, reason in record.errors.items()})
        readable = [index for index in indices if index not in errors]
        if readable:
            features[readable] = record.values
    return features, errors


def _require_finite(
    features: Tensor, errors: Container[int], model: nn.Module, mixture: Mixture
) -> None:
    """Raise if the features of a readable video are NaN or infinite."""
    readable = [index for index in range(len(features)) if index not in errors]
    require_finite(
        features[readable],
        lambda: {**named_state(model), **(mixture.tuned_state(model) or {})},
        "The features of videos",
    )


def _sampling_settings(sampling: Sampling) -> dict[str, Any]:
    """Return the attributes of a sampling. The names are those of ``settings.json``."""
    values = asdict(sampling)
    if sampling.sampler != "seconds":  # folders that were written before there was this option
        del values["last_second"]
    return values


def _model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model that its features depend on.

    These are the temporal attention, a hash of the architecture and a hash of the weights.
    """
    views = [getattr(module, "view", None) for module in model.modules()]
    windows = [f"{view.window} {view.boundary}" for view in views if isinstance(view, FrameView)]
    return {
        "expand": ", ".join(sorted(set(windows))) or None,
        "architecture": _digest_text(f"{model} {windows}"),
        "weights": weights_hash(model.state_dict()),
    }


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
