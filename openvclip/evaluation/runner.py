"""A model on a published protocol: every video encoded once, every split scored on its classes."""

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

from openvclip.errors import EvaluationError, UsageError, VideoNotFoundError
from openvclip.evaluation.accuracy import Evaluation, score
from openvclip.evaluation.encoding import Timing, batches_of, encode_videos
from openvclip.evaluation.records import Records
from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier
from openvclip.models.preprocess import transform_for
from openvclip.processes import Processes, joined_processes
from openvclip.towers.view import FrameView
from openvclip.video import Failure, VideoDataset
from openvclip.video.protocols import Split
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform
from openvclip.weights.hashing import weights_hash
from openvclip.weights.names import listed


@dataclass(frozen=True)
class SplitScore:
    """How a model did on one split.

    Attributes:
        name: the split's.
        class_names: K names in the order of their indices.
        evaluation: predictions and ranks of the N videos that count.
        left_out: how many videos could not be read and do not count.
        protocol: the split's.
    """

    name: str
    class_names: list[str]
    evaluation: Evaluation
    left_out: int = 0
    protocol: str = ""

    def per_class(self) -> dict[str, float]:
        """Top-1 accuracy on each class in [0, 1]; NaN for a class without a video."""
        values = self.evaluation.per_class(len(self.class_names)).tolist()
        return dict(zip(self.class_names, values, strict=True))

    def confusion(self) -> Tensor:
        """How many videos of class ``i`` were taken for class ``j``, int64 ``[K, K]``."""
        return self.evaluation.confusion(len(self.class_names))


@dataclass(frozen=True)
class ProtocolEvaluation:
    """How a model did on a protocol.

    Attributes:
        scores: for each weight of the original CLIP (``None`` for a model taken as it is) the
            splits in their order.
        failures: the videos that could not be read; ``position`` counts in the order in which
            the splits first name them.
        timing: of this run alone.
        settings: what the features depend on.
    """

    scores: dict[float | None, list[SplitScore]]
    failures: list[Failure]
    timing: Timing
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def protocols(self) -> list[str]:
        """What the splits are parts of, in their order."""
        scores = next(iter(self.scores.values()))
        return list(dict.fromkeys(one.protocol for one in scores))

    def of(self, lam: float | None = None, protocol: str | None = None) -> list[SplitScore]:
        """The scores on the splits at one weight of the original CLIP.

        Args:
            lam: the weight of the original CLIP; need not be given where there is only one.
            protocol: only the splits of this one.

        Raises:
            EvaluationError: nothing was evaluated at ``lam``, or on ``protocol``.
        """
        if lam is None and len(self.scores) == 1:
            (lam,) = self.scores
        for name, given, known in (
            ("lam", lam, list(self.scores)),
            ("protocol", protocol, [None, *self.protocols]),
        ):
            if given not in known:
                expected = ", ".join(str(one) for one in known)
                raise EvaluationError(
                    f"{name}={given}: nothing was evaluated there; expected one of {expected}."
                )
        return [one for one in self.scores[lam] if protocol in (None, one.protocol)]

    def top(self, k: int, lam: float | None = None, protocol: str | None = None) -> list[float]:
        """Top-``k`` accuracy in [0, 1] on each split.

        Args:
            k: how many of the highest logits may hold the true class.
            lam: see :meth:`of`.
            protocol: see :meth:`of`.

        Raises:
            EvaluationError: see :meth:`of`.
        """
        return [one.evaluation.top(k) for one in self.of(lam, protocol)]


