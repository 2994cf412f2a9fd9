"""What :mod:`examples.finetune` starts from: the original CLIP and the videos."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

import openvclip
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import UsageError
from openvclip.models.labels import read_labels
from openvclip.models.loading import load_model
from openvclip.processes import Processes
from openvclip.training.batches import VideoBatches, class_warnings
from openvclip.training.methods import Tokenizer, is_expanded
from openvclip.training.recipe import Recipe
from openvclip.training.shards import ShardBatches, class_indices, find_shards, read_index
from openvclip.training.validation import sampling_of
from openvclip.video import VideoDataset
from openvclip.video.transforms import Transform


def build_model(args: argparse.Namespace, device: torch.device) -> tuple[Any, Tokenizer, Transform]:
    """The original CLIP on its device, its tokenizer, and the pixels to train it on.

    Its attention is expanded in time where the method asks for it, unless ``--frame-by-frame``.
    With ``--start-from`` it has the weights of that file, which is then what the method takes for
    the original.
    """
    if args.hf:
        from openvclip.models.hugging_face import load

        model, tokenizer, pixels = load(args.hf)
    else:
        loaded = load_model(args.model, args.pretrained, expand=False, transform="train")
        model, tokenizer, pixels = loaded.model, loaded.tokenizer, loaded.transform
    if args.start_from is not None:
        load_checkpoint(args.start_from, model)
    if is_expanded(args.method) and not args.frame_by_frame:
        openvclip.expand_temporal_attention(model)
    pixels = pixels.with_(
        name="train", hflip=args.flip, color_jitter=args.color_jitter, short_side=args.short_side
    )
    return model.to(device), tokenizer, pixels


@dataclass(frozen=True)
class Videos:
    """What is trained on.

    Attributes:
        batches: of this process.
        names: of the classes.
        about: which videos these are, for the checkpoints and the model card.
        warnings: what is strange about the classes.
    """

    batches: VideoBatches | ShardBatches
    names: list[str]
    about: dict[str, Any]
    warnings: list[str]


def load_videos(
    args: argparse.Namespace,
    recipe: Recipe,
    pixels: Transform,
    processes: Processes,
    device: torch.device,
) -> Videos:
    """The training videos, from annotated files or from shards.

    Raises:
        AnnotationError, ClassNamesError: a list, an index or the class names don't fit.
        UsageError: the batch can't be shared by the processes.
    """
    sampling = sampling_of(args, args.sampler)
    names = read_labels(args.classes) if args.classes is not None else None
    reading: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "micro_batch": args.per_device_batch,
        "processes": processes,
        "seed": recipe.seed,
        "num_workers": args.num_workers,
        "pin": device.type == "cuda",
    }
    batches: VideoBatches | ShardBatches
    about: dict[str, Any] = {}
    if args.shards is not None:
        names = names or []
        found = class_indices(read_index(find_shards(args.shards), args.shard_index), names)
        sizes = {shard: len(labels) for shard, labels in found.items()}
        batches = ShardBatches(sizes, names, transform=pixels, sampling=sampling, **reading)
        labels = [label for shard in found.values() for label in shard]
        content: object = found
        # Which videos a step sees depends on how many streams there are.
        about |= {"processes": processes.world_size, "per_device_batch": args.per_device_batch}
    else:
        dataset = VideoDataset(
            args.annotations,
            args.videos,
            class_names=names,
            transform=pixels,
            seed=recipe.seed,
            sampling=sampling,
        )
        if dataset.class_names is None:
            raise UsageError(
                f"{args.annotations} numbers its classes: give their names with --classes FILE."
            )
        names = dataset.class_names
        batches = VideoBatches(dataset, **reading)
        labels = [label for _, label in dataset.samples]
        content = dataset.samples
    digest = hashlib.blake2b(repr((content, names)).encode(), digest_size=4).hexdigest()
    source = args.shards or str(args.annotations)
    about |= {"source": source, "videos": len(labels), "classes": len(names), "digest": digest}
    unseen = read_labels(args.zero_shot_classes) if args.zero_shot_classes is not None else []
    return Videos(batches, names, about, class_warnings(labels, names, unseen))
