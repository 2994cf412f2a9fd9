"""The examples in frameworks' loops do the steps that Equation 9 and Algorithm 1 ask for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from examples.loops import accelerate_loop, lightning_loop
from examples.loops.accelerate_loop import classifier_and_clip, clips
from openvclip import InterpolatedWeightRegularizer, ZeroShotClassifier
from openvclip.integrations.lightning import AveragingCallback
from tests.helpers import assert_same_state, snapshot

Weights = dict[str, Tensor]


def prepared() -> tuple[ZeroShotClassifier, Weights]:
    classifier, clip = classifier_and_clip()
    return classifier.double(), {name: value.double() for name, value in clip.items()}


def loader(number: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    videos, labels = clips(number).tensors
    return DataLoader(TensorDataset(videos.double(), labels), batch_size=2)


def by_hand(accumulate: int = 1, steps: int = 4) -> tuple[Weights, Weights]:
    """The weights after the steps, and their mean, without the regulariser or a framework."""
    classifier, clip = prepared()
    model = classifier.model
    probe = InterpolatedWeightRegularizer(prepared()[0].model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    batches = [tuple(batch) for batch in loader()] * 4
    for step in range(steps):
        optimizer.zero_grad()
        with probe.interpolated() as alpha:
            pass
        second = mixed(classifier, clip, alpha)
        for video, label in batches[accumulate * step : accumulate * (step + 1)]:
            (cross_entropy(classifier(video), label) / accumulate).backward()
            (0.5 * cross_entropy(second(video), label) / accumulate).backward()
        for name, parameter in trained.items():
            parameter.grad = parameter.grad + second.model.get_parameter(name).grad
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        for name, parameter in trained.items():
            total[name] += parameter.detach()
    mean = snapshot(model) | {name: value / steps for name, value in total.items()}
    return snapshot(model), mean


def mixed(classifier: ZeroShotClassifier, clip: Weights, alpha: float) -> ZeroShotClassifier:
    other, _ = prepared()
    now = classifier.model.state_dict()
    other.model.load_state_dict({n: alpha * clip[n] + (1 - alpha) * now[n] for n in clip})
    return other


def assert_close(given: Weights, expected: Weights) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-7, atol=1e-9)


def test_both_loops_have_the_same_model_and_clips() -> None:
    for name in ("classifier_and_clip", "clips"):
        sources = [
            inspect.getsource(getattr(loop, name)) for loop in (accelerate_loop, lightning_loop)
        ]
        assert sources[0] == sources[1]


# --- accelerate --------------------------------------------------------------------------------


@pytest.fixture
def _accelerate_anew() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate_anew")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_accelerate_loop_equals_one_by_hand(accumulate: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    classifier, clip = prepared()
    swa = accelerate_loop.train(accelerator, classifier, clip, loader(), epochs=accumulate)
    weights, mean = by_hand(accumulate)
    assert swa.n_averaged == 4
    assert_close(classifier.model.state_dict(), weights)
    assert_close(swa.averaged_state_dict(), mean)


@pytest.mark.usefixtures("_accelerate_anew")
def test_step_takes_accelerates_backward_pass_and_optimizer() -> None:
    models = []
    for framework in (False, True):
        classifier, clip = prepared()
        model = classifier.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {}
        if framework:
            accelerator = Accelerator(cpu=True)
            _, optimizer = accelerator.prepare(classifier, optimizer)
            options["backward"] = accelerator.backward
        iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=clip)
        for video, label in loader():
            iwr.step(lambda: cross_entropy(classifier(video), label), **options)  # noqa: B023
        models.append(model)
    assert_same_state(models[1].state_dict(), models[0].state_dict())


@pytest.mark.usefixtures("_accelerate_anew")
def test_the_accelerate_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    accelerate_loop.main(["--cpu", "--accumulate", "2", "--precision", "bf16"])
    assert "2 models averaged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        accelerate_loop.main(["--help"])
    assert "--accumulate" in capsys.readouterr().out


# --- Lightning ---------------------------------------------------------------------------------

quietly = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def fit(
    steps: int, resume: Path | None = None, number: int = 8, **options: Any
) -> tuple[lightning.Trainer, ZeroShotClassifier, AveragingCallback]:
    classifier, clip = prepared()
    iwr, averaging = lightning_loop.callbacks(classifier, clip)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[iwr, averaging],
        **options,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = lightning_loop.VideoModule(classifier)
    trainer.fit(module, loader(number), ckpt_path=resume, weights_only=True)
    return trainer, classifier, averaging


@quietly
def test_the_lightning_loop_equals_one_by_hand() -> None:
    _, straight, averaging = fit(8)
    weights, mean = by_hand(steps=8)
    assert averaging.tracker.n_averaged == 8
    average = averaging.tracker.averaged_state_dict()
    assert_close(straight.model.state_dict(), weights)
    assert_close({n: average[n] for n in mean}, mean)


@quietly
def test_lightning_clips_the_gradients_and_not_a_scalers_multiple_of_them() -> None:
    """The weights are float64, which autocast leaves alone: only the scaler is at work."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    _, scaled, _ = fit(4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    weights, _ = by_hand()
    assert_close(scaled.model.state_dict(), weights)


@quietly
def test_a_resumed_lightning_run_is_bitwise_one_never_stopped(tmp_path: Path) -> None:
    """On one batch: which of several comes next after a resume is Lightning's choice."""
    _, straight, averaging = fit(6, number=2)
    fit(3, number=2)[0].save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, again = fit(6, tmp_path / "last.ckpt", number=2)
    assert_same_state(resumed.model.state_dict(), straight.model.state_dict())
    assert_same_state(again.tracker.averaged_state_dict(), averaging.tracker.averaged_state_dict())


@quietly
def test_the_lightning_script_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lightning_loop.main(["--steps", "2", "--accelerator", "cpu", "--out", str(tmp_path)])
    assert "2 models averaged" in capsys.readouterr().out
    resume = str(tmp_path / "last.ckpt")
    lightning_loop.main(["--steps", "3", "--accelerator", "cpu", "--resume", resume])
    assert "3 models averaged" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        lightning_loop.main(["--help"])
    assert "--resume" in capsys.readouterr().out
