"""Regularisers together in one loop and in the trainer: gradients, resuming, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import openvclip
from examples.finetune import train
from openvclip.errors import UsageError
from openvclip.processes import Processes
from openvclip.towers import encode_frames
from openvclip.training import (
    Checkpoints,
    FeatureDistillation,
    OriginalCLIP,
    PairEncoder,
    Recipe,
    Run,
    Step,
    TextEnergy,
    choose_trained,
    learning_rate,
    make_classifier,
    make_optimizer,
)
from openvclip.training.objectives import Learner
from openvclip.training.outputs import final_weights
from openvclip.training.regularised import RegularisedClassifier
from tests.examples.finetune_reference import TINY, assert_close, batches
from tests.helpers import assert_same_state, randomise, snapshot, tiny_clip
from tests.training.regulariser_models import (
    NAMES,
    expanded,
    slow_energy,
    slow_gap,
    slow_projected,
    words,
)

BOTH = dataclasses.replace(
    TINY, method="openvclip", text_tower=True, distill=2.0, text_energy=0.05, weight_decay=0.0
)


def learner_of(recipe: Recipe) -> Learner:
    model = tiny_clip() if recipe.method.startswith("vifi") else expanded()
    return make_classifier(model, words, NAMES, recipe.method, text_tower=recipe.text_tower)


def trained(
    recipe: Recipe, given: Any = None, run: Run | None = None, **settings: Any
) -> tuple[dict[str, Tensor], list[Step]]:
    learner, steps = learner_of(recipe), list[Step]()
    given = batches() if given is None else given
    settings = {"tokenizer": words, "on_step": steps.append, **settings}
    train(learner, given, 2, recipe, run=run, **settings)
    return snapshot(learner.model), steps


# --- one loop of one's own -----------------------------------------------------------------------


def test_all_regularisers_and_iwr_in_one_step_have_the_gradient_of_the_equations() -> None:
    torch.manual_seed(0)
    model = expanded().double()
    choose_trained(model, "openvclip", text_tower=True)
    original = OriginalCLIP(model)
    clip = snapshot(model)
    distillation = randomise(FeatureDistillation(8).double(), 5)
    energy = TextEnergy(original, words, weight=0.1, n_texts=3)
    l2 = openvclip.L2ToAnchor(model, clip, weight=0.2)
    randomise(model, 2, scale=0.05)  # as after some steps
    both = nn.ModuleDict({"model": model, "projectors": distillation})
    optimizer = torch.optim.SGD(both.parameters(), lr=1.0)
    anchor = {f"model.{name}": value for name, value in clip.items()}
    iwr = openvclip.InterpolatedWeightRegularizer(
        both, optimizer, anchor=anchor, missing="skip", weight=0.5, seed=1
    )
    video, label = (part.double() if part.is_floating_point() else part for part in batches()[0])
    tokens = words([f"a video of {name}." for name in NAMES])
    originals, names0, texts = original.frames(video), original.texts(tokens), energy.draw()

    def closure() -> Tensor:
        frames, names = encode_frames(model, video), model.encode_text(tokens)  # type: ignore[operator]
        pooled = functional.normalize(frames, dim=-1).mean(dim=1)
        logits = model.logit_scale.exp() * pooled @ functional.normalize(names, dim=-1).T  # type: ignore[operator, union-attr]
        return (
            functional.cross_entropy(logits, label)
            + distillation.loss(frames, originals, names, names0)
            + energy.loss(frames, originals, texts)
            + l2.loss()
        )

    def by_equations(values: dict[str, Tensor]) -> Tensor:
        mine = {n.removeprefix("model."): v for n, v in values.items() if n.startswith("model.")}
        frames = torch.func.functional_call(model, mine, video)[0]
        names = torch.func.functional_call(model, mine, (None, tokens))[1]
        p = {n.removeprefix("projectors."): v for n, v in values.items()}
        unit = frames / frames.norm(dim=-1, keepdim=True)
        texts_unit = names / names.norm(dim=-1, keepdim=True)
        logits = mine["logit_scale"].exp() * unit.mean(dim=1) @ texts_unit.T
        total = -logits.log_softmax(dim=1)[torch.arange(len(label)), label].mean()
        for part, z, z0 in (("images", frames, originals), ("texts", names, names0)):
            rows = list(zip(z.flatten(0, -2), z0.flatten(0, -2), strict=True))
            for row, target in rows:
                layers = p[f"{part}.first.weight"], p[f"{part}.last.weight"]
                total = total + 2 * slow_gap(slow_projected(row, *layers, 0.1), target) / len(rows)
        total = total + slow_energy(frames, originals, texts, original.scale, 0.1)
        return total + 0.2 * sum((mine[n] - clip[n]).square().sum() for n in mine)

    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    alpha = 0.6 * torch.rand((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
    total = by_equations(leaves)
    mixed = {
        n: (alpha * anchor[n] + (1 - alpha) * v).detach() if n in anchor else v.detach()
        for n, v in leaves.items()
    }
    second = {name: value.clone().requires_grad_() for name, value in mixed.items()}
    total = total + 0.5 * by_equations(second)
    total.backward()
    returned = iwr.step(closure)
    assert returned.item() == pytest.approx(by_equations(before).item(), rel=1e-9)
    for name, parameter in both.named_parameters():
        gradients = [leaf.grad for leaf in (leaves[name], second[name])]
        expected = sum(g for g in gradients if g is not None)
        torch.testing.assert_close(before[name] - parameter, expected, rtol=1e-6, atol=1e-9)


# --- the trainer ---------------------------------------------------------------------------------


@pytest.fixture
def float64() -> Iterator[None]:
    """Compute in float64: in float32, AdamW's first steps enlarge the rounding of gradients."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def doubles() -> list[tuple[Tensor, Tensor]]:
    return [(video.double(), label) for video, label in batches()]


