"""Damaged files give frames or one of our errors, in bounded time, and the process lives on."""

from __future__ import annotations

import random
import time

import pytest
import torch

from openvclip.errors import VideoError
from openvclip.video import read_clip

SEEDS = 34  # for each of four containers
SECONDS = 5.0


@pytest.fixture(scope="module")
def originals(encode):
    options = {"x264-params": "bframes=2:keyint=10"}
    return [
        encode("fuzz.mp4", options=options, container_options={"movflags": "faststart"}),
        encode("fuzz.mkv", options=options),
        encode("fuzz.avi", codec="mpeg4", options={"g": "10"}),
        encode("fuzz.gif", codec="gif", pixel_format="gray", fps=25),
    ]


def damage(data: bytes, kind: int, rng: random.Random) -> bytes:
    """Truncates, flips bits (anywhere, or in the header), cuts out or joins."""
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
        changed += data[rng.randrange(len(data)) :]
    return bytes(changed)


def outcome(path, sampler):
    try:
        clip = read_clip(path, views=2, num_frames=4, sampler=sampler)
    except VideoError as error:
        return str(error)
    return clip


def test_damaged_files(originals, tmp_path):
    rng = random.Random(0)
    errors, slowest = 0, 0.0
    for seed in range(SEEDS):
        for original in originals:
            path = tmp_path / f"damaged{original.suffix}"
            path.write_bytes(damage(original.read_bytes(), seed % 5, rng))
            begin = time.perf_counter()
            found = outcome(path, ("released", "uniform", "dense")[seed % 3])
            slowest = max(slowest, time.perf_counter() - begin)
            if isinstance(found, str):
                assert path.name in found
                errors += 1
            else:
                assert found.shape[:3] == (2, 4, 3)
                assert found.dtype == torch.uint8
    assert slowest < SECONDS
    assert 20 < errors < 4 * SEEDS - 20  # both ways out were taken