def evaluate_protocol(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    splits: Sequence[Split],
    videos: str | os.PathLike[str],
    *,
    tuned: Mapping[str, Tensor] | None = None,
    lams: Sequence[float] = (),
    transform: Transform | None = None,
    sampling: Sampling | None = None,
    templates: Sequence[str] = VIDEO_TEMPLATES,
    batch_size: int = 8,
    num_workers: int = 2,
    amp: torch.dtype | None = None,
    out: str | os.PathLike[str] | None = None,
    leave_out_broken: bool = False,
    allow_missing: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    description: str = "evaluate",
) -> ProtocolEvaluation:
    """Evaluate a model on all splits of one or more protocols in one pass over their videos.

    The videos of all splits together are read and encoded once (once for each of ``lams``), and
    each split is scored among its own classes: the ten halves of EP1 and the three lists of EP3
    together cost what EP2 costs. The logits are the frames' cosines, averaged over the frames and
    summed over the views.

    Under ``torchrun``, or with a process group that is there, each process encodes a part; they
    find each other's results in ``out``, and all of them return the whole.

    Args:
        model: an open_clip model, expanded or not, that holds the original CLIP's weights: the
            text features are made from these.
        tokenizer: as ``open_clip.get_tokenizer`` gives it.
        splits: what :func:`openvclip.video.protocols.load` gives, those of several protocols in
            one list, or splits of your own.
        videos: the folder that the splits' paths start from.
        tuned: state dict of the fine-tuned model. Without it ``model`` is evaluated as it is.
        lams: weights of the original CLIP to evaluate at, 0 for the fine-tuned model itself; (0,)
            where only ``tuned`` is given. ``model`` has its own weights back at the end.
        transform: from 8-bit frames to what the model takes; CLIP's pixels at the model's size
            as the released evaluation makes them by default.
        sampling: which frames; three views of 8 by default.
        templates: texts with ``{}`` for the class name.
        batch_size: videos at a time, each with all its views.
        num_workers: processes that decode.
        amp: autocast to this dtype.
        out: folder for results as they come. With the same settings a run goes on where an
            earlier one stopped. ``None`` keeps them in memory.
        leave_out_broken: do not count videos that cannot be read; by default they are wrong.
        allow_missing: videos that are not there are videos that cannot be read; by default they
            are an error before anything is encoded.
        settings: further facts to tell runs in ``out`` apart by, as JSON has them.
        progress: show a progress bar; by default where the output is a terminal.
        description: the bar's label.

    Raises:
        VideoNotFoundError: videos are missing.
        RecordsError: ``out`` holds results of other settings, or can't be written.
        EvaluationError: there are no splits or videos, or two splits disagree.
        UsageError: several processes without ``out``; ``lams`` without ``tuned``.
        ClassNamesError, StateMismatchError, VideoOptionError: see there.
    """
    sampling = sampling or PAPER_SAMPLING
    transform = transform or transform_for(model)
    if lams and tuned is None:
        raise UsageError(f"lams={list(lams)} without tuned: give the fine-tuned model's weights.")
    lams = [float(lam) for lam in lams] or ([] if tuned is None else [0.0])
    samples, places = _union(splits)
    root = os.fspath(videos)
    if not allow_missing:
        require_videos([path for path, _ in samples], root)
    facts = {
        **(settings or {}),
        **_list_facts([path for path, _ in samples]),
        **_model_facts(model),
        "tuned": None if tuned is None else weights_hash(tuned),
        "lams": lams,
        **asdict(sampling),
        "transform": asdict(transform),
        "batch_size": batch_size,
        "amp": None if amp is None else str(amp),
        "device": next(model.parameters()).device.type,
    }
    names = list(dict.fromkeys(name for split in splits for name in split.class_names))
    dataset = VideoDataset(samples, root, transform=transform, sampling=sampling, details=True)
    with joined_processes() as processes:
        _require_folder(processes, out)
        with Records(None if out is None else Path(out), facts, processes.rank) as records:
            texts = ZeroShotClassifier(model, tokenizer, names, templates).text_features
            timing = encode_videos(
                model,
                dataset,
                records,
                tuned=tuned,
                lams=lams,
                batch_size=batch_size,
                num_workers=num_workers,
                amp=amp,
                processes=processes,
                progress=progress,
                description=description,
            )
    weights: list[float | None] = [*lams] or [None]
    features = torch.full((len(samples), len(weights), texts.shape[1]), float("nan"))
    errors = _fill(features, records, batch_size)
    rows = dict(zip(names, texts.float().cpu(), strict=True))
    scores = {
        lam: [
            _scored(split, place, features[:, i], errors if leave_out_broken else (), rows)
            for split, place in zip(splits, places, strict=True)
        ]
        for i, lam in enumerate(weights)
    }
    failures = [Failure(place, dataset.path(place), why) for place, why in sorted(errors.items())]
    return ProtocolEvaluation(scores, failures, timing, facts)