def by_hand(recipe: Recipe) -> tuple[dict[str, Tensor], list[float]]:
    """The trainer's steps in a plain loop of the public classes."""
    learner = learner_of(recipe)
    model = learner.model
    choose_trained(model, recipe.method, text_tower=recipe.text_tower)
    original, clip = OriginalCLIP(model), snapshot(model)
    distillation = FeatureDistillation(8, weight=recipe.distill, seed=recipe.seed)
    energy = TextEnergy(original, words, weight=recipe.text_energy, seed=recipe.seed)
    tokens = words([f"a video of {name}." for name in NAMES])
    names0 = original.texts(tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += distillation.parameters()
    optimizer = make_optimizer(parameters, recipe)
    iwr = openvclip.InterpolatedWeightRegularizer(model, optimizer, anchor=clip, seed=recipe.seed)
    losses = []
    for step in range(6):
        video, label = doubles()[step % 2]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 2, 6, recipe)
        texts, originals = energy.draw(), original.frames(video)

        def closure(video: Tensor = video, label: Tensor = label, texts: Tensor = texts,
                    originals: Tensor = originals) -> Tensor:  # fmt: skip
            frames, names = encode_frames(model, video), model.encode_text(tokens)  # type: ignore[operator]
            loss = distillation.loss(frames, originals, names, names0)
            loss = loss + energy.loss(frames, originals, texts)
            return loss + functional.cross_entropy(learner(video), label)

        losses.append(iwr.step(closure, max_grad_norm=recipe.clip_grad_norm).item())
    return snapshot(model), losses


@pytest.mark.usefixtures("float64")
def test_the_trainer_composes_the_public_classes() -> None:
    last, steps = trained(BOTH, doubles())
    expected, losses = by_hand(BOTH)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-9)
    assert_close(last, expected, "vifi")  # of both towers


@pytest.mark.usefixtures("float64")
def test_micro_batches_are_one_batch() -> None:
    halves = [(v[i : i + 1], y[i : i + 1]) for v, y in doubles() for i in range(2)]
    whole, parts = trained(BOTH, doubles())[0], trained(BOTH, halves, Run(accumulate=2))[0]
    assert_close(parts, whole, "vifi")


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_stays_near(amp: torch.dtype) -> None:
    half, rounded = trained(BOTH, run=Run(amp=amp, steps=4))
    _, exact = trained(BOTH, run=Run(steps=4))
    assert all(bool(value.isfinite().all()) for value in half.values())
    assert rounded[0].loss == pytest.approx(exact[0].loss, rel=0.05)


def test_distillation_keeps_the_features_near_clip() -> None:
    gaps = []
    video = batches()[0][0]
    for weight in (0.0, 20.0):
        recipe = dataclasses.replace(TINY, method="finetune", distill=weight)
        learner = learner_of(recipe)
        original = OriginalCLIP(learner.model)
        train(learner, batches(), 2, recipe)
        with torch.no_grad():
            frames = encode_frames(learner.model, video)
        gaps.append(FeatureDistillation(8).loss(frames, original.frames(video)).item())
    assert gaps[1] < 0.8 * gaps[0]


@pytest.mark.parametrize("method", ["swa", "l2", "vifi", "vifi-image"])
def test_every_method_takes_the_regularisers(method: str) -> None:
    recipe = dataclasses.replace(TINY, method=method, distill=2.0, text_energy=0.1)
    last, _ = trained(recipe)
    plain, _ = trained(dataclasses.replace(TINY, method=method))
    assert not torch.equal(last["visual.proj"], plain["visual.proj"])
    texts = [n for n in last if not n.startswith("visual.") and n != "logit_scale"]
    fixed = {n: v for n, v in tiny_clip().state_dict().items() if n in texts}
    moved = any(not torch.equal(last[n], v) for n, v in fixed.items())
    assert moved == (method == "vifi")


