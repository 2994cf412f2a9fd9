r"""Open-VCLIP in PyTorch Lightning: IWR in a module's training step, averaging as a callback.

    python -m examples.loops.lightning_loop --steps 6

Both go into Lightning's checkpoints, so ``fit(..., ckpt_path=...)`` resumes them too. It needs
``pip install lightning``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import openvclip
from examples.loops.tiny import classifier_and_clip, clips


class OpenVCLIP(lightning.LightningModule):  # type: ignore[misc]
    """Two backward passes and one step need Lightning's manual optimization."""

    def __init__(
        self,
        classifier: openvclip.ZeroShotClassifier,
        clip: dict[str, Tensor],
        *,
        lr: float = 1e-3,
        max_grad_norm: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.classifier = classifier
        self.lr, self.max_grad_norm = lr, max_grad_norm
        self.iwr = openvclip.InterpolatedWeightRegularizer(classifier.model, anchor=clip)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Equation 9: the gradients of both losses, then one step."""
        video, label = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with self.iwr.interpolated():
            self.manual_backward(self.iwr.weight * cross_entropy(self.classifier(video), label))
        loss = cross_entropy(self.classifier(video), label)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip: in float16 a GradScaler's factor is in the gradients until here."""
        self.clip_gradients(optimizer, self.max_grad_norm, "norm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of alpha's generator."""
        checkpoint["iwr"] = self.iwr.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the same sequence of alphas."""
        self.iwr.load_state_dict(checkpoint["iwr"])


class WeightAveraging(lightning.Callback):  # type: ignore[misc]
    """A ``SWATracker`` that is updated after each optimizer step.

    Args:
        start: steps before the averaging begins.
        every: steps between two averaged models.
    """

    def __init__(self, *, start: int = 0, every: int = 1) -> None:
        self.start, self.every = start, every
        self.tracker: openvclip.SWATracker | None = None
        self._steps = 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Make the tracker, after the last change of ``requires_grad``."""
        if stage == "fit" and self.tracker is None:
            self.tracker = openvclip.SWATracker(pl_module, start=self.start, every=self.every)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin counting where the run begins, or where it resumes."""
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the weights, unless the batch only added to the gradients."""
        if self.tracker is not None and trainer.global_step > self._steps:
            self.tracker.update(pl_module)
        self._steps = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The tracker's state, for Lightning's checkpoints."""
        return self.tracker.state_dict() if self.tracker is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the average of a checkpoint."""
        if self.tracker is not None and state_dict:
            self.tracker.load_state_dict(state_dict)


def main(arguments: list[str] | None = None) -> None:
    """Train on random clips from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=None, help="folder for a checkpoint")
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint to go on from")
    parser.add_argument("--accelerator", default="auto", help="as of lightning.Trainer")
    parser.add_argument("--precision", default="32-true", help="as of lightning.Trainer")
    args = parser.parse_args(arguments)
    classifier, clip = classifier_and_clip()
    averaging = WeightAveraging()
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator=args.accelerator,
        precision=args.precision,
        callbacks=[averaging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = OpenVCLIP(classifier, clip)
    loader = DataLoader(clips(), batch_size=2)
    trainer.fit(module, loader, ckpt_path=args.resume, weights_only=True)
    if args.out is not None:
        trainer.save_checkpoint(args.out / "last.ckpt")
    assert averaging.tracker is not None
    average = {
        name.removeprefix("classifier.model."): value
        for name, value in averaging.tracker.averaged_state_dict().items()
    }
    theta = openvclip.interpolate(clip, {name: average[name] for name in clip}, 0.5)
    print(f"{averaging.tracker.n_averaged} models averaged, {len(theta)} entries interpolated.")


if __name__ == "__main__":
    main()
