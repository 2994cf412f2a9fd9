"""The comparison of methods in the shapes world: data and training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

from examples import finetune
from examples.shapes import comparison_methods
from examples.shapes.comparison_methods import Run
from examples.shapes.comparison_settings import (
    METHODS,
    RATES,
    SMOKE,
    Family,
    Setting,
    Training,
    base_and_novel,
)
from examples.shapes.model import create_model
from examples.shapes.world import class_names
from openvclip.training.recipe import Recipe


def _clips(per_class: int, classes: int = 64, frames: int = 8) -> TensorDataset:
    """A noisy picture for each class; labels as in the lists: every class once, then again."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(classes).repeat(per_class)
    pictures = torch.randn(classes, 1, 3, 4, 4, generator=generator).repeat_interleave(8, dim=-1)
    noise = torch.randn(len(label), frames, 3, 32, 32, generator=generator)
    return TensorDataset(pictures.repeat_interleave(8, dim=-2)[label] + 0.3 * noise, label)


@pytest.fixture(scope="module")
def data() -> dict[str, TensorDataset]:
    tests = _clips(2)
    return dict.fromkeys(("train", "seen_test", "development", "unseen"), tests)


@pytest.fixture(scope="module", autouse=True)
def cheap_models() -> Iterator[None]:
    """Copies of one model in place of half a second for each."""
    model, tokenizer = create_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_methods, "create_model", lambda: (deepcopy(model), tokenizer))
        yield


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    return create_model()[0].state_dict()


# What is learned from


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(4, 9), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_shots_are_balanced_and_nested(counts: list[int], seed: int, order: Any) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order.shuffle(labels)
    drawn = {n: comparison_methods.draw_shots(torch.tensor(labels), n, seed) for n in (1, 2, 4)}
    for shots, chosen in drawn.items():
        drawn_labels = [labels[index] for index in chosen.tolist()]
        assert all(drawn_labels.count(label) == shots for label in range(len(counts)))
        assert len(set(chosen.tolist())) == shots * len(counts)
    assert set(drawn[1].tolist()) < set(drawn[2].tolist()) < set(drawn[4].tolist())