def test_the_original_clip_encodes_each_clip_once_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, frames = list[int](), OriginalCLIP.frames

    def counted(original: OriginalCLIP, video: Tensor) -> Tensor:
        calls.append(len(video))
        return frames(original, video)

    monkeypatch.setattr(OriginalCLIP, "frames", counted)
    trained(dataclasses.replace(TINY, distill=2.0))  # with two passes in each of 6 steps
    assert calls == [2] * 6


def test_the_final_model_has_no_projectors() -> None:
    learner = learner_of(BOTH)
    clip, swa = train(learner, batches(), 2, BOTH, tokenizer=words)
    final = final_weights(learner.model, clip, swa, 0.0)
    assert final.keys() == tiny_clip().state_dict().keys()


class Loader:
    """Batches that begin anywhere in an epoch."""

    first = 0

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.first = first_step

    def __iter__(self) -> Any:
        yield from batches()[self.first :]


def test_a_resumed_run_equals_a_run_without_a_stop(tmp_path: Path) -> None:
    def run() -> tuple[dict[str, Tensor], list[Step]]:
        checkpoints = Checkpoints(tmp_path, {}, every=3, keep=2)
        return trained(BOTH, Loader(), checkpoints=checkpoints)

    whole, steps = run()
    saved = torch.load(tmp_path / "checkpoint-00000006.pt", weights_only=True)
    assert len(saved["regularisers"]["projectors"]) == 4
    assert saved["regularisers"]["projectors"]["images.last.weight"].any()
    (tmp_path / "checkpoint-00000006.pt").unlink()
    again, rest = run()
    assert_same_state(whole, again)
    assert [step.loss for step in rest] == [step.loss for step in steps[3:]]
    resumed = torch.load(tmp_path / "checkpoint-00000006.pt", weights_only=True)
    for name, value in saved["regularisers"]["projectors"].items():
        assert torch.equal(value, resumed["regularisers"]["projectors"][name])
    assert torch.equal(
        saved["regularisers"]["energy"]["generator"],
        resumed["regularisers"]["energy"]["generator"],
    )


def test_checkpoints_without_regularisers_are_as_before(tmp_path: Path) -> None:
    trained(TINY, Loader(), checkpoints=Checkpoints(tmp_path, {}, every=6))
    saved = torch.load(tmp_path / "checkpoint-00000006.pt", weights_only=True)
    assert "regularisers" not in saved


def test_logits_are_those_of_the_classifier_bitwise() -> None:
    for method in ("openvclip", "vifi"):
        for text_tower in {False, method == "openvclip"}:
            recipe = dataclasses.replace(BOTH, method=method, text_tower=text_tower)
            learner: Any = learner_of(recipe)
            module = RegularisedClassifier(learner, recipe, words)
            video = batches()[0][0]
            originals, texts = module.original.frames(video), module.energy.draw()  # type: ignore[union-attr]
            logits, penalty = module(video, originals, texts)
            assert torch.equal(logits, learner(video))
            assert penalty.shape == ()
            assert not any("original" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("changes", "learner", "text"),
    [
        ({"distill": 1.0}, PairEncoder(tiny_clip(), words), "contrastive objective"),
        ({"text_energy": 1.0}, None, "needs the tokenizer"),
        ({"text_tower": True}, "images", r"make_classifier\(\.\.\., text_tower=True\)"),
    ],
)
def test_what_cannot_be_regularised_is_refused(
    changes: dict[str, Any], learner: Any, text: str
) -> None:
    recipe = dataclasses.replace(TINY, **changes)
    if learner is None or isinstance(learner, str):
        learner = learner_of(TINY)
    with pytest.raises(UsageError, match=text):
        train(learner, batches(), 2, recipe)


def test_prompts_and_shards_are_refused() -> None:
    recipe = dataclasses.replace(TINY, distill=1.0)
    with pytest.raises(UsageError, match="sharded model"):
        train(learner_of(TINY), batches(), 2, recipe, run=Run(fsdp=True), processes=Processes(0, 2))
    model = tiny_clip()
    openvclip.prompting.attach_vifi(model, vision_depth=1, text_depth=1, text_prompts=1)
    learner = make_classifier(model, words, NAMES, "bridge")
    with pytest.raises(UsageError, match="the method bridge"):
        train(learner, batches(), 2, dataclasses.replace(recipe, method="bridge"))
    for name in ("distill", "text_energy"):
        with pytest.raises(ValueError, match=f"{name}=-1.0: expected a finite number"):
            Recipe(**{name: -1.0})  # type: ignore[arg-type]
