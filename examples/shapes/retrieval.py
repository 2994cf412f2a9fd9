"""How often is the clip of a sentence found, before and after fine-tuning on captions?

This command measures it in the shapes world. A caption names the colour, the shape and the action
of a clip, such as "a red star sliding", and no two clips of a test have the same caption. For each
seed, ``examples/finetune.py --objective contrastive`` trains Open-VCLIP on captioned clips of the
seen shapes. Then it computes:

- recall along λ, in both directions: the 512 clips of the seen, the development or the unseen
  shapes and their captions;
- the search: 1,000 clips of all shapes are indexed with ``openvclip.search.Index``, and each
  caption is searched. R@1 is the share of the captions whose clip is the first result.

λ is chosen on the development shapes, and results are reported on the unseen shapes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

import openvclip
from examples import finetune
from examples.shapes.clips import write_clip
from examples.shapes.drawing import draw_video
from examples.shapes.model import MEAN, MODEL_NAMES, STD, WEIGHTS, create_model
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.study_options import read_arguments
from examples.shapes.world import ACTIONS, COLOURS, SPLITS, Split, still_caption
from openvclip.checkpoints import atomic_path, load_checkpoint
from openvclip.commands.streams import command
from openvclip.evaluation import markdown_table, mean_and_std, retrieval_metrics
from openvclip.models.drawing import new_figure, save_figure
from openvclip.search import Index, WindowOptions
from openvclip.video import Sampling, VideoDataset, transforms

FRAMES = 8
LAMBDAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
DIRECTIONS = ("text_to_video", "video_to_text")
RECALLS = ("R1", "R5", "R10")
MODELS = ("CLIP", "fine-tuned (λ = 0)", "Open-VCLIP")
"""The models of the search. The last model has the λ that the development shapes choose."""

Measures = dict[str, list[float]]
"""Numbers over the seeds, by name. The parts of a name are separated by ``/``."""


@dataclass(frozen=True)
class Settings:
    """The size of the experiment. The hyper-parameters were chosen on the development shapes.

    Attributes:
        shapes: number of shapes of each split.
        colours: number of colours.
        captions: captions of each training clip; an epoch uses one of them.
        epochs: epochs of the training.
        average_after: epochs before the averaging begins.
        lr: learning rate.
        batch_size: clips in a step.
        indexed: number of clips in the index.
        frames: frames of a clip.
        fps: frame rate, in frames per second.
        lams: the values of λ.
    """

    shapes: int = 8
    colours: int = 8
    captions: int = 3
    epochs: int = 6
    average_after: int = 3
    lr: float = 2e-3
    batch_size: int = 32
    indexed: int = 1000
    frames: int = 16
    fps: int = 8
    lams: tuple[float, ...] = LAMBDAS


FULL = Settings()
SMOKE = Settings(
    shapes=1,
    colours=1,
    epochs=2,
    average_after=1,
    batch_size=4,
    indexed=20,
    lams=(0.0, 0.5, 1.0),
)


@dataclass(frozen=True)
class Clip:
    """A clip of the shapes world: what its caption says."""

    split: Split
    shape: str
    action: str
    colour: str

    @property
    def caption(self) -> str:
        """The caption of the clip in a test."""
        return f"a {self.colour} {self.shape} {self.action}"


def clips_of(split: Split, settings: Settings) -> list[Clip]:
    """Return one clip for each shape, action and colour of a split."""
    shapes, colours = SPLITS[split][: settings.shapes], list(COLOURS)[: settings.colours]
    return [Clip(split, s, a, c) for s in shapes for a in ACTIONS for c in colours]


def all_clips(settings: Settings) -> list[Clip]:
    """Return the clips of a test, of all splits; their captions differ."""
    return [clip for split in SPLITS for clip in clips_of(split, settings)]


def write_clips(folder: Path, clips: list[Clip], settings: Settings, seed: int) -> None:
    """Write the missing files of clips, ``0000.mp4`` and so on, and ``captions.csv``.

    The captions in the file are those of the training: several for each clip, in other words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, clip in enumerate(clips):
        is_test = folder.name == "test"
        rng = np.random.default_rng([seed, is_test, number])
        path = folder / f"{number:04d}.mp4"
        texts = [
            still_caption(clip.shape, clip.action, clip.colour, rng)
            for _ in range(settings.captions)
        ]
        rows += [(path.name, text) for text in dict.fromkeys(texts)]
        if not path.exists():
            video = draw_video(clip.shape, clip.colour, clip.action, rng, frames=settings.frames)
            write_clip(path, video, fps=settings.fps)
    with (
        atomic_path(folder / "captions.csv") as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(rows)


def fine_tune(folder: Path, out: Path, settings: Settings, seed: int) -> None:
    """Train Open-VCLIP on the captions of a folder; a finished run is kept."""
    model = Path(__file__).with_name(f"{MODEL_NAMES['small']}.json")
    arguments = {
        "objective": "contrastive",
        "model": model,
        "pretrained": WEIGHTS,
        "annotations": folder / "captions.csv",
        "videos": folder,
        "out": out,
        "device": "cpu",
        "num-workers": 0,
        "frames": FRAMES,
        "sampler": "uniform",
        "epochs": settings.epochs,
        "warmup-epochs": 1,
        "average-after": settings.average_after,
        "averages-per-epoch": 4,
        "lr": settings.lr,
        "warmup-start-lr": settings.lr / 100,
        "end-lr": settings.lr / 100,
        "batch-size": settings.batch_size,
        "per-device-batch": settings.batch_size,
        "seed": seed,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    if not (out / "final.safetensors").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            finetune.main(words)


def decoded(folder: Path, number: int) -> Tensor:
    """Return the first clips of a folder as model input ``[N, T, 3, 32, 32]``."""
    dataset = VideoDataset(
        [(f"{index:04d}.mp4", index) for index in range(number)],
        folder,
        transform=transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        sampling=Sampling(num_frames=FRAMES, sampler="uniform"),
    )
    return torch.cat([video for video, _ in DataLoader(dataset, batch_size=64)])


def weights_along_lambda(
    averaged: dict[str, Tensor], lams: tuple[float, ...]
) -> Iterator[tuple[float, Any, Any]]:
    """Yield each λ with the model at this λ, and the tokenizer."""
    model, tokenizer = create_model()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    openvclip.expand_temporal_attention(model)
    for lam in lams:
        openvclip.interpolate_into(model, original, averaged, lam)
        yield lam, model, tokenizer


def measure_recall(run: Path, folder: Path, settings: Settings, measures: Measures) -> None:
    """Add the recalls of a run at each λ, for the clips of each split and their captions."""
    clips = all_clips(settings)
    videos = decoded(folder, len(clips))
    averaged = load_checkpoint(run / "averaged.safetensors")
    for lam, model, tokenizer in weights_along_lambda(averaged, settings.lams):
        with torch.no_grad():
            encoded = [openvclip.encode_video(model, part) for part in videos.split(64)]
            features = functional.normalize(torch.cat(encoded), dim=-1)
            texts = model.encode_text(tokenizer([c.caption for c in clips]), normalize=True)
        for split in SPLITS:
            rows = torch.tensor([clip.split == split for clip in clips])
            metrics = retrieval_metrics(texts[rows] @ features[rows].T)
            for direction in DIRECTIONS:
                for recall in RECALLS:
                    key = f"recall/{split}/{lam:g}/{direction}/{recall}"
                    _add(measures, key, metrics[direction][recall])


def measure_search(
    run: Path, folder: Path, settings: Settings, lam: float, seed: int, measures: Measures
) -> None:
    """Add the share of captions whose clip is the first result of an index, for each model."""
    clips = all_clips(settings)
    chosen = np.random.default_rng(seed).permutation(len(clips))[: settings.indexed].tolist()
    paths = [str((folder / f"{number:04d}.mp4").resolve()) for number in chosen]
    for name, clip in zip(MODELS, _searched_models(run, lam), strict=True):
        path = run.with_name(f"{run.name}-{MODELS.index(name)}.ovx")
        if path.exists():
            index = Index.open(path, clip)
        else:
            window = settings.frames / settings.fps
            index = Index.create(path, clip, windows=WindowOptions(seconds=window, step=window))
        index.add(paths, progress=False)  # goes on where an earlier call was stopped
        found = index.search([clips[number].caption for number in chosen], k=1)
        for split in ("all", *SPLITS):
            right = [
                bool(moments) and str(Path(moments[0].path).resolve()) == paths[place]
                for place, (number, moments) in enumerate(zip(chosen, found, strict=True))
                if split in ("all", clips[number].split)
            ]
            _add(measures, f"search/{name}/{split}/R1", 100 * sum(right) / len(right))
            measures[f"search/{split}/captions"] = [len(right)]


def _searched_models(run: Path, lam: float) -> Iterator[openvclip.VideoCLIP]:
    """Yield the models of :data:`MODELS`."""
    usage: dict[str, Any] = {
        "sampling": Sampling(num_frames=FRAMES, sampler="uniform"),
        "transform": transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD),
        "templates": ["{}"],
    }
    model, tokenizer = create_model()
    yield openvclip.VideoCLIP(model, tokenizer, **usage)
    averaged = load_checkpoint(run / "averaged.safetensors")
    for _, tuned, _ in weights_along_lambda(averaged, (0.0, lam)):
        yield openvclip.VideoCLIP(tuned, tokenizer, **usage)


def chosen_lambda(measures: Measures) -> float:
    """Return the λ with the best mean R@1 (text to video) on the development shapes."""
    return max(
        _lams(measures),
        key=lambda lam: float(np.mean(measures[f"recall/development/{lam:g}/text_to_video/R1"])),
    )


def _lams(measures: Measures) -> list[float]:
    """Return the values of λ that have been measured."""
    return [lam for lam in LAMBDAS if f"recall/unseen/{lam:g}/text_to_video/R1" in measures]


def _add(measures: Measures, name: str, value: float) -> None:
    measures.setdefault(name, []).append(round(value, 3))


# --- tables and figure -------------------------------------------------------------------------


def tables(measures: Measures) -> dict[str, str]:
    """Return the Markdown tables by name. Cells are in %, mean ± standard deviation over seeds."""
    return {"recall": _recall_table(measures), "search": _search_table(measures)}


def _recall_table(measures: Measures) -> str:
    columns = [("seen", DIRECTIONS[0], "R1"), ("development", DIRECTIONS[0], "R1")]
    columns += [("unseen", direction, recall) for direction in DIRECTIONS for recall in RECALLS]
    short = {"text_to_video": "T2V", "video_to_text": "V2T"}
    header = ["λ", *(f"{split}, {short[d]} R@{recall[1:]}" for split, d, recall in columns)]
    rows = []
    for lam in _lams(measures):
        keys = [f"recall/{split}/{lam:g}/{d}/{recall}" for split, d, recall in columns]
        rows.append([f"{lam:g}", *(_cell(measures[key]) for key in keys)])
    return markdown_table(header, rows)


def _search_table(measures: Measures) -> str:
    lam = chosen_lambda(measures)
    header = ["model", "all captions", "seen shapes", "development shapes", "unseen shapes"]
    rows = []
    for name in MODELS:
        cells = [_cell(measures[f"search/{name}/{split}/R1"]) for split in ("all", *SPLITS)]
        rows.append([f"{name} (λ = {lam:g})" if name == MODELS[2] else name, *cells])
    return markdown_table(header, rows)


def _cell(percentages: list[float]) -> str:
    return mean_and_std([value / 100 for value in percentages])


def draw(measures: Measures, path: Path) -> None:
    """Draw R@1 along λ, from text to video, for the seen and the unseen shapes."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for split in SPLITS:
        keys = [f"recall/{split}/{lam:g}/text_to_video/R1" for lam in _lams(measures)]
        heights = [np.mean(measures[key]) for key in keys]
        axes.plot(_lams(measures), heights, "o-", ms=4, label=f"{split} shapes")
    axes.set(xlabel="λ, the weight of the original CLIP", ylabel="text-to-video R@1 (%)")
    axes.set_title("The right clip among 512 for its caption")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def measure(settings: Settings, seeds: int, out: Path) -> Measures:
    """Train and evaluate all seeds, and return the numbers."""
    measures: Measures = defaultdict(list)
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)

    folders = [out / "retrieval" / f"seed-{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(folders):
        write_clips(folder / "train", clips_of("seen", settings), settings, seed)
        write_clips(folder / "test", all_clips(settings), settings, seed)
        fine_tune(folder / "train", folder / "run", settings, seed)
        measure_recall(folder / "run", folder / "test", settings, measures)
        tell(f"seed {seed}, training and recall")
    lam = chosen_lambda(measures)
    for seed, folder in enumerate(folders):
        measure_search(folder / "run", folder / "test", settings, lam, seed, measures)
        tell(f"seed {seed}, search")
    return measures


@command
def main(arguments: list[str] | None = None) -> None:
    """Measure all seeds, then write and print the tables."""
    args = read_arguments("retrieval", __doc__, arguments)
    settings = SMOKE if args.smoke else FULL
    measures = measure(settings, args.seeds, args.out)
    content = {"settings": asdict(settings), "seeds": args.seeds, "measures": measures}
    with atomic_path(args.out / "retrieval.json") as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    draw(measures, args.out / "retrieval.png")
    for name, table in tables(measures).items():
        print(f"\n{name} (%):\n\n{table}")
    print(f"\nwrote {args.out / 'retrieval.json'}, {args.out / 'retrieval.png'}")


if __name__ == "__main__":
    main()