def test_shots_are_drawn_by_the_seed() -> None:
    labels = torch.arange(64).repeat(16)
    draws = [comparison_methods.draw_shots(labels, 4, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert comparison_methods.draw_shots(labels, None, 0).tolist() == list(range(len(labels)))
    with pytest.raises(ValueError, match="Class 0 has 16 clips, fewer than 17 shots"):
        comparison_methods.draw_shots(labels, 17, 0)


def test_base_and_novel_classes_are_the_seen_ones_divided_by_shape() -> None:
    base, novel = base_and_novel()
    assert not set(base) & set(novel)
    assert set(base) | set(novel) == set(class_names("seen"))
    assert {name.split()[0] for name in novel} == {"arrow", "bottle", "flower", "heart"}
    assert len(base) == len(novel) == 32


def test_clips_of_a_half_keep_their_class() -> None:
    clips = _clips(2, frames=1)
    names = class_names("seen")
    for half in base_and_novel():
        _, of_half = comparison_methods.of_classes(clips, half)
        expected = [
            (video, half.index(names[label]))
            for video, label in zip(clips.tensors[0], clips.tensors[1].tolist(), strict=True)
            if names[label] in half
        ]
        torch.testing.assert_close(of_half.tensors[0], torch.stack([v for v, _ in expected]))
        assert of_half.tensors[1].tolist() == [label for _, label in expected]


def test_every_method_sees_the_same_batches(
    data: dict[str, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def fit(
        classifier: Any, trained: Any, batches: Iterator[Any], steps: int, *_: Any, **__: Any
    ) -> None:
        seen.extend(next(batches)[0] for _ in range(steps))

    monkeypatch.setattr(comparison_methods, "fit", fit)
    setting = Setting(6, ("base",), shots=1, base=True)
    batches = []
    for name in ("FINE-TUNE", "bridge and prompt", "Vita-CLIP"):
        seen.clear()
        Run(METHODS[name], setting, SMOKE, 3, data).learn()
        batches.append(torch.stack(seen))
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    assert len(batches[0]) == 6
    assert not torch.equal(batches[0][:2], batches[0][2:4])  # 32 clips are 2 batches; then anew


# Training


@pytest.mark.parametrize("name", ["FINE-TUNE", "Open-VCLIP", "ViFi-CLIP"])
def test_training_is_that_of_the_trainer(name: str, clip: dict[str, Tensor]) -> None:
    """Where the trainer knows a method, the comparison's loop comes to the same weights."""
    method, clips = METHODS[name], _clips(1, classes=16, frames=4)
    batches = [clips[torch.arange(i, 16, 4)] for i in range(4)]
    known = {"FINE-TUNE": "finetune", "Open-VCLIP": "openvclip", "ViFi-CLIP": "vifi"}[name]
    recipe = Recipe(
        method=known,
        epochs=2,
        warmup_epochs=0,
        lr=1e-3,
        end_lr=1e-5,
        average_after=1,
        averages_per_epoch=2,
        seed=3,
    )
    states = []
    for by_trainer in (True, False):
        model, tokenizer = comparison_methods.create_model()
        trained = comparison_methods.prepare(model, method)
        names = class_names("seen")[:16]
        classifier = comparison_methods.make_classifier(model, tokenizer, names, method)
        if by_trainer:
            loader = _Epochs([batches[:2], batches[2:]])
            _, swa = finetune.train(classifier, loader, 2, recipe)
        else:
            swa = comparison_methods.fit(
                classifier, trained, iter(batches), 4, recipe, method.regularised, lambda *_: None
            )
        states.append(model.state_dict() if swa is None else swa.averaged_state_dict())
    moved, other = (torch.cat([(s[k] - clip[k]).flatten() for k in clip]) for s in states)
    # Adam's steps have the sign of the gradient, which rounding may flip where it is almost zero.
    assert (moved - other).norm() < 1e-2 * moved.norm()
    assert moved.count_nonzero() > 300_000


class _Epochs:
    """A loader that gives other batches in each epoch."""

    def __init__(self, epochs: list[list[Any]]) -> None:
        self.epochs = iter(epochs)

    def __iter__(self) -> Iterator[Any]:
        return iter(next(self.epochs))


def _vita_sizes() -> dict[str, int]:
    """Sizes of Vita-CLIP's parts by hand: 4 layers of width 96, 8 frames, text of width 64."""
    projection = 4 * (96 * 96 + 96)
    attention = 4 * (2 * 96 + 4 * (96 * 96 + 96))
    return {
        "global_prompts": 4 * 8 * 96,
        "local_prompts": 4 * 8 * 96 + projection,
        "summary_prompt": projection + attention,
        "time_embedding": 8 * 96,
        "text_prompts": 8 * 64,
        "all": 2 * 4 * 8 * 96 + projection + attention + 8 * 96 + 8 * 64,
    }


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_trains_its_own_part_and_no_other(
    name: str, data: dict[str, TensorDataset], clip: dict[str, Tensor]
) -> None:
    method, steps = METHODS[name], replace(SMOKE, training=Training(batch_size=4))
    run = Run(method, Setting(2, ("seen",), shots=1), steps, 0, data)
    run.learn()
    now = run.model.state_dict()
    changed = {key for key in clip if not torch.equal(clip[key], now[key])}
    image = {key for key in clip if key.startswith("visual.")}
    # As the trainer and the releases have it: the token embedding stays.
    text = {k for k in clip if not k.startswith(("visual.", "token_embedding", "logit", "attn"))}
    scale = {"logit_scale"} if method.expanded or method.train == "both" else set()
    own = {None: set(), "image": image, "text": text, "both": image | text}[method.train]
    own |= scale if method.train else set()
    assert changed <= own
    assert len(changed) >= 0.9 * len(own)
    expected = [sum(clip[key].numel() for key in own)] if own else []
    if method.bridged:
        expected.append(4 * 8 * 96 + 3 * 8 * 64)
    if method.vita is not None:
        parts = [part for part, value in method.vita.items() if value]
        expected = [_vita_sizes()["all" if len(parts) > 1 else parts[0]]]
    assert run.trained == expected
    alive = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert method.family is None or alive == expected[-1]


def test_a_loss_that_is_not_finite_ends_the_run(data: dict[str, TensorDataset]) -> None:
    video, label = data["train"].tensors
    broken = {**data, "train": TensorDataset(video * math.nan, label)}
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        Run(METHODS["FINE-TUNE"], Setting(1, ("seen",)), SMOKE, 0, broken).learn()


def test_accuracies_along_lambda_begin_at_the_learned_weights_and_lead_to_clip(
    data: dict[str, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the learned model says as the labels, against CLIP itself."""
    monkeypatch.setattr(comparison_methods, "LAMBDAS", (0.0, 1.0))
    method, names = METHODS["FINE-TUNE"], class_names("seen")
    rates: dict[Family, float] = {**RATES, "fine-tune": 2e-2}
    run = Run(method, Setting(2, ("seen",)), SMOKE, 0, data, rates)
    run.learn()
    clip, tokenizer = comparison_methods.create_model()
    comparison_methods.prepare(clip, method)
    video = data["seen_test"].tensors[0]
    answers = []
    for model in (run.model, clip):
        classifier = comparison_methods.make_classifier(model, tokenizer, names, method)
        with torch.no_grad():
            answers.append(classifier(video).argmax(dim=1))
    run.data = {**data, "seen_test": TensorDataset(video, answers[0])}
    accuracies = run.result()["accuracy"]["seen"]
    assert accuracies["0"] == 1.0
    assert accuracies["1"] == pytest.approx(
        (answers[0] == answers[1]).float().mean().item(), abs=1e-6
    )
    assert accuracies["1"] < 0.9
