r"""Open-VCLIP in one file: fine-tune a CLIP on a folder of videos, and save the model.

    python open_vclip.py --videos videos/ --out run/

``videos/`` has a subfolder for each class, or ``--annotations FILE`` has lines ``path,class name``.
The script follows the paper:

1. expand: each frame also attends to the two neighbouring frames;
2. IWR: add a second loss, computed with weights between CLIP and the fine-tuned model;
3. SWA: average the weights at the end of each epoch after the first tenth of the epochs;
4. interpolate the average with the original CLIP, and save a folder that knows how it is used.

A fifth of the videos of each class is held out of the training. The printed table has the top-1
accuracy on these videos, in [0, 1], at three weights λ of the original CLIP: 0 is the fine-tuned
average, ``--lam`` is the saved model, and 1 is CLIP's weights in the expanded model. To see the
accuracy on classes without training videos, run sweep_and_plot.py with averaged.safetensors.
"""

from __future__ import annotations

import shlex
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import openvclip
from openvclip.commands import Parser, command, progress_bar
from openvclip.errors import AnnotationError
from openvclip.evaluation import sweep
from openvclip.models.loading import load_model
from openvclip.video import Sampling, VideoDataset, find_videos, read_annotations

Samples = list[tuple[str, int]]  # (path below --videos, class index)


def read_videos(root: Path, annotations: Path | None) -> tuple[Samples, list[str]]:
    """Return the videos with their class indices, and the class names."""
    if annotations is not None:
        samples, names = read_annotations(annotations, root=root)
    else:
        paths = [path for path in find_videos(root) if len(Path(path).parts) > 1]
        names = sorted({Path(path).parts[0] for path in paths})
        samples = [(path, names.index(Path(path).parts[0])) for path in paths]
    if not names:
        raise AnnotationError(f"{annotations or root}: no class names; see --help for the layout.")
    return samples, names


def hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """Hold out every fifth video of a class, from the second video on."""
    parts: tuple[Samples, Samples] = ([], [])
    count: Counter[int] = Counter()
    for path, label in samples:
        count[label] += 1
        parts[count[label] % 5 == 2].append((path, label))
    if not parts[1]:
        raise AnnotationError("Each class has one video; expected a class with two or more.")
    return parts


def fine_tune(
    classifier: openvclip.ZeroShotClassifier, data: VideoDataset, args: Namespace
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the image tower with IWR; return the original CLIP and the average of the weights."""
    model = classifier.model.train()
    loader = DataLoader[object](data, args.batch_size, shuffle=True, num_workers=args.num_workers)
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():  # the text tower stays as it is
        parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    steps, total = len(loader), args.epochs * len(loader)
    schedule = OneCycleLR(optimizer, args.lr, total + 1, pct_start=0.1, cycle_momentum=False)
    iwr = openvclip.InterpolatedWeightRegularizer(model, optimizer, anchor=clip)
    swa = openvclip.SWATracker(model, start=args.epochs // 10 * steps, every=steps)

    def loss() -> Tensor:  # of the current batch; each step computes it at two sets of weights
        return cross_entropy(classifier(video), label)

    with progress_bar(total=total, desc="train") as bar:
        for epoch in range(args.epochs):
            data.set_epoch(epoch)
            for batch in loader:
                video, label = (tensor.to(args.device) for tensor in batch)
                bar.set_postfix(loss=f"{iwr.step(loss, max_grad_norm=1.0):.3f}", refresh=False)
                schedule.step()
                swa.update(model)
                bar.update()
    return clip, swa.averaged_state_dict()


def run(args: Namespace) -> None:
    """Read the videos, fine-tune, evaluate, and save the model."""
    samples, names = read_videos(args.videos, args.annotations)
    train, held_out = hold_out(samples)
    loaded = load_model(args.model, args.pretrained, expand=True, device=args.device)
    classifier = openvclip.ZeroShotClassifier(loaded.model, loaded.tokenizer, names)
    sampling, pixels = Sampling(args.frames, args.sampling_rate), loaded.transform
    dense, views = sampling.with_(sampler="dense"), sampling.with_(views=3)
    augment = pixels.with_(name="train")  # random crops, and half of the clips are mirrored
    data = VideoDataset(train, args.videos, transform=augment, sampling=dense)
    tests = VideoDataset(held_out, args.videos, transform=pixels, sampling=views, details=True)
    clip, average = fine_tune(classifier, data, args)
    loader = DataLoader[object](tests, args.batch_size, num_workers=args.num_workers)
    results = sweep(classifier, clip, average, loader, lams=sorted({0.0, args.lam, 1.0}))
    print(f"\n{len(train)} training videos, {len(tests)} held out\nλ     held-out accuracy")
    print(*(f"{lam:<5g} {result.top1:.2f}" for lam, result in results.items()), sep="\n")
    print(*(f"not read: {f.path}: {f.reason}\n" for f in data.failures + tests.failures))
    openvclip.interpolate_into(loaded.model, clip, average, args.lam)
    final = openvclip.VideoCLIP(loaded.model, loaded.tokenizer, sampling=views, transform=pixels)
    final.save_pretrained(args.out, method="openvclip", lam=args.lam)
    about = {"openvclip": final.contract.with_(method="openvclip", lam=0.0).to_json()}
    openvclip.save_checkpoint(average, args.out / "averaged.safetensors", metadata=about)
    labels = args.out / "classes.txt"
    labels.write_text("\n".join(names) + "\n", encoding="utf-8")
    words = ["openvclip", "predict", args.videos / held_out[0][0], "--model", args.out]
    words += ["--labels-file", labels]
    print(f"\nTry the model:\n{shlex.join(map(str, words))}")


@command
def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--videos", type=Path, required=True, help="folder of the videos")
    add("--annotations", type=Path, help="CSV file; default: each subfolder is a class")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--model", default="ViT-B-16-quickgelu", help="default: %(default)s")
    add("--pretrained", default="openai", help="tag or file of weights; default: %(default)s")
    add("--epochs", type=int, default=22, help="passes over the videos; default: %(default)s")
    add("--batch-size", type=int, default=8, help="videos in a step; default: %(default)s")
    add("--lr", type=float, default=3.33e-6, help="largest learning rate; default: %(default)s")
    add("--lam", type=float, default=0.5, help="weight of the original CLIP; default: %(default)s")
    add("--frames", type=int, default=8, help="frames of a clip; default: %(default)s")
    add("--sampling-rate", type=int, default=16, help="use every N-th frame at 30 fps; default: 16")
    add("--num-workers", type=int, default=2, help="decoding processes; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    torch.manual_seed(0)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
