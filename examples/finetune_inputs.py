"""What :mod:`examples.finetune` starts from: the original CLIP, the videos, the validation."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import openvclip
from examples.recipe import Recipe
from examples.shards import ShardBatches, class_indices, find_shards, read_index
from examples.video_batches import VideoBatches, class_warnings
from openvclip.errors import UsageError
from openvclip.evaluation import evaluate
from openvclip.labels import read_labels
from openvclip.loading import load_clip
from openvclip.prompting import VideoClassifier
from openvclip.ranks import Ranks
from openvclip.video import VideoDataset, transforms
from openvclip.video.transforms import Transform

Tokenizer = Callable[[list[str]], Tensor]


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[Any, Tokenizer, Transform]:
    """The original CLIP on its device, its tokenizer, and the pixels to train it on.

    Its attention is expanded in time, but for ViFi-CLIP, which fine-tunes it frame by frame.
    """
    if args.hf:
        from examples.hugging_face import load

        model, tokenizer, pixels = load(args.hf)
    else:
        loaded = load_clip(args.model, args.pretrained, expand=False, transform="train")
        model, tokenizer, pixels = loaded.model, loaded.tokenizer, loaded.transform
    if args.method != "vifi":
        openvclip.expand_temporal_attention(model)
    pixels = transforms.build(
        "train", pixels.size, mean=pixels.mean, std=pixels.std, color_jitter=args.color_jitter
    )
    return model.to(device), tokenizer, pixels


def make_classifier(
    model: nn.Module, tokenizer: Tokenizer, names: Sequence[str], method: str
) -> openvclip.ZeroShotClassifier | VideoClassifier:
    """The classifier of the training classes; ViFi-CLIP's trains its text side too."""
    if method == "vifi":
        return VideoClassifier(model, tokenizer, names)
    return openvclip.ZeroShotClassifier(model, tokenizer, names)


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
    args: argparse.Namespace, recipe: Recipe, pixels: Transform, ranks: Ranks, device: torch.device
) -> Videos:
    """The training videos, from annotated files or from shards.

    Raises:
        AnnotationError, ClassNamesError: a list, an index or the class names don't fit.
        UsageError: the batch can't be shared by the processes.
    """
    names = read_labels(args.classes) if args.classes is not None else None
    reading: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "micro_batch": args.per_device_batch,
        "ranks": ranks,
        "seed": recipe.seed,
        "workers": args.workers,
        "pin": device.type == "cuda",
    }
    batches: VideoBatches | ShardBatches
    about: dict[str, Any] = {}
    if args.shards is not None:
        names = names or []
        found = class_indices(read_index(find_shards(args.shards), args.shard_index), names)
        sizes = {shard: len(labels) for shard, labels in found.items()}
        batches = ShardBatches(sizes, names, transform=pixels, sampling=_sampling(args), **reading)
        labels = [label for shard in found.values() for label in shard]
        content: object = found
        # Which videos a step sees depends on how many streams there are.
        about |= {"processes": ranks.world, "per_device_batch": args.per_device_batch}
    else:
        dataset = _dataset(args, args.annotations, args.root, names, pixels, seed=recipe.seed)
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


class Validation:
    """Closed-set accuracy on the classes of the training, one view a video, shared by processes.

    Args:
        args: the command line.
        classifier: of the training classes.
        names: the training classes.
        pixels: of the training; those of the validation have their size, mean and deviation.
        amp: autocast to this dtype.
        ranks: the processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        classifier: nn.Module,
        names: Sequence[str],
        pixels: Transform,
        amp: torch.dtype | None,
        ranks: Ranks,
    ) -> None:
        self.classifier, self.amp, self.ranks = classifier, amp, ranks
        # Sharded text weights can't be used outside a forward pass of the whole.
        self._fixed_text = getattr(classifier, "fixed_text", nullcontext)
        if args.fsdp:
            self._fixed_text = nullcontext
        self._loader: DataLoader[Any] | None = None
        if args.val_annotations is None:
            return
        centre = replace(pixels, name="released", color_jitter=(0.0, 0.0, 0.0, 0.0))
        root = args.val_root or args.root
        dataset = _dataset(args, args.val_annotations, root, names, centre, validation=True)
        own = ranks.share(list(range(len(dataset))))
        self._count = len(own)
        # As many batches in each process: sharded weights are put together by all at once.
        own += [0] * (-(-len(dataset) // ranks.world) - len(own))
        self._loader = DataLoader(
            Subset(dataset, own),
            batch_size=args.per_device_batch,
            num_workers=args.workers,
            generator=torch.Generator(),  # leaves the global one alone
        )

    def accuracy(self) -> dict[str, float]:
        """``top1`` and ``top5`` in [0, 1] of the weights as they are; nothing without videos."""
        if self._loader is None:
            return {}
        device = next(self.classifier.parameters()).device
        autocast = torch.autocast(device.type, self.amp, enabled=self.amp is not None)
        with self._fixed_text(), autocast:
            progress = None if self.ranks.first else False
            found = evaluate(
                self.classifier, self._loader, progress=progress, description="validation"
            )
        places = found.ranks[: self._count]
        counts = [int((places < 1).sum()), int((places < 5).sum()), len(places)]
        first, five, videos = map(sum, zip(*self.ranks.gather(counts), strict=True))
        return {"top1": first / videos, "top5": five / videos}


def _sampling(args: argparse.Namespace, *, validation: bool = False) -> dict[str, Any]:
    return {
        "num_frames": args.frames,
        "sampling_rate": args.sampling_rate,
        "sampler": "released" if validation else "dense",
        "backend": args.backend,
    }


def _dataset(
    args: argparse.Namespace,
    annotations: Any,
    root: Any,
    names: Sequence[str] | None,
    pixels: Transform,
    *,
    seed: int = 0,
    validation: bool = False,
) -> VideoDataset:
    return VideoDataset(
        annotations,
        root,
        class_names=names,
        transform=pixels,
        details=validation,
        seed=seed,
        **_sampling(args, validation=validation),
    )
