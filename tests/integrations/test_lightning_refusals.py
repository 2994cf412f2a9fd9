"""Wrong uses of the callbacks of Lightning raise errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openvclip import EMATracker, SWATracker
from openvclip.errors import (
    CheckpointError,
    EmptyAverageError,
    StateMismatchError,
    UsageError,
)
from openvclip.integrations.lightning import (
    AveragingCallback,
    IWRCallback,
    regularized_backward,
)
from tests.integrations.by_hand import (
    adamw,
    loader,
    network,
    regularizer,
)
from tests.integrations.lightning_modules import (
    Manual,
    Module,
    manual_trainer,
    trainer_of,
)

lightning = pytest.importorskip("lightning")
MixedPrecision = pytest.importorskip("lightning.pytorch.plugins").MixedPrecision

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def fit(module: Module, callbacks: list[Any], **options: Any) -> None:
    trainer_of(callbacks, **options).fit(module, loader())


def test_a_regulariser_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="belongs to another model"):
        fit(Module(), [IWRCallback(regularizer(network()))])


def test_an_average_of_frozen_weights_is_refused() -> None:
    module = Module()
    module.frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UsageError, match=r"none of the trained parameters .* is averaged"):
        fit(module, [AveragingCallback(SWATracker, model="frozen")])


def test_an_average_of_another_part_is_refused_before_the_training() -> None:
    module = Module()
    late = SWATracker(module.net, start=99)
    with pytest.raises(StateMismatchError, match="does not fit the tracker"):
        fit(module, [AveragingCallback(late)])


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model='nett'.*submodule of the LightningModule"):
        fit(Module(), [AveragingCallback(SWATracker, model="nett")])


def test_a_callback_added_twice_is_refused() -> None:
    class Twice(Module):
        def configure_callbacks(self) -> Any:
            return [IWRCallback(regularizer(self.net)), IWRCallback(regularizer(self.net))]

    with pytest.raises(UsageError, match="2 callbacks IWRCallback; expected one"):
        fit(Twice(), [])
    average = AveragingCallback(SWATracker)
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer_of([average, average])


def test_a_wrong_decay_is_refused() -> None:
    with pytest.raises(UsageError, match=r"decay=1\.0: expected a number in \[0, 1\)"):
        fit(Module(), [AveragingCallback(lambda model: EMATracker(model, decay=1.0))])


def test_lbfgs_and_an_iterator_are_refused() -> None:
    class Closure(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.net.parameters())

    module: Module = Closure()
    with pytest.raises(UsageError, match="LBFGS evaluates a closure"):
        fit(module, [IWRCallback(regularizer(module.net))])

    class Iterating(Module):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    module = Iterating()
    with pytest.raises(UsageError, match="takes dataloader_iter"):
        fit(module, [IWRCallback(regularizer(module.net))])


def test_manual_optimization_that_is_not_regularised_is_refused() -> None:
    class Plain(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self.manual_backward(self.loss_of(batch))
            optimizer.step()

    module: Module = Plain()
    with pytest.raises(UsageError, match="did not call regularized_backward"):
        manual_trainer([IWRCallback(regularizer(module.net))]).fit(module, loader())

    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [adamw(self.net[0]), adamw(self.net[2])]

    module = Two()
    with pytest.raises(UsageError, match=r"every=2 counts optimizer steps.*has 2 optimizers"):
        manual_trainer([IWRCallback(regularizer(module.net, every=2))]).fit(module, loader())


def test_regularized_backward_is_for_manual_optimization() -> None:
    class Wrong(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return regularized_backward(self, lambda: self.loss_of(batch))

    with pytest.raises(UsageError, match="is for manual optimization"):
        fit(Wrong(), [])


def test_states_of_other_models_and_names_are_refused(tmp_path: Path) -> None:
    module, file = Module(), tmp_path / "last.ckpt"
    trainer = trainer_of([AveragingCallback(SWATracker, model="net")], max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(file)
    for callback, error, text in (
        (AveragingCallback(SWATracker), StateMismatchError, "does not fit the model"),
        (AveragingCallback(EMATracker, model="net"), StateMismatchError, "state of a EMATracker"),
        (AveragingCallback(SWATracker, name="swa"), CheckpointError, "the same name"),
    ):
        with pytest.raises(error, match=text):
            trainer_of([callback]).fit(Module(), loader(), ckpt_path=file)


def test_weights_that_are_thawed_later_are_told() -> None:
    class Thawing(Module):
        def on_train_epoch_start(self) -> None:
            self.net.requires_grad_(True)

    for make in (
        lambda net: IWRCallback(regularizer(net)),
        lambda net: AveragingCallback(SWATracker, model="net"),
    ):
        module = Thawing()
        module.net[2].requires_grad_(False)
        with pytest.raises(UsageError, match="require gradients now but were frozen"):
            fit(module, [make(module.net)])


def test_a_checkpoint_of_the_average_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    class Saving(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.trainer.save_checkpoint(tmp_path / "wrong.ckpt")

    averaging = AveragingCallback(SWATracker, evaluate=True)
    trainer = trainer_of([averaging], val_check_interval=2, num_sanity_val_steps=0)
    with pytest.raises(UsageError, match="saved while the module holds the average"):
        trainer.fit(Saving(), loader(), loader())
    late = AveragingCallback(
        lambda model: SWATracker(model, start=99), file=tmp_path / "a.safetensors"
    )
    with pytest.raises(EmptyAverageError, match="start=99"):
        fit(Module(), [late])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="does not exist yet"):
        _ = AveragingCallback(SWATracker).tracker
