"""Lightning does the steps of Equation 9 and of the averages, also resumed and in two processes."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openvclip import InterpolatedWeightRegularizer, SWATracker, load_checkpoint
from openvclip.integrations.lightning import (
    AveragingCallback,
    IWRCallback,
)
from tests.helpers import assert_same_state, snapshot
from tests.integrations.by_hand import (
    STEPS,
    assert_close,
    by_hand,
    loader,
    network,
    original,
    regularizer,
)
from tests.integrations.lightning_modules import (
    Manual,
    Module,
    OfEachProcess,
    Stateful,
    callbacks_of,
    manual_trainer,
    trainer_of,
)

lightning = pytest.importorskip("lightning")
MixedPrecision = pytest.importorskip("lightning.pytorch.plugins").MixedPrecision

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("accumulate", "every", "share"),
    [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 2, 0.5)],
)
@pytest.mark.parametrize("manual", [False, True])
def test_training_equals_a_loop_by_hand(
    accumulate: int, every: int, share: float, manual: bool
) -> None:
    module = Manual(accumulate) if manual else Module()
    callbacks = callbacks_of(module, every=every, share=share)
    if manual:
        trainer = manual_trainer(callbacks)
    else:
        trainer = trainer_of(callbacks, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader())
    weights, mean = by_hand(accumulate, every, share)
    assert_close(snapshot(module.net), weights)
    assert callbacks[1].tracker.n_averaged == STEPS
    assert_close(callbacks[1].tracker.averaged_state_dict(), mean)


@pytest.mark.parametrize("manual", [False, True])
def test_gradients_are_clipped_without_the_factor_of_the_scaler(manual: bool) -> None:
    """The weights are float64, which autocast leaves alone: only the scaler is at work."""
    module = Manual() if manual else Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    make = manual_trainer if manual else trainer_of
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    make(callbacks_of(module), plugins=[plugin]).fit(module, loader())
    assert_close(snapshot(module.net), by_hand()[0])


def test_bf16_mixed_equals_a_loop_with_autocast() -> None:
    module = Module(torch.float32)
    trainer_of(callbacks_of(module), precision="bf16-mixed").fit(module, loader(torch.float32))
    expected, _ = by_hand(
        dtype=torch.float32, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert_close(snapshot(module.net), expected)


def test_steps_that_a_scaler_skips_are_not_averaged() -> None:
    class Overflowing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss_of(batch) * (torch.inf if batch_idx == 1 else 1.0)

    module = Overflowing()
    callbacks = callbacks_of(module)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = trainer_of(callbacks, plugins=[plugin], max_steps=3)
    trainer.fit(module, loader())
    assert trainer.global_step == 3
    assert callbacks[1].tracker.n_averaged == 2


def test_logs_and_metrics_are_those_of_the_weights_themselves() -> None:
    metrics = pytest.importorskip("torchmetrics")

    class Logging(Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.kept = metrics.MeanMetric(), metrics.CatMetric()
            self.collection = metrics.MetricCollection(
                {"mean": metrics.MeanMetric(), "highest": metrics.MaxMetric()}
            )
            self.runs: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss_of(batch)
            self.mean.update(loss.detach())
            self.kept.update(loss.detach())
            self.collection.update(loss.detach())
            self.log_dict({"loss": loss}, on_step=True)
            self.runs.append(iwr.is_interpolating)
            return loss

    module = Logging()
    iwr = IWRCallback(regularizer(module.net))
    trainer = trainer_of([iwr], max_steps=2)
    trainer.fit(module, loader())
    assert module.runs == [True, False] * 2
    first, second = [tuple(batch) for batch in loader()][:2]
    own = Module()
    losses = [own.loss_of(first)]
    own.net.load_state_dict(by_hand(steps=1)[0])
    losses.append(own.loss_of(second))
    expected = torch.stack(losses).detach()
    torch.testing.assert_close(module.kept.compute(), expected, check_dtype=False)
    torch.testing.assert_close(module.mean.compute(), expected.mean(), check_dtype=False)
    collected = module.collection.compute()
    torch.testing.assert_close(collected["mean"], expected.mean(), check_dtype=False)
    torch.testing.assert_close(collected["highest"], expected.max(), check_dtype=False)
    torch.testing.assert_close(trainer.logged_metrics["loss"], expected[1], check_dtype=False)


# --- resuming ----------------------------------------------------------------------------------


class KilledError(Exception):
    pass


class Kill(lightning.Callback):  # type: ignore[misc]
    """Ends a run before the backward pass of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise KilledError


