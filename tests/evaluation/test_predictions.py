"""The file of predictions: what is written is what comes back, and damage is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from openvclip import cli
from openvclip.checkpoints import load_checkpoint
from openvclip.errors import RecordsError
from openvclip.evaluation import NO_RANK, read_predictions, write_predictions
from openvclip.video.protocols import Split
from tests.evaluation.small_results import result_of, splits_of
from tests.evaluation.test_runner import slow_logits
from tests.world import World


@settings(max_examples=15, deadline=None)
@given(
    lams=st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True),
    classes=st.integers(4, 9),
    several=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    lams: list[float],
    classes: int,
    several: bool,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    splits = splits_of(classes, several=several)
    result = result_of(lams, splits, seed=seed, broken=[1], videos="/v")
    assert write_predictions(path, result)
    content = read_predictions(path)
    assert (content.lams, content.videos) == (tuple(lams), "/v")
    for number, (split, stored) in enumerate(zip(splits, content.splits, strict=True)):
        assert (stored.name, stored.protocol) == (split.name, split.protocol)
        assert stored.class_names == split.class_names
        assert list(zip(stored.paths, stored.targets.tolist(), strict=True)) == split.samples
        for i, lam in enumerate(lams):
            score = result.scores[lam][number]
            assert score.answers is not None
            assert torch.equal(stored.ranks[i], score.evaluation.ranks)
            assert torch.equal(stored.labels[i], score.answers.labels)
            torch.testing.assert_close(
                stored.scores[i], score.answers.scores, rtol=1e-3, atol=1e-4, equal_nan=True
            )
            assert stored.ranks[i, 1] == NO_RANK
            assert stored.labels[i, 1].tolist() == [-1] * min(5, len(split.class_names))


def test_the_command_keeps_what_a_slow_evaluation_answers(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--checkpoint", str(world.tuned), "--lam", "0"]
    assert cli.main([*world.evaluate_flags(out), *flags]) == 0
    names = (world.folder / "classes.txt").read_text().splitlines()
    split = Split("seen_test", names, world.samples)
    expected = slow_logits(world, split, load_checkpoint(world.tuned))
    content = read_predictions(out / "predictions.safetensors")
    (stored,) = content.splits
    assert content.videos == str(world.folder)
    assert stored.paths == [path for path, _ in world.samples]
    best = expected.sort(dim=1, descending=True)
    assert torch.equal(stored.labels[0], best.indices[:, :5])
    # The logits of a view are cosines times the scale; two views are summed.
    scale = float(load_checkpoint(world.tuned)["logit_scale"].exp())
    cosines = (best.values[:, :5] / 2 / scale).float()
    torch.testing.assert_close(stored.scores[0], cosines, rtol=2e-3, atol=1e-3)
    mode = (out / "results.json").stat().st_mode
    assert (out / "predictions.safetensors").stat().st_mode == mode


def test_scores_without_answers_write_no_file(tmp_path: Path) -> None:
    result = result_of([0.0], splits_of())
    result.scores[0.0][0] = replace(result.scores[0.0][0], answers=None)
    assert not write_predictions(tmp_path / "p.safetensors", result)
    assert not (tmp_path / "p.safetensors").exists()


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_predictions(path, result_of([0.0], splits_of()))
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    # Older versions of safetensors map the file into memory, and the file changes below.
    tensors = {name: value.clone() for name, value in load_file(path).items()}

    def failure() -> str:
        with pytest.raises(RecordsError) as caught:
            read_predictions(path)
        return str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    assert "Remove it, and run the same 'openvclip evaluate' again" in failure()
    for wrong, text in (
        ({"version": "2"}, "has version 2; this openvclip reads version 1"),
        ({"format": "pt"}, "no file of predictions: its metadata has the format 'pt'"),
        ({"about": "{"}, "can't be read"),
        ({"about": json.dumps({"lams": [0.0]})}, "can't be read"),
    ):
        save_file(tensors, path, {**metadata, **wrong})
        assert text in failure()
    save_file({**tensors, "0.labels": tensors["0.labels"][:, 1:]}, path, metadata)
    assert "shapes that do not fit" in failure()
    save_file({**tensors, "0.labels": tensors["0.labels"][:, :, 0].clone()}, path, metadata)
    assert "shapes that do not fit" in failure()
    for name, by in (("labels", 9), ("labels", -9), ("targets", 9), ("targets", -1)):
        save_file({**tensors, f"0.{name}": tensors[f"0.{name}"] + by}, path, metadata)
        assert "not below 4" in failure(), (name, by)
    for by in (-1, 99):
        save_file({**tensors, "0.videos": tensors["0.videos"] + by}, path, metadata)
        assert "can't be read" in failure(), by
    path.unlink()
    assert "can't be read" in failure()
