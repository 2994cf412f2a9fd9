r"""Fine-tune a CLIP on videos with Open-VCLIP, or one of the methods that it is compared with.

    python examples/finetune.py --model ViT-B-16-quickgelu --pretrained openai \
        --annotations train.csv --root videos/ --classes classes.txt --out run/

The defaults are the paper's recipe for Kinetics-400 (Section 5.1.3 and the released
configuration). ``annotations`` has a line ``path,label`` for each video, ``classes`` a name for
each label. Out come ``finetuned.safetensors`` (the last weights), ``averaged.safetensors`` (their
average, where the method averages) and ``final.safetensors`` (interpolated with the original CLIP,
the weights to use).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

import openvclip
from openvclip.checkpoints import save_checkpoint

METHODS = ("openvclip", "finetune", "l2", "iwr", "swa")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train. Steps are optimizer steps; an epoch is one pass over the loader."""

    method: str = _setting(
        "openvclip",
        "openvclip = iwr + swa; finetune = neither; l2 = penalty on the distance to CLIP",
    )
    epochs: int = _setting(22, "passes over the videos, the warm-up included")
    warmup_epochs: int = _setting(2, "epochs of linear warm-up")
    lr: float = _setting(3.33e-6, "learning rate after the warm-up")
    end_lr: float = _setting(3.33e-8, "learning rate at the first and at the last step")
    weight_decay: float = _setting(
        0.01, "AdamW's weight decay, for matrices (biases, norms and scales have none)"
    )
    clip_grad_norm: float = _setting(1.0, "largest norm of the gradient")
    batch_size: int = _setting(64, "videos per step")
    alpha_max: float = _setting(
        0.6, "alpha of the regulariser is uniform in [0, alpha_max]; it weighs CLIP"
    )
    iwr_weight: float = _setting(0.5, "C of Equation 9")
    l2_weight: float = _setting(0.5, "factor of the squared distance to CLIP (method l2)")
    average_after: int = _setting(
        2, "epochs before the averaging begins; the paper's is the length of the warm-up"
    )
    averages_per_epoch: int = _setting(1, "models of an epoch that enter the average")
    lam: float = _setting(0.5, "weight of CLIP in the final interpolation")
    seed: int = _setting(0, "seed of the order of the videos, their augmentation and alpha")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(METHODS)}.")

    @property
    def uses_iwr(self) -> bool:
        """Whether the loss of interpolated weights is added."""
        return self.method in ("openvclip", "iwr")

    @property
    def uses_swa(self) -> bool:
        """Whether weights are averaged."""
        return self.method in ("openvclip", "swa")


def freeze_all_but_vision(model: nn.Module) -> None:
    """Train the image tower and the logit scale; the text tower stays CLIP's."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; only parameters of two or more axes decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.999))


def learning_rate(step: int, warmup: int, total: int, recipe: Recipe) -> float:
    """Linear from ``end_lr`` to ``lr`` over the warm-up, then half a cosine back to ``end_lr``."""
    if step < warmup:
        return recipe.end_lr + (recipe.lr - recipe.end_lr) * step / warmup
    done = (step - warmup) / max(1, total - 1 - warmup)
    return recipe.end_lr + (recipe.lr - recipe.end_lr) * 0.5 * (1 + math.cos(math.pi * done))


def distance_penalty(model: nn.Module, clip: dict[str, Tensor]) -> Tensor:
    """Squared L2 distance of the trained parameters to the original CLIP's (Table 5)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.stack([(p - clip[name]).square().sum() for name, p in trained]).sum()


