r"""Train Open-VCLIP in PyTorch Lightning: IWR in the training step, averaging as a callback.

    python lightning_loop.py --steps 6

It needs ``pip install lightning``. The model is a tiny CLIP with random weights, the clips are
random. The script prints the number of averaged models.

Lightning's checkpoints hold the regulariser and the average, so ``fit(..., ckpt_path=...)``
resumes both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import openvclip
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.training.shared_options import HelpFormatter

CLASSES = ("juggling balls", "playing drums", "surfing water")


def classifier_and_clip(seed: int = 0) -> tuple[openvclip.ZeroShotClassifier, dict[str, Tensor]]:
    """Return the classifier of a tiny expanded CLIP, and the original weights of the CLIP.

    Put your own model here.
    """
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=2, width=64, head_width=32, patch_size=8, image_size=32
        ),
        text_cfg=open_clip.CLIPTextCfg(layers=1, width=32, heads=1),
    )
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    openvclip.expand_temporal_attention(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return openvclip.ZeroShotClassifier(model, tokenizer, list(CLASSES)), clip


def clips(number: int = 8, seed: int = 0) -> TensorDataset:
    """Return random clips ``[4, 3, 32, 32]`` with class indices. Put your own data set here."""
    generator = torch.Generator().manual_seed(seed)
    videos = torch.randn(number, 4, 3, 32, 32, generator=generator)
    labels = torch.randint(0, len(CLASSES), (number,), generator=generator)
    return TensorDataset(videos, labels)


class OpenVCLIP(lightning.LightningModule):  # type: ignore[misc]
    """A module with manual optimization, for two backward passes in a step."""

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
        """Return AdamW for the trained parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Add the gradients of both losses of Equation 9, then do one step."""
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
        """Clip the gradients. In float16 the scaler's factor is removed just before this call."""
        self.clip_gradients(optimizer, self.max_grad_norm, "norm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the random numbers of alpha."""
        checkpoint["iwr"] = self.iwr.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the sequence of alphas."""
        self.iwr.load_state_dict(checkpoint["iwr"])


class WeightAveraging(lightning.Callback):  # type: ignore[misc]
    """Averages the weights with a ``SWATracker``, which is updated after each optimizer step.

    Args:
        start: number of steps before the averaging begins.
        every: number of steps between two averaged models.
    """

    def __init__(self, *, start: int = 0, every: int = 1) -> None:
        self.start, self.every = start, every
        self.tracker: openvclip.SWATracker | None = None
        self._steps = 0

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Make the tracker. ``requires_grad`` must not change afterwards."""
        if stage == "fit" and self.tracker is None:
            self.tracker = openvclip.SWATracker(pl_module, start=self.start, every=self.every)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Store the step number at which the run starts or resumes."""
        self._steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the weights to the average if the batch ended an optimizer step."""
        if self.tracker is not None and trainer.global_step > self._steps:
            self.tracker.update(pl_module)
        self._steps = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the tracker, for Lightning's checkpoints."""
        return self.tracker.state_dict() if self.tracker is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the average of a checkpoint."""
        if self.tracker is not None and state_dict:
            self.tracker.load_state_dict(state_dict)


@command
def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write last.ckpt to this folder")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a checkpoint to resume from")
    parser.add_argument("--accelerator", default="auto", help="see lightning.Trainer")
    parser.add_argument("--precision", default="32-true", help="see lightning.Trainer")
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