@pytest.mark.parametrize(("accumulate", "killed"), [(1, 4), (2, 10)])
def test_a_killed_run_that_resumes_equals_a_run_that_was_never_stopped(
    tmp_path: Path, accumulate: int, killed: int
) -> None:
    """Checkpoints are written at every second step, in the middle of an epoch of eight batches."""

    def run(*others: Any, path: Any = None) -> tuple[Any, list[Any]]:
        module = Module()
        callbacks = callbacks_of(module)
        saving = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, every_n_train_steps=2, save_last=True, save_top_k=0
        )
        trainer = trainer_of(
            [*others, *callbacks, saving],
            accumulate_grad_batches=accumulate,
            enable_checkpointing=True,
        )
        trainer.fit(module, Stateful(), ckpt_path=path, weights_only=True)
        return module, callbacks

    whole, expected = run()
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(KilledError):
        run(Kill(killed))
    resumed, callbacks = run(path=tmp_path / "last.ckpt")
    assert_same_state(snapshot(resumed.net), snapshot(whole.net))
    for average, other in zip(callbacks[1:], expected[1:], strict=True):
        assert average.tracker.n_averaged == STEPS
        assert_same_state(
            average.tracker.averaged_state_dict(), other.tracker.averaged_state_dict()
        )


def test_a_checkpoint_between_two_micro_batches_keeps_their_alpha(tmp_path: Path) -> None:
    class Saving(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            drawn.append(iwr.state_dict()["drawn"])
            trainer.save_checkpoint(tmp_path / f"{len(drawn)}.ckpt")

    drawn: list[list[float]] = []
    for path in (None, tmp_path / "1.ckpt"):
        module = Module()
        iwr = IWRCallback(regularizer(module.net))
        trainer = trainer_of([iwr, Saving()], accumulate_grad_batches=2, max_steps=2)
        trainer.fit(module, Stateful(), ckpt_path=path)
    assert [step for step, _ in drawn] == [0, 0, 1, 1, 0, 1, 1]
    assert drawn[4:] == drawn[1:4]
    assert drawn[0][1] != drawn[2][1]


def test_a_second_fit_goes_on() -> None:
    module = Module()
    callbacks = callbacks_of(module)
    for steps in (2, 2):
        trainer_of(callbacks, max_steps=steps).fit(module, loader())
    again = Module()
    others = callbacks_of(again)
    trainer = trainer_of(others, max_steps=2)
    trainer.fit(again, loader())
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(again, loader())
    for one in (callbacks, others):
        assert one[1].tracker.n_averaged == 4
        assert not one[0]._held
    assert "training_step" not in vars(trainer.strategy)


# --- evaluation and the file -------------------------------------------------------------------


def test_evaluation_uses_the_average_and_training_goes_on(tmp_path: Path) -> None:
    plain, module = Module(), Module()
    trainer_of(callbacks_of(plain)).fit(plain, loader())
    file = tmp_path / "average.safetensors"
    averaging = AveragingCallback(SWATracker, model="net", evaluate=True, file=file)
    trainer = trainer_of(
        [IWRCallback(regularizer(module.net)), averaging],
        val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    assert_same_state(snapshot(module.net), snapshot(plain.net))
    expected = [network()[0].weight, *(by_hand(steps=n)[1]["0.weight"] for n in (2, 4, 6))]
    assert len(module.seen) == 4
    for seen, weight in zip(module.seen, expected, strict=True):
        torch.testing.assert_close(seen.double(), weight.detach().double(), rtol=1e-6, atol=1e-8)
    average = averaging.tracker.averaged_state_dict()
    assert_same_state(load_checkpoint(file), dict(sorted(average.items())))
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(module, loader())
        assert torch.equal(module.seen[-1], average["0.weight"].to(module.seen[-1].dtype))
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    other = Module()  # validate() alone, from the checkpoint
    callback = AveragingCallback(SWATracker, model="net", evaluate=True)
    trainer_of([callback]).validate(other, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(other.seen[0], average["0.weight"].to(other.seen[0].dtype))
    assert_same_state(snapshot(other.net), snapshot(module.net))


def test_an_error_in_the_validation_restores_the_weights() -> None:
    class Failing(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise KilledError

    module, weights = Failing(), by_hand(steps=2)[0]
    averaging = AveragingCallback(SWATracker, model="net", evaluate=True)
    trainer = trainer_of(
        [IWRCallback(regularizer(module.net)), averaging],
        val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.raises(KilledError):
        trainer.fit(module, loader(), loader())
    assert_close(snapshot(module.net), weights)
    assert "training_step" not in vars(trainer.strategy)


# --- packages and set-ups ----------------------------------------------------------------------


def test_a_callback_belongs_to_each_package_that_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.SimpleNamespace(Callback=other))
    callback = AveragingCallback(SWATracker, name="swa")
    for one in (callback, copy.copy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(one).__name__ == "AveragingCallback"
        assert isinstance(one, AveragingCallback)
        assert isinstance(one, lightning.Callback)
        assert isinstance(one, other)
        assert one.state_key == "AveragingCallback{'name': 'swa'}"


def test_a_module_whose_layers_are_made_late() -> None:
    class Late(Module):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = network()

    def make(model: nn.Module) -> InterpolatedWeightRegularizer:
        return InterpolatedWeightRegularizer(model, anchor=original())

    module = Late()
    averaging = AveragingCallback(SWATracker, model="net")
    trainer_of([IWRCallback(make, model="net"), averaging]).fit(module, loader())
    weights, mean = by_hand()
    assert_close(snapshot(module.net), weights)
    assert_close(averaging.tracker.averaged_state_dict(), mean)


def test_gradients_that_a_module_does_not_clear_are_kept() -> None:
    """A module that accumulates by itself, in its hooks."""

    class Own(Module):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2 == 1:
                optimizer.step(closure=closure)
            else:
                closure()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss_of(batch) / 2

    module = Own()
    iwr = regularizer(module.net)
    iwr.interval = (0.25, 0.25)
    trainer_of([IWRCallback(iwr)], max_steps=4).fit(module, loader())
    expected = Module()
    other = IWRCallback(regularizer(expected.net))
    assert other.regularizer is not None
    other.regularizer.interval = (0.25, 0.25)
    trainer_of([other], max_steps=2, accumulate_grad_batches=2).fit(expected, loader())
    assert_close(snapshot(module.net), snapshot(expected.net))


@pytest.mark.parametrize(("manual", "static_graph"), [(False, False), (False, True), (True, False)])
def test_two_processes_train_on_the_mean_of_their_losses(
    tmp_path: Path, manual: bool, static_graph: bool
) -> None:
    """The processes are forks of this one, so they import nothing again."""
    strategy = lightning.pytorch.strategies.DDPStrategy(
        start_method="fork", process_group_backend="gloo", static_graph=static_graph
    )
    module, file = Manual() if manual else Module(), tmp_path / "mean.safetensors"
    averaging = AveragingCallback(SWATracker, model="net", file=file)
    make = manual_trainer if manual else trainer_of
    trainer = make([IWRCallback(regularizer(module.net)), averaging], strategy=strategy, devices=2)
    trainer.fit(module, OfEachProcess())
    # Each process has two of the four examples of a step, as two micro-batches of one process have.
    weights, mean = by_hand(accumulate=2)
    assert_close(snapshot(module.net), weights)
    assert_close(load_checkpoint(file), mean)
