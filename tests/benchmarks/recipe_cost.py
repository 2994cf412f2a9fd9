"""Count the operations of the paper's recipe, and estimate its time on 8 GPUs.

    python -m tests.benchmarks.recipe_cost                    # the tables of docs/reproduce.md
    python -m tests.benchmarks.recipe_cost --measure ViT-B-32-quickgelu --clips 4
    python -m tests.benchmarks.recipe_cost --decode clip.mp4 another.mp4

The times on GPUs are estimates: the counted operations divided by an assumed fraction of the GPU's
peak. ``--measure`` times one step of the trainer on this machine and compares the time with the
count, and with the time of a plain matrix product. ``--decode`` times the reading of training
clips.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openvclip.evaluation import markdown_table

FRAMES, BATCH, EPOCHS, VIEWS = 8, 64, 22, 3
TRAIN_VIDEOS = 240_000
"""Of Kinetics-400's training list; about so many can still be had."""
TEST_VIDEOS = 13_320 + 5_100 + 10_000 + 19_900
"""UCF-101, HMDB-51, the 220 new classes of Kinetics-600, validation set of Kinetics-400; about."""

GPUS = 8
PEAKS = {"A100": 312e12, "H100": 989e12}
"""Dense bfloat16 operations a second, of the SXM modules, from the vendor's data sheets."""
SHARE = 0.35
"""The part of the peak that training is assumed to reach. Times are inversely proportional."""
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the clips for the second gradient, see ``--share`` of the trainer."""


@dataclass(frozen=True)
class Tower:
    """An image tower of CLIP, as far as its operations depend on it."""

    name: str
    layers: int
    width: int
    patch: int
    features: int
    pixels: int = 224

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.pixels // self.patch) ** 2 + 1

    def flops(self, window: int = 1) -> int:
        """Operations of a frame's forward pass, a multiplication and an addition counted as two.

        Those of the products of matrices; each query meets the keys of ``2 * window + 1`` frames.
        """
        tokens, width = self.tokens, self.width
        embedding = 2 * (tokens - 1) * 3 * self.patch**2 * width
        linear = 24 * tokens * width**2  # query, key, value: 6; output: 2; MLP: 16
        attention = 4 * tokens * (2 * window + 1) * tokens * width
        return embedding + self.layers * (linear + attention) + 2 * width * self.features


TOWERS = {
    "ViT-B-32-quickgelu": Tower("ViT-B/32", 12, 768, 32, 512),
    "ViT-B-16-quickgelu": Tower("ViT-B/16", 12, 768, 16, 512),
    "ViT-L-14-quickgelu": Tower("ViT-L/14", 24, 1024, 14, 768),
}


def step_flops(tower: Tower, clips: int = BATCH, passes: float = 2) -> int:
    """Operations of a training step: backward twice those of forward; ``passes`` 2 with IWR.

    With IWR on a share of the clips, ``passes`` is 1 plus the share.
    """
    return round(passes * 3 * clips * FRAMES) * tower.flops()


def steps() -> int:
    """Optimizer steps of a run."""
    return TRAIN_VIDEOS // BATCH * EPOCHS


def training_table() -> str:
    """Training with IWR: operations, hours on GPUs, and the clips to be read meanwhile."""
    header = ["", "GFLOP a frame", "TFLOP a step", "EFLOP a run"]
    header += [f"hours, {GPUS} {name}" for name in PEAKS]
    header += [f"clips/s, {GPUS} {name}" for name in PEAKS]
    rows = []
    for tower in TOWERS.values():
        step = step_flops(tower)
        seconds = [step / (GPUS * peak * SHARE) for peak in PEAKS.values()]
        row = [tower.name, f"{tower.flops() / 1e9:.1f}", f"{step / 1e12:.0f}"]
        row.append(f"{step * steps() / 1e18:.1f}")
        row += [f"{one * steps() / 3600:.1f}" for one in seconds]
        row += [f"{BATCH / one:.0f}" for one in seconds]
        rows.append(row)
    return markdown_table(header, rows)


def share_table() -> str:
    """Training with IWR on a share of the clips: hours on the last of :data:`PEAKS`."""
    name, peak = list(PEAKS.items())[-1]
    rows = []
    for tower in TOWERS.values():
        runs = [step_flops(tower, passes=1 + share) * steps() for share in SHARES]
        rows.append([tower.name, *(f"{run / (GPUS * peak * SHARE) / 3600:.1f}" for run in runs)])
    return markdown_table([f"hours, {GPUS} {name}", *(f"--share {s:g}" for s in SHARES)], rows)


def evaluation_table() -> str:
    """One model, or one lambda, on the test videos of all four data sets."""
    header = ["", "PFLOP", *(f"minutes, {GPUS} {name}" for name in PEAKS)]
    rows = []
    for tower in TOWERS.values():
        work = TEST_VIDEOS * VIEWS * FRAMES * tower.flops()
        minutes = [work / (GPUS * peak * SHARE) / 60 for peak in PEAKS.values()]
        rows.append([tower.name, f"{work / 1e15:.0f}", *(f"{one:.1f}" for one in minutes)])
    return markdown_table(header, rows)


def measure(model_name: str, clips: int, share: float) -> None:
    """Time a regularised step of the trainer here, and print what that means."""
    import open_clip
    import torch

    import openvclip
    from examples.finetune import train
    from openvclip.training.log import Step
    from openvclip.training.recipe import Recipe, Run
    from openvclip.weights.batch_part import part_size
    from tests.benchmarks.machine import machine

    torch.manual_seed(0)
    model = openvclip.expand_temporal_attention(open_clip.create_model(model_name))
    names = [f"class {number}" for number in range(clips)]
    tokenizer = open_clip.get_tokenizer(model_name)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, names, ["{}"])
    batch = (torch.randn(clips, FRAMES, 3, 224, 224), torch.arange(clips))
    found: list[Step] = []
    recipe = Recipe(epochs=2, warmup_epochs=1, average_after=0)
    train(classifier, [batch], 1, recipe, run=Run(share=share), on_step=found.append)
    seconds = found[-1].seconds  # the first step makes the optimizer's state
    passes = 1 + part_size(share, clips) / clips
    flops = step_flops(TOWERS[model_name], clips, passes)
    speed = flops / seconds
    product = _speed_of_a_product()
    print(f"{machine()}; {model_name}, one step of {clips} clips, float32\n")
    print(f"{seconds:.1f} s for {flops / 1e12:.2f} TFLOP: ", end="")
    print(f"{speed / 1e9:.0f} GFLOP/s, {speed / product:.0%} of a product's {product / 1e9:.0f}")
    whole = step_flops(TOWERS[model_name], passes=passes) * steps() / speed
    print(f"a run of {steps()} steps would take {whole / 86400:.0f} days here")


def _speed_of_a_product(size: int = 2048, rounds: int = 5) -> float:
    """Operations a second of a product of square matrices."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def decode(paths: list[Path]) -> None:
    """Time reading training clips on one core, and print how many cores the GPUs keep busy."""
    import torch

    from openvclip.video import read_clip, transforms
    from tests.benchmarks.machine import machine

    torch.set_num_threads(1)
    pixels = transforms.build("train")
    times = []
    for path in paths:
        start = time.perf_counter()
        pixels(read_clip(path, num_frames=FRAMES, sampling_rate=16, sampler="dense"))
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    print(f"{machine()}; {len(paths)} files, a training clip of each\n")
    hours = steps() * BATCH * median / 3600
    print(f"{1000 * median:.0f} ms a clip (median): {1 / median:.1f} clips/s on a core; ", end="")
    print(f"a run reads {steps() * BATCH:,} clips, {hours:.0f} hours of one core")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", choices=TOWERS, metavar="MODEL", help=", ".join(TOWERS))
    parser.add_argument("--clips", type=int, default=2, help="of the measured step (%(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the measured step")
    parser.add_argument("--decode", type=Path, nargs="+", metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the tables, or measure."""
    args = parse_arguments()
    if args.measure:
        measure(args.measure, args.clips, args.share)
    elif args.decode:
        decode(args.decode)
    else:
        print(f"{steps()} steps of {BATCH} clips; GPUs at {SHARE:.0%} of their peak (assumed)\n")
        print(
            f"{training_table()}\n\n{share_table()}\n\n{TEST_VIDEOS} test videos of {VIEWS} views\n"
        )
        print(evaluation_table())


if __name__ == "__main__":
    main()
