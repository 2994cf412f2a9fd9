r"""Merge two fine-tuned models of one CLIP with several methods, and compare the results.

    python merge_two_finetunes.py --first sports.safetensors --second music.safetensors \
        --videos videos/ --lists sports.csv music.csv --model ViT-B-16-quickgelu

Each list has lines ``path,class name``; the paths are below ``--videos``. A list may hold images,
which plain CLIP encodes. Give ``--frame-by-frame`` if models that were fine-tuned on images get
videos. If the models have a contract, they are used as it says; two that differ are an error.

The printed table has a row for each model and a column for each list. The numbers are top-1
accuracies in [0, 1], among the classes of the list. ``CLIP`` is the original CLIP. A good merge
comes close to ``first`` on the list of the first model and to ``second`` on the other list.
``average, λ=0.5`` is half the original CLIP and half the average. Each method has the settings of
its paper, or gives both models the same weight. Tune the settings on files of other lists.
"""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader  # type: ignore[import-untyped]
from torchvision.transforms.functional import pil_to_tensor  # type: ignore[import-untyped]

import openvclip
from openvclip import merging
from openvclip.cli.options.contract import options_for_files
from openvclip.commands import Parser, command, refuse_unused
from openvclip.errors import AnnotationError
from openvclip.evaluation import evaluate
from openvclip.models.loading import brings_weights, fine_tuned, load_model
from openvclip.models.usage import expand_as
from openvclip.models.video_usage import VideoUsage, usage_for
from openvclip.video import Sampling, VideoDataset, read_annotations
from openvclip.video.transforms import Transform

State = dict[str, Tensor]


class Images(Dataset[tuple[Tensor, int]]):
    """Pairs ``(image [C, H, W], class index)``: a batch of images is predicted by plain CLIP."""

    def __init__(self, samples: list[tuple[str, int]], root: Path, transform: Transform) -> None:
        self.samples, self.root, self.transform = samples, root, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(pil_to_tensor(default_loader(self.root / path))[None])[0], label


def merges(clip: State, first: State, second: State) -> dict[str, Callable[[], State]]:
    """Return the models to compare as functions, so that one merge at a time is in memory."""
    pair = [first, second]

    def sum_of_task_vectors() -> State:
        vectors = [merging.task_vector(clip, tuned) for tuned in pair]
        return merging.apply_task_vectors(clip, vectors)

    def dare_and_ties() -> State:
        thinned = [merging.dare(clip, tuned, seed=seed) for seed, tuned in enumerate(pair)]
        return merging.ties(clip, thinned, density=1.0)

    return {
        "CLIP": lambda: clip,
        "first": lambda: first,
        "second": lambda: second,
        "average": lambda: merging.average(pair),
        "average, λ=0.5": lambda: openvclip.interpolate(clip, merging.average(pair), 0.5),
        "slerp": lambda: merging.slerp(first, second, 0.5),
        "task vectors": sum_of_task_vectors,
        "ties": lambda: merging.ties(clip, pair),
        "dare + ties": dare_and_ties,
        "model stock": lambda: merging.model_stock(clip, pair),
    }


def read_list(path: Path, usage: VideoUsage, args: Namespace) -> tuple[DataLoader[Any], list[str]]:
    """Return the clips of a list of videos or of images, and its class names."""
    samples, names = read_annotations(path, root=args.videos)
    if names is None:
        raise AnnotationError(f"{path}: got class numbers, expected lines path,class name.")
    data: Dataset[Any]
    if Path(samples[0][0]).suffix.lower() in (".jpg", ".jpeg", ".png"):
        data = Images(samples, args.videos, usage.transform)
    else:
        frames: Any = {"transform": usage.transform, "sampling": usage.sampling}
        data = VideoDataset(samples, args.videos, **frames, details=True)
    return DataLoader(data, args.batch_size, num_workers=args.num_workers), names


def run(args: Namespace) -> None:
    """Evaluate each merge on each list, and print the table."""
    expand, files = not args.frame_by_frame, [args.first, args.second]
    args = options_for_files(args, files, expand=expand, ignored=["pretrained"])
    base = None if brings_weights(args.model) else args.pretrained
    loaded = load_model(args.model, base, expand=expand and not args.contract, device=args.device)
    model, contract = loaded.model, args.contract
    usage = usage_for(model, None, Sampling(args.frames, args.sampling_rate), loaded.transform)
    if contract is not None:
        expand_as(model, contract)
        usage = usage_for(model, contract)
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (fine_tuned(model, path) for path in files)
    lists = [read_list(path, usage, args) for path in args.lists]
    still = "on images" if all(isinstance(data.dataset, Images) for data, _ in lists) else ""
    refuse_unused(args.given, dict.fromkeys(("frames", "sampling_rate"), still))
    print(f"{'model':<16}" + "".join(f"{path.stem[:11]:<12}" for path in args.lists) + "mean")
    for row, merge in merges(clip, first, second).items():
        model.load_state_dict(merge())
        accuracies = []
        for loader, names in lists:  # new text features: a merge may change the text tower
            texts = (loaded.tokenizer, names, usage.templates)
            classifier = openvclip.ZeroShotClassifier(model, *texts, pooling=usage.pooling)
            accuracies.append(evaluate(classifier, loader, description=row).top1)
        cells = [*accuracies, sum(accuracies) / len(accuracies)]
        print(f"{row:<16}" + "".join(f"{cell:<12.3f}" for cell in cells), flush=True)


@command
def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--first", type=Path, required=True, help="weights of the first fine-tuned model")
    add("--second", type=Path, required=True, help="weights of the second fine-tuned model")
    add("--lists", type=Path, nargs="+", required=True, help="CSV files with path,class name")
    add("--videos", type=Path, required=True, help="folder of the videos or images")
    add("--model", default="ViT-B-16-quickgelu", help="default: %(default)s")
    add("--pretrained", default="openai", help="weights of the CLIP; default: %(default)s")
    add("--frame-by-frame", action="store_true", help="apply CLIP to each frame alone")
    add("--override", action="store_true", help="use flags that contradict the contract")
    add("--frames", type=int, default=8, help="frames of a clip; default: %(default)s")
    add("--sampling-rate", type=int, default=16, help="use every N-th frame at 30 fps; default: 16")
    add("--batch-size", type=int, default=16, help="files at a time; default: %(default)s")
    add("--num-workers", type=int, default=2, help="decoding processes; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
