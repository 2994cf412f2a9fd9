r"""Open-VCLIP in a loop of Hugging Face's accelerate: IWR, accumulation, clipping, averaging.

    python -m examples.loops.accelerate_loop --accumulate 2
    torchrun --nproc_per_node 2 -m examples.loops.accelerate_loop --cpu

It needs ``pip install accelerate``.

The loop is the one of accelerate's documentation and two additions: a backward pass within
``iwr.interpolated()``, whose gradients are not reduced yet, and ``swa.update()``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import openvclip
from examples.loops.tiny import classifier_and_clip, clips


def train(
    accelerator: Accelerator,
    classifier: openvclip.ZeroShotClassifier,
    clip: dict[str, Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
) -> openvclip.SWATracker:
    """Fine-tune the classifier's model in place; returns the average of its weights."""
    model = classifier.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    wrapped, optimizer, loader = accelerator.prepare(classifier, optimizer, loader)
    iwr = openvclip.InterpolatedWeightRegularizer(model, wrapper=wrapped, anchor=clip)
    swa = openvclip.SWATracker(model)
    for _ in range(epochs):
        for video, label in loader:
            with accelerator.accumulate(wrapped):
                # Each micro-batch at an alpha of its own.
                with iwr.interpolated(), accelerator.no_sync(wrapped):
                    accelerator.backward(iwr.weight * cross_entropy(wrapped(video), label))
                loss = cross_entropy(wrapped(video), label)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                swa.update(model)
                accelerator.print(f"step {swa.n_averaged}: loss {loss.item():.3f}")
    return swa


def main(arguments: list[str] | None = None) -> None:
    """Train on random clips from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=1, help="passes over the clips")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
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
