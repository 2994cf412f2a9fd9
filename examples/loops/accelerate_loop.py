r"""Train Open-VCLIP in a loop of accelerate: IWR, accumulation, clipping and averaging.

    python accelerate_loop.py --accumulate 2
    torchrun --nproc-per-node 2 accelerate_loop.py --cpu

It needs ``pip install accelerate``. The model is a tiny CLIP with random weights, the clips are
random. The script prints the loss of each step, then the number of averaged models.

The loop is the loop of accelerate's documentation. ``RegularizedLoop`` adds two calls to it:
``backward()`` in place of ``accelerator.backward()``, and ``update()`` after the optimizer step.
``accelerator.save_state()`` then also saves the regulariser and the average.
"""

from __future__ import annotations

from collections.abc import Iterable

import open_clip
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import openvclip
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.integrations.accelerate import RegularizedLoop
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


def train(
    accelerator: Accelerator,
    classifier: openvclip.ZeroShotClassifier,
    clip: dict[str, Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
) -> openvclip.SWATracker:
    """Fine-tune the model of a classifier in place, and return the average of its weights."""
    model = classifier.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    wrapped, optimizer, loader = accelerator.prepare(classifier, optimizer, loader)
    swa = openvclip.SWATracker(model)
    regularized = RegularizedLoop(
        accelerator,
        wrapped,
        optimizer,
        regularizer=openvclip.InterpolatedWeightRegularizer(model, anchor=clip),
        averages=[swa],
        averaged=model,
    )
    for _ in range(epochs):
        for video, label in loader:
            with accelerator.accumulate(wrapped):
                loss = regularized.backward(lambda: cross_entropy(wrapped(video), label))  # noqa: B023
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if regularized.update():
                    accelerator.print(f"step {swa.n_averaged}: loss {loss.item():.3f}")
    return swa


@command
def main(arguments: list[str] | None = None) -> None:
    """Train from the command line."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the clips")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    args = parser.parse_args(arguments)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
    )
    classifier, clip = classifier_and_clip()
    loader = DataLoader(clips(), batch_size=2)
    swa = train(accelerator, classifier, clip, loader, epochs=args.epochs)
    theta = openvclip.interpolate(clip, swa.averaged_state_dict(), 0.5)
    accelerator.print(f"{swa.n_averaged} models averaged, {len(theta)} entries interpolated.")


if __name__ == "__main__":
    main()
