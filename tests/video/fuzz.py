"""Read damaged copies of the files on the command line; runs in a separate process.

``python -m tests.video.fuzz FOLDER COUNT ORIGINAL...`` prints one JSON line for each file before it
is read, and one with what came of it.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from pathlib import Path

import torch

from openvclip.errors import VideoError
from openvclip.video import read_clip
from openvclip.video.sampling import BACKENDS

SECONDS = 10.0  # processor time for one file; a file usually needs a few milliseconds
MEMORY = 2**30  # bytes of address space in addition to the use after the whole files were read


def damaged(data: bytes, other: bytes, kind: int, rng: random.Random) -> bytes:
    """Truncate, flip bits (anywhere or in the header), cut out a part, or append another file."""
    changed = bytearray(data)
    if kind == 0:
        return data[: rng.randrange(1, len(data))]
    if kind == 1:
        for _ in range(rng.randrange(1, 40)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(rng.randrange(1, 8)):
            changed[rng.randrange(min(800, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        start = rng.randrange(len(data))
        del changed[start : start + rng.randrange(1, len(data))]
    else:
        changed += other[rng.randrange(len(other)) :]
    return bytes(changed)


def outcome(path: Path, sampler: str, backend: str) -> str:
    try:
        clip = read_clip(path, views=2, num_frames=4, sampler=sampler, backend=backend)
    except VideoError as error:
        return "error" if path.name in str(error) else f"names no file: {error}"
    assert clip.dtype == torch.uint8
    assert clip.shape[:3] == (2, 4, 3)
    return "frames"


def main(folder: Path, count: int, backend: str, originals: list[Path]) -> None:
    for path in originals:  # the first files also load libraries, whose memory must not count
        outcome(path, "released", backend)
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + MEMORY, memory + MEMORY))
    rng = random.Random(0)
    contents = [path.read_bytes() for path in originals]
    for number in range(count):
        which = number % len(originals)
        path = folder / f"damaged-{number}{originals[which].suffix}"
        kind = number // len(originals) % 5
        path.write_bytes(damaged(contents[which], rng.choice(contents), kind, rng))
        print(json.dumps({"file": path.name, "kind": kind}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
        found = outcome(path, ("released", "uniform", "dense")[number % 3], backend)
        signal.setitimer(signal.ITIMER_PROF, 0)
        path.unlink()
        print(json.dumps({"outcome": found}), flush=True)


if __name__ == "__main__":
    assert sys.argv[3] in BACKENDS
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], [Path(name) for name in sys.argv[4:]])
