"""``open_vclip.py``: the videos that it reads, and the model that it saves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import openvclip
from examples import open_vclip
from tests.examples.single_files import CLASSES, FRAMES, OTHERS
from tests.examples.tiny_videos import model_flags
from tests.helpers import assert_same_state, same_bits


def test_every_class_with_two_videos_has_one_that_is_held_out() -> None:
    counts = {0: 1, 1: 2, 2: 5, 3: 11}
    samples = [(f"{label}-{i}", label) for label, count in counts.items() for i in range(count)]
    train, held_out = open_vclip.hold_out(samples)
    assert sorted(train + held_out) == sorted(samples)
    assert Counter(label for _, label in held_out) == {1: 1, 2: 1, 3: 2}
    with pytest.raises(openvclip.OpenVCLIPError, match="Each class has one video"):
        open_vclip.hold_out([("a", 0), ("b", 1)])


def test_videos_come_from_subfolders_or_from_a_list(clips: Path, tmp_path: Path) -> None:
    samples, names = open_vclip.read_videos(clips / "closed", None)
    assert names == sorted(CLASSES)
    assert all(Path(path).parts[0] == names[label] for path, label in samples)
    listed, listed_names = open_vclip.read_videos(clips, clips / "closed.csv")
    assert listed_names == names
    assert {(Path(path).name, label) for path, label in listed} == {
        (Path(path).name, label) for path, label in samples
    }
    with pytest.raises(SystemExit, match=r"open_vclip\.py: error: .*no class names"):
        open_vclip.main(["--videos", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_saved_model_is_the_interpolation_and_keeps_the_text_tower(
    clips: Path, tmp_path: Path, original: dict[str, Tensor]
) -> None:
    """At λ = 1 the file is the original CLIP; at λ = 0.5 it is half way to the file of λ = 0."""
    saved = {}
    for lam in ("0", "0.5", "1"):
        out = tmp_path / lam
        options = [*model_flags(), *FRAMES, "--videos", str(clips), "--out", str(out)]
        options += ["--annotations", str(clips / "zero.csv"), "--epochs", "1", "--lr", "1e-3"]
        open_vclip.main([*options, "--lam", lam])
        saved[lam] = openvclip.load_checkpoint(out / "open_clip_model.safetensors")
        assert (out / "classes.txt").read_text().splitlines() == sorted(OTHERS)
    assert_same_state({name: saved["1"][name] for name in original}, original)
    model = openvclip.VideoCLIP.from_pretrained(tmp_path / "0.5")
    loaded = model.model.state_dict()
    assert all(same_bits(loaded[name], saved["0.5"][name]) for name in original)
    frames = int(FRAMES[FRAMES.index("--frames") + 1])
    assert (model.sampling.num_frames, model.contract.lam) == (frames, 0.5)
    assert model.expansion is not None
    moved = {name for name in original if not same_bits(saved["0"][name], original[name])}
    assert moved
    assert all(name.startswith("visual.") or name == "logit_scale" for name in moved)
    for name in moved:
        middle = (saved["0"][name].double() + original[name].double()) / 2
        torch.testing.assert_close(saved["0.5"][name].double(), middle, atol=1e-6, rtol=1e-5)