def require_videos(paths: Sequence[str], root: str) -> None:
    """Raise one :class:`VideoNotFoundError` for all videos that are not below ``root``."""
    if not os.path.isdir(root):
        raise VideoNotFoundError(f"{root}: no such folder of videos.")
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise VideoNotFoundError(
            f"{len(missing)} of {len(paths)} videos are not in {root} ({listed(missing)}). Check "
            "the folder, which paths start from; to go on without them, allow missing videos."
        )


def _require_folder(processes: Processes, out: str | os.PathLike[str] | None) -> None:
    if processes.world_size > 1 and out is None:
        raise UsageError(
            f"{processes.world_size} processes evaluate together and find each other's results in "
            "a folder that all of them can reach: give out."
        )


def _union(splits: Sequence[Split]) -> tuple[list[tuple[str, int]], list[list[int]]]:
    """All videos, each once, and for each split the places of its videos among them."""
    if not splits or not all(split.samples for split in splits):
        raise EvaluationError("There is nothing to evaluate: no splits, or one without videos.")
    place_of: dict[str, int] = {}
    class_of: dict[str, str] = {}
    places = []
    for split in splits:
        for path, label in split.samples:
            name = split.class_names[label]
            if class_of.setdefault(path, name) != name:
                raise EvaluationError(
                    f"{path} is of class {class_of[path]!r} in one split and of {name!r} in "
                    f"{split.name}; expected one class for a video."
                )
        places.append([place_of.setdefault(path, len(place_of)) for path, _ in split.samples])
    return [(path, 0) for path in place_of], places


def _fill(features: Tensor, records: Records, batch_size: int) -> dict[int, str]:
    """Put those found into ``features``, ``[N, L, D]``; tell why the other videos have none."""
    errors: dict[int, str] = {}
    for key, places in enumerate(batches_of(len(features), batch_size)):
        record = records.found[key]
        errors.update({places[place]: reason for place, reason in record.errors.items()})
        readable = [place for place in places if place not in errors]
        if readable:
            features[readable] = record.values
    return errors


def _scored(
    split: Split,
    places: list[int],
    features: Tensor,
    left_out: Container[int],
    texts: dict[str, Tensor],
) -> SplitScore:
    """Top-k needs no logit scale: it is the same for all classes of a video, and positive."""
    counting = torch.tensor([place not in left_out for place in places])
    rows = torch.stack([texts[name] for name in split.class_names])
    labels = torch.tensor([label for _, label in split.samples])
    return SplitScore(
        split.name,
        list(split.class_names),
        score((features[places] @ rows.T)[counting], labels[counting]),
        left_out=int((~counting).sum()),
        protocol=split.protocol,
    )


def _model_facts(model: nn.Module) -> dict[str, Any]:
    """What the features depend on beside the weights: activations, and what frames attend to."""
    views = [getattr(module, "view", None) for module in model.modules()]
    found = [f"{one.window} {one.boundary}" for one in views if isinstance(one, FrameView)]
    return {
        "expand": ", ".join(sorted(set(found))) or None,
        "architecture": _digest_text(f"{model} {found}"),
        "weights": weights_hash(model.state_dict()),
    }


def _list_facts(paths: Sequence[str]) -> dict[str, Any]:
    return {"videos": len(paths), "list": _digest_text(json.dumps(paths))}


def _digest_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