def train(
    classifier: openvclip.ZeroShotClassifier,
    loader: Iterable[tuple[Tensor, Tensor]],
    steps_per_epoch: int,
    recipe: Recipe,
    *,
    amp: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, Tensor], openvclip.SWATracker | None]:
    """Fine-tune the classifier's model in place, from the CLIP that it holds.

    Args:
        classifier: holds the expanded CLIP and the text features of the training classes.
        loader: gives ``(video [B, T, C, H, W], label [B])``; iterated once an epoch.
        steps_per_epoch: number of batches of an epoch.
        recipe: how to train.
        amp: autocast to this dtype (bfloat16 or float16).
        on_step: called after each step with its number, from 1, and the loss.

    Returns:
        The original CLIP's state dict (the anchor), and the average where the method averages.
    """
    model, device = classifier.model, classifier.text_features.device
    clip = {name: value.detach().clone() for name, value in model.state_dict().items()}
    freeze_all_but_vision(model)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    iwr = openvclip.InterpolatedWeightRegularizer(
        model,
        anchor=clip,
        interval=(0.0, recipe.alpha_max),
        weight=recipe.iwr_weight,
        seed=recipe.seed,
    )
    warmup = recipe.warmup_epochs * steps_per_epoch
    total = recipe.epochs * steps_per_epoch
    swa = None
    if recipe.uses_swa:
        every = max(1, steps_per_epoch // recipe.averages_per_epoch)
        start = recipe.average_after * steps_per_epoch
        swa = openvclip.SWATracker(model, start=start, every=every)

    def loss_of(video: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(device.type, amp) if amp is not None else nullcontext():
            return functional.cross_entropy(classifier(video), label)

    model.train()
    with tqdm(total=total, desc=recipe.method, disable=None) as bar:
        for step, (video, label) in enumerate(_epochs(loader, recipe.epochs)):
            video, label = video.to(device), label.to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, warmup, total, recipe)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(video, label)
            if recipe.method == "l2":
                loss = loss + recipe.l2_weight * distance_penalty(model, clip)
            scaler.scale(loss).backward()
            if recipe.uses_iwr:
                with iwr.interpolated():
                    scaler.scale(iwr.weight * loss_of(video, label)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if swa is not None:
                swa.update(model)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"The loss is {value} at step {step + 1}; lower --lr.")
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step + 1, value)
    return clip, swa


def _epochs(
    loader: Iterable[tuple[Tensor, Tensor]], epochs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in range(epochs):
        set_epoch = getattr(getattr(loader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)  # fresh random starts and crops
        yield from loader


def final_weights(
    model: nn.Module, clip: dict[str, Tensor], swa: openvclip.SWATracker | None, lam: float
) -> dict[str, Tensor]:
    """Equation 10: CLIP interpolated with the average, or with the last weights without one."""
    theta = swa.averaged_state_dict() if swa is not None else model.state_dict()
    return openvclip.interpolate(clip, theta, lam)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every field of the recipe is a flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="an open_clip model")
    parser.add_argument("--pretrained", default="openai", help="its open_clip tag, or a file")
    parser.add_argument("--annotations", required=True, type=Path, help="lines of path,label")
    parser.add_argument("--root", required=True, type=Path, help="folder the paths start from")
    parser.add_argument("--classes", required=True, type=Path, help="a class name a line")
    parser.add_argument("--out", required=True, type=Path, help="folder for the weights")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, or cpu")
    parser.add_argument("--workers", type=int, default=4, help="processes that read videos")
    parser.add_argument("--amp", choices=("bfloat16", "float16", "off"), default=None)
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--sampling-rate", type=int, default=16, help="frames between two of them")
    for setting in fields(Recipe):
        flag = "--" + setting.name.replace("_", "-")
        kind: Any = type(setting.default)
        choices = METHODS if setting.name == "method" else None
        text = f"{setting.metadata['help']} (default {setting.default})"
        parser.add_argument(flag, type=kind, default=setting.default, choices=choices, help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line and write the weights."""
    import open_clip

    from openvclip.video import VideoDataset, transforms

    args = parse_arguments(arguments)
    recipe = Recipe(**{setting.name: getattr(args, setting.name) for setting in fields(Recipe)})
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = _amp_dtype(args.amp, device)
    torch.manual_seed(recipe.seed)
    model = open_clip.create_model(args.model, pretrained=args.pretrained or None, device=device)
    classes = [line.strip() for line in args.classes.read_text().splitlines() if line.strip()]
    openvclip.expand_temporal_attention(model)
    tokenizer = open_clip.get_tokenizer(args.model)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, classes)
    size = model.visual.image_size
    dataset = VideoDataset(
        args.annotations,
        args.root,
        class_names=classes,
        transform=transforms.build("train", size[0] if isinstance(size, tuple) else size),
        num_frames=args.frames,
        sampling_rate=args.sampling_rate,
        sampler="dense",
        seed=recipe.seed,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=len(dataset) > recipe.batch_size,
        num_workers=args.workers,
        generator=generator,
    )
    clip, swa = train(classifier, loader, len(loader), recipe, amp=amp)
    save_checkpoint(model.state_dict(), args.out / "finetuned.safetensors")
    if swa is not None:
        save_checkpoint(swa.averaged_state_dict(), args.out / "averaged.safetensors")
    final = final_weights(model, clip, swa, recipe.lam)
    save_checkpoint(final, args.out / "final.safetensors", metadata={"lambda": str(recipe.lam)})
    print(f"Wrote {args.out / 'final.safetensors'}: lambda {recipe.lam} on the original CLIP.")


def _amp_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    if name is None:
        name = "bfloat16" if device.type == "cuda" else "off"
    return None if name == "off" else getattr(torch, name)


if __name__ == "__main__":
    main()
