"""The data set of the shapes world: H.264 files and annotation lists.

``python -m examples.shapes.clips OUT`` writes ``OUT/videos/<class name>/<n>.mp4`` and four lists in
``OUT``: ``train.csv`` and ``seen_test.csv`` (classes of the seen shapes), ``development.csv`` and
``unseen.csv``. A line of a list is ``path,class index``. The path is relative to ``OUT``. The class
index refers to :func:`examples.shapes.world.class_names` of the split.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from examples.shapes.drawing import draw_video
from examples.shapes.raster import IMAGE_SIZE
from examples.shapes.world import COLOURS, Split, class_names
from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command

__all__ = [
    "CLIP_SIZE",
    "LISTS",
    "ClipSettings",
    "draw_clip",
    "make_clips",
    "missing_clips",
    "write_clip",
]

#: The split of each annotation list.
LISTS: dict[str, Split] = {
    "train": "seen",
    "seen_test": "seen",
    "development": "development",
    "unseen": "unseen",
}

#: Height and width of the videos, in pixels: twice the drawn size, so that 4:2:0 chroma has one
#: sample for each drawn pixel.
CLIP_SIZE = 2 * IMAGE_SIZE

_SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class ClipSettings:
    """The settings of the data set; the same settings give the same clips.

    Attributes:
        train: number of clips for fine-tuning.
        test: number of clips in each of the other three lists.
        frames: frames of a clip.
        fps: frame rate, in frames per second.
        crf: quality of the H.264 encoding, 0 (lossless) to 51.
        seed: seed of all random numbers.
    """

    train: int = 1024
    test: int = 512
    frames: int = 16
    fps: int = 8
    crf: int = 23
    seed: int = 0

    def count(self, name: str) -> int:
        """Return the number of clips in a list."""
        return self.train if name == "train" else self.test


@dataclass(frozen=True)
class _Clip:
    """A clip to write: its list, its index in the list, its class index and its file."""

    list_name: str
    index: int
    class_index: int
    path: Path


def make_clips(
    out: str | os.PathLike[str],
    settings: ClipSettings | None = None,
    *,
    num_workers: int = 2,
    progress: bool = True,
    on_written: Callable[[int, float], object] | None = None,
) -> dict[str, Path]:
    """Write the data set, or the missing part of it.

    Every file is written under a temporary name and renamed when it is complete. The lists are
    written last. If a call was interrupted, the next call writes the missing files. If all clips
    exist, a call draws nothing and writes only the lists.

    Args:
        out: folder to write to. It is created if it does not exist.
        settings: size and seed of the data set.
        num_workers: number of processes; 1 draws in this process.
        progress: whether to show a progress bar.
        on_written: function that takes the number of clips of each finished batch, and the seconds
            that a process needed for the batch.

    Returns:
        The annotation lists, by name: ``train``, ``seen_test``, ``development``, ``unseen``.

    Raises:
        FileExistsError: the folder contains clips that were made with other settings.
    """
    out, settings = Path(out), settings or ClipSettings()
    _claim(out, settings)
    planned = {name: list(_plan(out, name, settings)) for name in LISTS}
    missing = [clip for clips in planned.values() for clip in clips if not clip.path.exists()]
    for folder in {clip.path.parent for clip in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=len(missing),
        desc="writing clips",
        unit="clip",
        disable=None if progress and missing else True,
    ) as bar:
        for count, seconds in _write_all(missing, settings, num_workers):
            bar.update(count)
            if on_written is not None:
                on_written(count, seconds)
    return {name: _write_list(out / f"{name}.csv", clips) for name, clips in planned.items()}


def missing_clips(out: str | os.PathLike[str], settings: ClipSettings) -> int:
    """Return the number of clips that :func:`make_clips` has to write."""
    return sum(
        not clip.path.exists() for name in LISTS for clip in _plan(Path(out), name, settings)
    )


def draw_clip(name: str, index: int, settings: ClipSettings) -> NDArray[np.uint8]:
    """Draw clip ``index`` of a list without compression, ``[frames, 32, 32, 3]``."""
    names = class_names(LISTS[name])
    shape, action = names[index % len(names)].rsplit(" ", 1)
    rng = np.random.default_rng([settings.seed, list(LISTS).index(name), index])
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return draw_video(shape, colour, action, rng, frames=settings.frames)


def write_clip(
    path: str | os.PathLike[str], video: NDArray[np.uint8], *, fps: int = 8, crf: int = 23
) -> None:
    """Write a video as an H.264 file in MP4 with 4:2:0 colour, at twice its height and width.

    The file is written under a temporary name and renamed when it is complete.
    """
    import av

    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.mp4")
    large = video.repeat(2, axis=1).repeat(2, axis=2)
    try:
        with av.open(os.path.abspath(partial), "w") as container:
            # With several threads or with macroblock trees, x264 sometimes encodes the same frames
            # to different bytes.
            options = {"preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
            options["crf"] = str(crf)
            stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
            stream.height, stream.width = large.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for pixels in large:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _claim(out: Path, settings: ClipSettings) -> None:
    """Write the settings file. If the file exists, check that its settings are the same."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / _SETTINGS_FILE
    if note.exists():
        saved = json.loads(note.read_text(encoding="utf-8"))
        if saved != asdict(settings):
            raise FileExistsError(
                f"{out} holds clips made with {saved}, but the settings of this call are "
                f"{asdict(settings)}. Choose another folder, or remove the folder."
            )
        return
    with atomic_path(note) as partial:
        partial.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def _plan(out: Path, name: str, settings: ClipSettings) -> Iterator[_Clip]:
    names = class_names(LISTS[name])
    for index in range(settings.count(name)):
        class_index = index % len(names)
        file = f"{name}-{index // len(names):04d}.mp4"
        yield _Clip(name, index, class_index, out / "videos" / names[class_index] / file)


def _write_all(
    clips: list[_Clip], settings: ClipSettings, num_workers: int
) -> Iterator[tuple[int, float]]:
    """Write clips; yield the number of clips of each batch and the seconds that it took."""
    batches = [clips[start : start + 16] for start in range(0, len(clips), 16)]
    if num_workers <= 1 or len(batches) <= 1:
        for batch in batches:
            yield _write_batch(batch, settings)
        return
    # Spawned, not forked: a fork of a process that has run torch can hang in its thread pool.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write_batch, batches, [settings] * len(batches))


def _write_batch(clips: list[_Clip], settings: ClipSettings) -> tuple[int, float]:
    started = time.perf_counter()
    for clip in clips:
        write_clip(
            clip.path,
            draw_clip(clip.list_name, clip.index, settings),
            fps=settings.fps,
            crf=settings.crf,
        )
    return len(clips), time.perf_counter() - started


def _write_list(path: Path, clips: list[_Clip]) -> Path:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(
            (clip.path.relative_to(path.parent).as_posix(), clip.class_index) for clip in clips
        )
    return path


@command
def main(argv: list[str] | None = None) -> None:
    """Write the data set and print the paths of its lists."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    defaults = ClipSettings()
    for name, default in asdict(defaults).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument(
        "--num-workers", type=int, default=2, help="number of processes (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    settings = ClipSettings(**{name: getattr(args, name) for name in asdict(defaults)})
    for name, path in make_clips(args.out, settings, num_workers=args.num_workers).items():
        print(f"{name}: {settings.count(name)} clips in {path}")


if __name__ == "__main__":
    main()
