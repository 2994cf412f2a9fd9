"""Modules and trainers of Lightning for the tests of its callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from openvclip import EMATracker, SWATracker
from openvclip.integrations.lightning import (
    AveragingCallback,
    IWRCallback,
    regularized_backward,
)
from tests.integrations.by_hand import (
    BATCHES,
    CLIP_NORM,
    STEPS,
    adamw,
    loader,
    network,
    regularizer,
)

lightning = pytest.importorskip("lightning")
MixedPrecision = pytest.importorskip("lightning.pytorch.plugins").MixedPrecision

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A module with automatic optimization, as users write it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = network(dtype)
        self.seen: list[Tensor] = []  # the first weight in each validation

    def loss_of(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss_of(batch)
        self.log("loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.net[0].weight.detach().clone())

    test_step = validation_step
    predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.net)


class Manual(Module):
    """The same module with manual optimization, accumulation and clipping."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
        regularized_backward(self, lambda *part: self.loss_of(part) / self.accumulate, *batch)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clip_gradients(optimizer, CLIP_NORM, "norm")


class OfEachProcess:
    """Gives the batches of this process, in order. Lightning's own sampler shuffles them."""

    def __len__(self) -> int:
        return BATCHES // 2

    def __iter__(self) -> Iterator[Any]:
        return iter(list(loader())[torch.distributed.get_rank() :: 2])


class Stateful:
    """A loader that a checkpoint can hold, so that a run can resume in the middle of an epoch."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        batches = list(loader())
        while self.next < len(batches):
            self.next += 1
            yield batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def trainer_of(callbacks: Any, **options: Any) -> Any:
    defaults = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": CLIP_NORM,
    }  # fmt: skip
    return lightning.Trainer(callbacks=callbacks, **{**defaults, **options})


def callbacks_of(module: Module, **settings: Any) -> list[Any]:
    return [
        IWRCallback(regularizer(module.net, **settings)),
        AveragingCallback(SWATracker(module.net), model="net"),
        AveragingCallback(lambda model: EMATracker(model, decay=0.5), model="net", name="ema"),
    ]


def manual_trainer(callbacks: Any, **options: Any) -> Any:
    return trainer_of(callbacks, gradient_clip_val=None, **options)
