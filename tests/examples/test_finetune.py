"""The trainer: recipe, methods, and a run from the command line on files."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import openvclip
from examples import finetune
from examples.finetune import Recipe, learning_rate, train
from openvclip.checkpoints import load_checkpoint
from tests.helpers import SHARED, random_video, tiny_clip, tiny_tokenizer

NAMES = ["one", "two", "three"]
TINY = Recipe(
    epochs=3, warmup_epochs=1, average_after=1, lr=1e-2, end_lr=1e-4, batch_size=2, seed=3
)


def _batches() -> list[tuple[Tensor, Tensor]]:
    return [(random_video(2, 3, seed), torch.tensor([seed, 2])) for seed in range(2)]


def _classifier() -> openvclip.ZeroShotClassifier:
    model = openvclip.expand_temporal_attention(tiny_clip())
    return openvclip.ZeroShotClassifier(model, tiny_tokenizer, NAMES, ["{}"])


def _reference(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Algorithm 1 written out in plain code: last weights and their average."""
    classifier = _classifier()
    model = classifier.model
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    names = [n for n, _ in model.named_parameters() if n.startswith("visual") or n == "logit_scale"]
    parameters = dict(model.named_parameters())
    trained = [parameters[n] for n in names]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0},
        ],
        betas=(0.9, 0.999),
    )
    alphas = torch.Generator().manual_seed(recipe.seed)
    batches = _batches() * recipe.epochs
    kept: list[dict[str, Tensor]] = []
    for step, (video, label) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, 2, len(batches), recipe)
        loss = functional.cross_entropy(classifier(video), label)
        if recipe.method == "l2":
            drift = sum(((parameters[n] - clip[n]) ** 2).sum() for n in names)
            loss = loss + recipe.l2_weight * drift
        total = list(torch.autograd.grad(loss, trained))
        if recipe.method in ("iwr", "openvclip"):
            alpha = 0.6 * float(torch.rand((), generator=alphas, dtype=torch.float64))
            here = [p.detach().clone() for p in trained]
            with torch.no_grad():
                for n, p in zip(names, trained, strict=True):
                    p.copy_(alpha * clip[n] + (1 - alpha) * p)
            there = torch.autograd.grad(functional.cross_entropy(classifier(video), label), trained)
            with torch.no_grad():
                for p, old in zip(trained, here, strict=True):
                    p.copy_(old)
            total = [a + recipe.iwr_weight * b for a, b in zip(total, there, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in total))
        for p, g in zip(trained, total, strict=True):
            p.grad = g * min(1.0, recipe.clip_grad_norm / (norm + 1e-6))
        optimizer.step()
        if step > 2 and (step - 2) % 2 == 0:
            kept.append({n: v.clone() for n, v in model.state_dict().items()})
    mean = {n: torch.stack([k[n].double() for k in kept]).mean(0) for n in kept[0]}
    return dict(model.state_dict()), mean


