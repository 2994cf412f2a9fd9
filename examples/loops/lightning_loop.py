r"""Train Open-VCLIP in PyTorch Lightning: IWR and the average of the weights as callbacks.

    python lightning_loop.py --steps 6

It needs ``pip install lightning``. The model is a tiny CLIP with random weights, the clips are
random. The script prints the number of averaged models.

The module is a plain Lightning module. Lightning's checkpoints hold the states of both callbacks,
so ``fit(..., ckpt_path=...)`` resumes them.
"""

from __future__ import annotations

from pathlib import Path

import lightning
import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import openvclip
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.integrations.lightning import AveragingCallback, IWRCallback
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


class VideoModule(lightning.LightningModule):  # type: ignore[misc]
    """A module with automatic optimization, without anything of openvclip's training."""

    def __init__(self, classifier: openvclip.ZeroShotClassifier, *, lr: float = 1e-3) -> None:
        super().__init__()
        self.classifier = classifier
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the trained parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        video, label = batch
        return cross_entropy(self.classifier(video), label)


def callbacks(
    classifier: openvclip.ZeroShotClassifier, clip: dict[str, Tensor]
) -> tuple[IWRCallback, AveragingCallback]:
    """Return the callbacks that regularise and average the model of a classifier."""
    iwr = openvclip.InterpolatedWeightRegularizer(classifier.model, anchor=clip)
    swa = openvclip.SWATracker(classifier.model)
    return IWRCallback(iwr), AveragingCallback(swa, model="classifier.model")


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
    iwr, averaging = callbacks(classifier, clip)
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accelerator=args.accelerator,
        precision=args.precision,
        gradient_clip_val=1.0,
        callbacks=[iwr, averaging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = VideoModule(classifier)
    loader = DataLoader(clips(), batch_size=2)
    trainer.fit(module, loader, ckpt_path=args.resume, weights_only=True)
    if args.out is not None:
        trainer.save_checkpoint(args.out / "last.ckpt")
    theta = openvclip.interpolate(clip, averaging.tracker.averaged_state_dict(), 0.5)
    print(f"{averaging.tracker.n_averaged} models averaged, {len(theta)} entries interpolated.")


if __name__ == "__main__":
    main()
