"""Training steps: every method and every way to run it against the algorithm written out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from examples.finetune import parse_arguments, train
from openvclip.errors import PromptingError, UnsupportedModelError, UsageError
from openvclip.prompting import VideoClassifier
from openvclip.training.log import Step
from openvclip.training.options import recipe_of
from openvclip.training.outputs import final_weights
from openvclip.training.processes import save_memory
from openvclip.training.recipe import METHODS, Recipe, Run
from tests.examples.finetune_reference import (
    TINY,
    assert_close,
    batches,
    classifier,
    classifier_of,
    trained_by_hand,
)
from tests.helpers import FACTS, snapshot


@pytest.mark.parametrize("method", METHODS)
def test_each_method_equals_algorithm_1_written_out(method: str) -> None:
    recipe = dataclasses.replace(TINY, method=method)
    learner = classifier_of(method)
    before = snapshot(learner.model)
    clip, swa = train(learner, batches(), 2, recipe)
    last, mean = trained_by_hand(recipe, batches())
    assert_close(snapshot(learner.model), last, method)
    assert all(torch.equal(clip[name], value) for name, value in before.items())
    assert (swa is not None) == (method in ("swa", "openvclip"))
    if swa is not None:
        assert swa.n_averaged == 2
        assert_close(swa.averaged_state_dict(), mean)


@pytest.mark.parametrize("method", ["openvclip", "l2"])
def test_added_up_batches_of_unlike_sizes_are_one_batch(method: str) -> None:
    recipe = dataclasses.replace(TINY, method=method)
    (video, label), learner = batches(1, 4)[0], classifier()
    parts = [(video[:3], label[:3]), (video[3:], label[3:])]
    train(learner, parts, 1, recipe, run=Run(accumulate=2))
    assert_close(snapshot(learner.model), trained_by_hand(recipe, [(video, label)])[0])


def test_regularisation_at_every_second_step_and_a_narrow_interval() -> None:
    learner, steps = classifier(), list[Step]()
    train(learner, batches(3), 3, TINY, run=Run(every=2, alpha_min=0.5), on_step=steps.append)
    assert_close(snapshot(learner.model), trained_by_hand(TINY, batches(3), every=2, low=0.5)[0])
    assert [step.alpha is None for step in steps] == [False, True] * 4 + [False]
    assert all(0.5 <= step.alpha <= 0.6 for step in steps if step.alpha is not None)


@pytest.mark.parametrize(("micro", "passes"), [(4, [2]), (3, [2]), (1, [1, 1])])
def test_regularisation_on_half_of_the_videos(micro: int, passes: list[int]) -> None:
    (video, label), learner, sizes = batches(1, 4)[0], classifier(), list[int]()
    learner.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    parts = list(zip(video.split(micro), label.split(micro), strict=True))
    steps, run = list[Step](), Run(share=0.5, every=2, accumulate=len(parts))
    train(learner, parts, 1, TINY, run=run, on_step=steps.append)
    expected = trained_by_hand(TINY, [(video, label)], share=0.5, every=2)[0]
    assert_close(snapshot(learner.model), expected)
    plain = [len(part[0]) for part in parts]
    assert sizes == passes + plain + plain + passes + plain


def test_fewer_steps_than_epochs_have_and_other_betas() -> None:
    run, steps = Run(betas=(0.5, 0.6), steps=7), list[Step]()
    learner, recipe = classifier(), dataclasses.replace(TINY, method="finetune", epochs=99)
    train(learner, batches(3), 3, recipe, run=run, on_step=steps.append)
    expected = trained_by_hand(recipe, batches(3), betas=(0.5, 0.6), steps=7)[0]
    assert_close(snapshot(learner.model), expected)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7]


def test_texts_that_nothing_changes_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(method: str) -> int:
        learner, calls = classifier_of(method), list[int]()
        made = VideoClassifier.text_features
        with monkeypatch.context() as patch:
            patch.setattr(VideoClassifier, "text_features", lambda s: calls.append(1) or made(s))
            train(learner, batches(), 2, dataclasses.replace(TINY, method=method))
        return len(calls)

    assert encoded("vifi-image") == 2  # once to see that nothing changes them
    assert min(encoded("vifi-text"), encoded("bridge")) >= 6


@pytest.mark.parametrize("method", ["bridge", "vita"])
def test_prompts_are_trained_alone_and_have_to_be_there(method: str) -> None:
    learner = classifier_of(method)
    clip, _ = train(learner, batches(), 2, dataclasses.replace(TINY, method=method))
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, clip[name]) != name.startswith("openvclip_prompts."), name
    with pytest.raises(PromptingError, match="has no prompts"):
        train(classifier(), batches(), 2, dataclasses.replace(TINY, method=method))


# What PyTorch's compiler says of any layer whose input has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("run", [Run(checkpointing=True), Run(compiler="aot_eager")])
def test_recomputed_and_compiled_layers_change_nothing(run: Run) -> None:
    learner = classifier()
    train(learner, batches(), 2, TINY, run=run)
    assert_close(snapshot(learner.model), trained_by_hand(TINY, batches())[0])


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_half_precision_training_stays_near(amp: torch.dtype) -> None:
    learner, steps, exact = classifier(), list[Step](), list[Step]()
    train(learner, batches(), 2, TINY, run=Run(amp=amp), on_step=steps.append)
    train(classifier(), batches(), 2, TINY, on_step=exact.append)
    assert all(bool(v.isfinite().all()) for v in learner.model.state_dict().values())
    assert steps[0].loss == pytest.approx(exact[0].loss, rel=0.05)
    assert steps[0].loss != exact[0].loss


def test_only_the_image_tower_and_the_scale_are_trained() -> None:
    learner = classifier()
    clip, _ = train(learner, batches(), 2, TINY)
    changed = {n for n, v in learner.model.state_dict().items() if not torch.equal(v, clip[n])}
    assert "logit_scale" in changed
    assert all(name.startswith("visual.") or name == "logit_scale" for name in changed)
    assert len(changed) == 1 + sum(1 for n in clip if n.startswith("visual."))


def test_final_weights_interpolate_the_average_with_clip() -> None:
    learner = classifier()
    clip, swa = train(learner, batches(), 2, TINY)
    assert swa is not None
    final = final_weights(learner.model, clip, swa, 0.25)
    for name, mean in swa.averaged_state_dict().items():
        expected = 0.25 * clip[name].double() + 0.75 * mean.double()
        torch.testing.assert_close(final[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "share"), [("finetune", 1), ("openvclip", 1), ("iwr", 0.5)])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_videos(
    method: str, share: float
) -> None:
    named = [(*batch, [f"{i}-a.mp4", f"{i}-b.mp4"]) for i, batch in enumerate(batches(4))]
    named[3][0][1, 0, 0, 0, 0] = float("nan")
    learner = classifier()
    recipe, run = dataclasses.replace(TINY, method=method), Run(accumulate=2, share=share)
    with pytest.raises(FloatingPointError, match=r"at step 2.* Its videos: 3-a\.mp4, 3-b\.mp4\.$"):
        train(learner, named, 2, recipe, run=run)
    assert all(bool(v.isfinite().all()) for v in learner.model.state_dict().values())


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step() -> None:
    named = [(*batch, [f"{i}-a.mp4", f"{i}-b.mp4"]) for i, batch in enumerate(batches(2))]
    learner, done = classifier(), list[Step]()
    learner.model.visual.proj.register_hook(lambda grad: grad * float("nan") if done else grad)
    before: dict[str, torch.Tensor] = {}

    def after(step: Step) -> None:
        done.append(step)
        before.update(snapshot(learner.model))

    recipe = dataclasses.replace(TINY, method="finetune")
    text = r"norm of the gradient is nan at step 2, where the loss is finite.* 1-a\.mp4, 1-b\.mp4"
    with pytest.raises(FloatingPointError, match=text):
        train(learner, named, 2, recipe, on_step=after)
    assert len(done) == 1
    after_error = snapshot(learner.model)
    assert all(torch.equal(value, after_error[name]) for name, value in before.items())


def test_what_cannot_be_run_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="expected one of openvclip, finetune"):
        Recipe(method="sgd")
    with pytest.raises(UsageError, match="No model would enter the average: 3 epochs"):
        train(classifier(), batches(), 2, dataclasses.replace(TINY, average_after=3))
    with pytest.raises(UsageError, match="gave 2 steps in an epoch, with 1 batches"):
        train(classifier(), batches(), 3, TINY)
    with pytest.raises(UsageError, match="start several processes with torchrun"):
        train(classifier(), batches(), 2, TINY, run=Run(fsdp=True))
    with pytest.raises(UnsupportedModelError, match="Linear has no activation checkpointing"):
        save_memory(nn.Linear(1, 1))


def test_defaults_are_the_papers() -> None:
    facts = json.loads((FACTS / "facts.json").read_text())
    paper, recipe = facts["training"], Recipe()
    assert recipe.epochs == paper["epochs"]
    assert recipe.warmup_epochs == paper["warmup_epochs"]
    assert paper["swa"] == "uniform mean of the epoch checkpoints after warm-up (epochs 2..22)"
    averaged = range(recipe.average_after + 1, recipe.epochs + 1)
    assert averaged == range(2, 23)
    assert recipe.averages_per_epoch == 1
    rates = (recipe.lr, recipe.warmup_start_lr, recipe.end_lr)
    assert rates == (paper["lr"], paper["warmup_start_lr"], paper["final_lr"])
    decays = (recipe.weight_decay, recipe.weight_decay_1d)
    assert decays == (paper["weight_decay"], paper["weight_decay_1d"])
    assert recipe.clip_grad_norm == paper["clip_grad_norm"]
    assert recipe.batch_size == paper["global_batch"]
    assert [0.0, recipe.alpha_max] == paper["iwr_interval"]
    assert recipe.iwr_weight == paper["iwr_C"]
    assert recipe.lam == paper["interpolation_lambda_weights_CLIP"]["ViT-B/16"]
    for encoder, lam in paper["interpolation_lambda_weights_CLIP"].items():
        model = encoder.replace("/", "-") + "-quickgelu"
        arguments = ["--annotations", "a", "--videos", "b", "--out", "c", "--model", model]
        assert recipe_of(parse_arguments(arguments)).lam == lam
        assert recipe_of(parse_arguments([*arguments, "--lam", "0.3"])).lam == 0.3
    args = parse_arguments(["--annotations", "a", "--videos", "b", "--out", "c"])
    read = (args.frames, args.sampling_rate, args.target_fps)
    assert read == (paper["frames"], paper["sampling_rate"], paper["target_fps"])
    assert args.flip
    assert "horizontal flip" in paper["augmentation"]
    assert args.per_device_batch * paper["gpus"] == paper["global_batch"]