@pytest.mark.parametrize("method", finetune.METHODS)
def test_each_method_equals_algorithm_1_written_out(method: str) -> None:
    recipe = dataclasses.replace(TINY, method=method)
    classifier, batches = _classifier(), _batches()
    before = {n: v.clone() for n, v in classifier.model.state_dict().items()}
    clip, swa = train(classifier, batches, len(batches), recipe)
    last, mean = _reference(recipe)
    for name, value in classifier.model.state_dict().items():
        torch.testing.assert_close(value, last[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(clip[name], before[name])
    assert (swa is not None) == (method in ("swa", "openvclip"))
    if swa is not None:
        assert swa.n_averaged == 2
        for name, value in swa.averaged_state_dict().items():
            torch.testing.assert_close(value.double(), mean[name], rtol=1e-4, atol=1e-5)


def test_only_the_image_tower_and_the_scale_are_trained() -> None:
    classifier, batches = _classifier(), _batches()
    clip, _ = train(classifier, batches, len(batches), TINY)
    changed = {n for n, v in classifier.model.state_dict().items() if not torch.equal(v, clip[n])}
    assert "logit_scale" in changed
    assert all(name.startswith("visual.") or name == "logit_scale" for name in changed)
    assert len(changed) == 1 + sum(1 for n in clip if n.startswith("visual."))


def test_learning_rate_has_the_recipes_landmarks() -> None:
    recipe = Recipe()
    rates = [learning_rate(step, 20, 220, recipe) for step in range(220)]
    assert rates[0] == pytest.approx(3.33e-8)
    assert max(rates) == rates[20] == pytest.approx(3.33e-6)
    assert rates[-1] == pytest.approx(3.33e-8)
    assert rates[10] == pytest.approx((3.33e-6 + 3.33e-8) / 2)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_final_weights_interpolate_the_average_with_clip() -> None:
    classifier, batches = _classifier(), _batches()
    clip, swa = train(classifier, batches, len(batches), TINY)
    assert swa is not None
    final = finetune.final_weights(classifier.model, clip, swa, 0.25)
    for name, mean in swa.averaged_state_dict().items():
        expected = 0.25 * clip[name].double() + 0.75 * mean.double()
        torch.testing.assert_close(final[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step() -> None:
    classifier, batches = _classifier(), _batches()
    batches[1] = (torch.full_like(batches[1][0], float("nan")), batches[1][1])
    with pytest.raises(FloatingPointError, match="at step 2"):
        train(classifier, batches, 2, dataclasses.replace(TINY, method="finetune"))


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of openvclip, finetune"):
        Recipe(method="sgd")


def test_half_precision_training_stays_finite() -> None:
    classifier, batches = _classifier(), _batches()
    train(classifier, batches, 2, TINY, amp=torch.bfloat16)
    assert all(bool(v.isfinite().all()) for v in classifier.model.state_dict().values())


def test_command_line_trains_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.shapes.clips import write_clip
    from examples.shapes.model import WEIGHTS, create_model

    rng = np.random.default_rng(0)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        for index in range(4):
            video = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
            write_clip(tmp_path / f"{index}.mp4", video)
            csv.writer(file).writerow([f"{index}.mp4", index % 2])
    (tmp_path / "classes.txt").write_text("star sliding\nheart resting\n")
    create_model(None)  # registers the configuration with open_clip
    out = tmp_path / "run"
    finetune.main(
        f"--model shapes-clip --pretrained {WEIGHTS} --annotations {tmp_path / 'train.csv'} "
        f"--root {tmp_path} --classes {tmp_path / 'classes.txt'} --out {out} --device cpu "
        "--workers 0 --epochs 2 --warmup-epochs 1 --average-after 1 --batch-size 2 "
        "--sampling-rate 4 --lr 1e-4 "
        "--lam 0.25".split()
    )
    assert "final.safetensors" in capsys.readouterr().out
    clip = create_model(WEIGHTS)[0].state_dict()
    average, final = (load_checkpoint(out / f"{n}.safetensors") for n in ("averaged", "final"))
    for name, value in final.items():
        torch.testing.assert_close(value, 0.25 * clip[name] + 0.75 * average[name])
    assert any(not torch.equal(average[name], clip[name]) for name in clip)


def test_help_names_every_field_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in text


def test_defaults_are_the_papers() -> None:
    import json

    facts = SHARED / "facts" / "facts.json"
    if not facts.exists():
        pytest.skip("no ../shared/facts")
    paper, recipe = json.loads(facts.read_text())["training"], Recipe()
    assert recipe.epochs == paper["epochs"]
    assert recipe.warmup_epochs == recipe.average_after == paper["warmup_epochs"]
    assert (recipe.lr, recipe.end_lr) == (paper["lr"], paper["final_lr"])
    assert recipe.weight_decay == paper["weight_decay"]
    assert recipe.clip_grad_norm == paper["clip_grad_norm"]
    assert recipe.batch_size == paper["global_batch"]
    assert [0.0, recipe.alpha_max] == paper["iwr_interval"]
    assert recipe.iwr_weight == paper["iwr_C"]
    assert recipe.lam == paper["interpolation_lambda_weights_CLIP"]["ViT-B/16"]
