"""The inputs of a run: the original CLIP, and the training videos from files or from shards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvclip.checkpoints.api import load_checkpoint
from openvclip.errors import AnnotationError, UsageError
from openvclip.models.loading import (
    LoadedModel,
    brings_weights,
    load_model,
    name_of_transformers,
)
from openvclip.training.batches import Batching, VideoBatches
from openvclip.training.captions import CaptionedVideos, find_captioned
from openvclip.training.shard_batches import ShardBatches
from openvclip.training.shards import class_indices, find_shards, read_index
from openvclip.video import VideoDataset
from openvclip.video.sampling import Sampling
from openvclip.video.transforms import Transform


def load_original(
    model: str,
    pretrained: str,
    *,
    hugging_face: str | None = None,
    start_from: Path | None = None,
) -> LoadedModel:
    """Load the model that a run starts from, with the transform for training.

    The model is not expanded, and is on the CPU.

    Args:
        model: see :func:`openvclip.models.load_model`.
        pretrained: a tag of open_clip, or a file of weights. Not used if the model has weights.
        hugging_face: name or folder of a CLIP of transformers. It replaces ``model`` and
            ``pretrained``.
        start_from: a file of fine-tuned weights. They replace the pretrained weights: the run
            uses them as the weights of the original CLIP.

    Raises:
        ModelNameError: there is no such model or there are no such weights.
        CheckpointError, StateMismatchError: a file can't be read, or does not fit the model.
    """
    name = model if hugging_face is None else name_of_transformers(hugging_face)
    weights = None if brings_weights(name) else pretrained
    loaded = load_model(name, weights, expand=False, transform="train")
    if start_from is not None:
        load_checkpoint(start_from, loaded.model)
    return loaded


@dataclass(frozen=True)
class TrainingVideos:
    """The training videos.

    Attributes:
        batches: the micro-batches of this process.
        names: names of the classes; empty for captions.
        labels: class index of each video; empty for captions.
        about: facts about the videos, for the checkpoints and the model card.
        warnings: what was left out, in words.
    """

    batches: VideoBatches | ShardBatches
    names: list[str]
    labels: list[int]
    about: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def videos_from_files(
    annotations: Path,
    folder: Path,
    names: Sequence[str] | None,
    transform: Transform,
    sampling: Sampling,
    batching: Batching,
) -> TrainingVideos:
    """Return the training videos of an annotation file.

    Args:
        annotations: lines of path and class, or the official lists of a data set.
        folder: folder of the videos.
        names: names of the classes. ``None``: the annotations have the names.
        transform: transform from 8-bit frames to model input.
        sampling: the frames that are read from each video.
        batching: how the videos are grouped and read.

    Raises:
        AnnotationError, ClassNamesError: the annotations and the class names do not fit.
        UsageError: the class names are missing, or the processes can't share the batch.
    """
    dataset = VideoDataset(
        annotations,
        folder,
        class_names=names,
        transform=transform,
        seed=batching.seed,
        sampling=sampling,
    )
    if dataset.class_names is None:
        raise UsageError(
            f"{annotations} has class indices and no class names; give the names with "
            "--classes FILE."
        )
    labels = [label for _, label in dataset.samples]
    about = _about(str(annotations), dataset.samples, labels, dataset.class_names)
    return TrainingVideos(VideoBatches(dataset, batching), dataset.class_names, labels, about)


def videos_from_captions(
    annotations: Path,
    folder: Path,
    only: Path | None,
    transform: Transform,
    sampling: Sampling,
    batching: Batching,
) -> TrainingVideos:
    """Return the training videos of a file of captions.

    Args:
        annotations: see :func:`openvclip.training.captions.find_captioned`.
        folder: folder of the videos.
        only: a list of the videos to use. ``None``: all videos.
        transform: transform from 8-bit frames to model input.
        sampling: the frames that are read from each video.
        batching: how the videos are grouped and read.

    Raises:
        AnnotationError: the captions can't be read, or belong to a single video.
        VideoNotFoundError: none of the videos exists.
        UsageError: the processes can't share the batch.
    """
    paths, captions, warnings = find_captioned(annotations, folder, only)
    if len(paths) < 2:
        raise AnnotationError(
            f"{annotations}: one video ({paths[0]}) is in {folder}; the contrastive objective "
            "compares videos with each other and needs at least 2."
        )
    samples = [(path, position) for position, path in enumerate(paths)]
    videos = VideoDataset(
        samples, folder, transform=transform, seed=batching.seed, sampling=sampling
    )
    digest = hashlib.blake2b(repr((paths, captions)).encode(), digest_size=4).hexdigest()
    n_captions = sum(map(len, captions))
    about = {"source": str(annotations), "videos": len(paths), "captions": n_captions}
    batches = VideoBatches(CaptionedVideos(videos, captions), batching)
    return TrainingVideos(batches, [], [], {**about, "digest": digest}, warnings)


def videos_from_shards(
    pattern: str,
    index: Path | None,
    names: Sequence[str],
    transform: Transform,
    sampling: Sampling,
    batching: Batching,
) -> TrainingVideos:
    """Return the training videos of WebDataset shards.

    Args:
        pattern: pattern of the shards, such as ``"k400-{0000..0999}.tar"``.
        index: the index of the shards. ``None``: read the labels from the shards.
        names: names of the classes.
        transform: transform from 8-bit frames to model input.
        sampling: the frames that are read from each video.
        batching: how the videos are grouped and read.

    Raises:
        AnnotationError: a shard or the index can't be read, or a label is unknown.
        UsageError: the processes or the workers can't share the shards.
    """
    classes = class_indices(read_index(find_shards(pattern), index), names)
    sizes = {shard: len(labels) for shard, labels in classes.items()}
    labels = [label for shard in classes.values() for label in shard]
    # These two numbers change the streams and their micro-batches, and so the videos of a step.
    about = {
        "processes": batching.processes.world_size,
        "per_device_batch": batching.micro_batch,
        **_about(pattern, classes, labels, names),
    }
    batches = ShardBatches(sizes, names, transform, sampling, batching)
    return TrainingVideos(batches, list(names), labels, about)


def _about(
    source: str, content: object, labels: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    digest = hashlib.blake2b(repr((content, list(names))).encode(), digest_size=4).hexdigest()
    return {"source": source, "videos": len(labels), "classes": len(names), "digest": digest}
