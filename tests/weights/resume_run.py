"""A training run that can be killed at any moment. ``test_resume.py`` starts and kills it.

The run resumes from ``checkpoint.pt`` in its folder if the file exists, and writes the file every
few steps. At the end it writes ``result.pt`` with the final weights, the average and all alphas.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.checkpoints import atomic_path
from openvclip.weights.averaging import SWATracker
from openvclip.weights.regularization import InterpolatedWeightRegularizer

STEPS, SAVE_EVERY = 400, 7


class Run:
    """The complete state of a training run."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
        )
        # A user loads the anchor from a file. Here each run computes the same anchor.
        anchor = {name: v + 0.1 for name, v in self.model.state_dict().items() if v.ndim}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.iwr = InterpolatedWeightRegularizer(
            self.model, self.optimizer, anchor=anchor, every=2, seed=1
        )
        self.swa = SWATracker(self.model, start=10, every=3)
        self.order = torch.Generator().manual_seed(2)
        self.alphas: list[float] = []
        self.step = 0

    def advance(self) -> None:
        generator = torch.Generator().manual_seed(3)
        data = torch.randn(64, 6, generator=generator)
        labels = torch.randint(0, 4, (64,), generator=generator)
        chosen = torch.randperm(64, generator=self.order)[:8]
        with _alpha_of(self.iwr) as seen:
            self.iwr.step(
                lambda: functional.cross_entropy(self.model(data[chosen]), labels[chosen]),
                max_grad_norm=1.0,
            )
        self.alphas.extend(seen)
        self.schedule.step()
        self.swa.update(self.model)
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "iwr": self.iwr.state_dict(),
            "swa": self.swa.state_dict(),
            "order": self.order.get_state(),
            "dropout": torch.get_rng_state(),
            "alphas": torch.tensor(self.alphas, dtype=torch.float64),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.iwr.load_state_dict(state["iwr"])
        self.swa.load_state_dict(state["swa"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["dropout"])
        self.alphas = state["alphas"].tolist()
        self.step = state["step"]

    def result(self) -> dict[str, Tensor]:
        average = self.swa.averaged_state_dict()
        return {
            **{f"weights.{name}": value for name, value in self.model.state_dict().items()},
            **{f"average.{name}": value for name, value in average.items()},
            "alphas": torch.tensor(self.alphas, dtype=torch.float64),
        }


class _alpha_of:  # noqa: N801
    """Collect the alphas that a regulariser draws inside a ``with`` block."""

    def __init__(self, iwr: InterpolatedWeightRegularizer) -> None:
        self.iwr, self.draw = iwr, iwr._draw

    def __enter__(self) -> list[float]:
        seen: list[float] = []

        def drawn() -> float:
            seen.append(self.draw())
            return seen[-1]

        self.iwr._draw = drawn  # type: ignore[method-assign]
        return seen

    def __exit__(self, *_: object) -> None:
        self.iwr._draw = self.draw  # type: ignore[method-assign]


def write(state: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def main(folder: Path, starter: Connection | None) -> None:
    """Train to the end. With ``starter``, wait for its message before each step."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    run, checkpoint = Run(), folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(torch.load(checkpoint, weights_only=True))
    while run.step < STEPS:
        if starter is not None:
            starter.send(run.step)
            starter.recv()
        run.advance()
        if run.step % SAVE_EVERY == 0:
            write(run.state(), checkpoint)
    write(run.result(), folder / "result.pt")
