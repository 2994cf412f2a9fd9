r"""Fine-tune an image CLIP with IWR, average its weights, and interpolate with the original CLIP.

    python finetune_image_clip.py --images train/ --validation val/ --test test/ other/ --out run/
    python finetune_image_clip.py --model transformers:openai/clip-vit-base-patch32 ...

Each folder has a subfolder of images for each class. The loss is the cross-entropy over the class
names; with ``--captions`` (lines ``path,caption``), the loss is CLIP's contrastive loss.
``fine_tune`` takes any data set of ``(pixels [1, C, H, W], index into texts)``.

λ weighs the original CLIP. The script takes the λ with the highest accuracy on ``--validation``; of
several, the largest. The table has the top-1 accuracy at λ = 0, at this λ, and at λ = 1. Report the
test columns: λ was chosen on the validation images. ``VideoCLIP.from_pretrained`` loads ``--out``.
"""

from __future__ import annotations

import shlex
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import ImageFolder, default_loader  # type: ignore[import-untyped]
from torchvision.transforms.functional import pil_to_tensor  # type: ignore[import-untyped]

import openvclip
from openvclip.checkpoints.contract_files import CONTRACT_FILE, CONTRACT_KEY
from openvclip.commands import Parser, command, progress_bar, refuse_unused
from openvclip.evaluation import evaluate
from openvclip.models import loading
from openvclip.models.features import encode_text, similarity_logits
from openvclip.towers import encode_images
from openvclip.video import read_annotations

TEMPLATE = "a photo of a {}."


def read_image(path: str) -> Any:
    """Return an image as uint8 ``[1, C, H, W]``: a video of one frame, as transforms expect."""
    return pil_to_tensor(default_loader(path))[None]


def encode_texts(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return unit features ``[N, D]`` from the weights that the model has now."""
    features = [encode_text(model, tokens) for tokens in tokenizer(texts).split(256)]
    return normalize(torch.cat(features), dim=-1)


def fine_tune(
    model: Any, tokenizer: Any, data: Dataset[Any], texts: list[str], args: Namespace
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train with IWR; return the original CLIP and the average of the weights of the epochs."""
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.num_workers)
    image_tower = ("visual.", "vision_model.", "visual_projection.", "logit_scale")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(args.train_text or name.startswith(image_tower))
    frozen = None if args.train_text else encode_texts(model, tokenizer, texts)
    clip = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    iwr = openvclip.InterpolatedWeightRegularizer(model.train(), optimizer, anchor=clip)
    swa = openvclip.SWATracker(model, start=args.epochs // 10 * len(loader), every=len(loader))

    def loss() -> torch.Tensor:  # of the current batch, at the weights that the model has now
        used = label.tolist() if args.captions else list(range(len(texts)))
        wanted = [texts[index] for index in used]
        text = encode_texts(model, tokenizer, wanted) if frozen is None else frozen[used]
        logits = similarity_logits(model, normalize(encode_images(model, pixels), dim=-1), text)
        if not args.captions:
            return cross_entropy(logits, label)
        matches = normalize((label[:, None] == label).float(), p=1)  # equal captions match too
        return (cross_entropy(logits, matches) + cross_entropy(logits.T, matches)) / 2

    batches = (batch for _ in range(args.epochs) for batch in loader)
    for batch in (bar := progress_bar(batches, desc="train", total=args.epochs * len(loader))):
        pixels, label = batch[0].flatten(0, 1).to(args.device), batch[1].to(args.device)
        bar.set_postfix(loss=f"{iwr.step(loss, max_grad_norm=1.0):.3f}", refresh=False)
        swa.update(model)
    return clip, swa.averaged_state_dict()


def accuracy(model: Any, tokenizer: Any, data: Any, args: Namespace) -> float:
    """Return the top-1 accuracy. Text features are recomputed: λ may change the text tower."""
    loader = DataLoader[Any](data, args.batch_size, num_workers=args.num_workers)
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, data.classes, [TEMPLATE])
    return evaluate(classifier, loader, progress=False).top1


def run(args: Namespace) -> None:
    """Fine-tune, choose λ, evaluate, and save the model."""
    name = loading.name_of_transformers(args.hf) if args.hf else args.model
    whole = "with a model that has weights already" if loading.brings_weights(name) else ""
    refuse_unused(args.given, {"model": "with --hf" if args.hf else "", "pretrained": whole})
    loaded = loading.load_model(name, None if whole else args.pretrained)
    model, tokenizer, transform = loaded.model, loaded.tokenizer, loaded.transform
    test = transform.with_(name="clip")
    folders = [ImageFolder(root, test, loader=read_image) for root in (args.validation, *args.test)]
    data = ImageFolder(args.images, transform.with_(name="train"), loader=read_image)
    texts: Any = [TEMPLATE.format(name) for name in data.classes]
    if args.captions:
        samples, texts = read_annotations(args.captions)
        data.samples = [(str(args.images / path), index) for path, index in samples]
    clip, average = fine_tune(model.to(args.device), tokenizer, data, texts, args)
    scores = []
    for lam in progress_bar([step / 10 for step in range(11)], desc="choose λ"):
        openvclip.interpolate_into(model, clip, average, lam)
        scores.append((accuracy(model, tokenizer, folders[0], args), lam))
    chosen = max(scores)[1]
    print("λ     validation  test folders")
    for lam in sorted({0.0, chosen, 1.0}):
        openvclip.interpolate_into(model, clip, average, lam)
        cells = "".join(f"{accuracy(model, tokenizer, data, args):<12.3f}" for data in folders)
        print(f"{lam:<5g} {cells}{'chosen' if lam == chosen else ''}")
    openvclip.interpolate_into(model, clip, average, chosen)
    final = openvclip.VideoCLIP(model, tokenizer, transform=test, templates=[TEMPLATE])
    path, out = args.out / "model.safetensors", shlex.quote(str(args.out))
    final.describe_folder(args.out, path.name, lam=chosen)
    header = {"format": "pt", CONTRACT_KEY: (args.out / CONTRACT_FILE).read_text(encoding="utf-8")}
    openvclip.save_checkpoint(model.state_dict(), path, metadata=header)
    (args.out / "classes.txt").write_text("\n".join(data.classes) + "\n", encoding="utf-8")
    print(f"\nTry it: openvclip predict IMAGE --model {out} --labels-file {out}/classes.txt")


@command
def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="training images")
    add("--validation", type=Path, required=True, help="images on which λ is chosen")
    add("--test", type=Path, nargs="+", default=[], help="images that are only evaluated")
    add("--captions", type=Path, help="a CSV file; default: train with the class names")
    add("--out", type=Path, required=True, help="folder for the model")
    add("--model", default="ViT-B-16-quickgelu", help="name or folder; default: %(default)s")
    add("--pretrained", default="openai", help="tag or file of weights; default: %(default)s")
    add("--hf", help="name or folder of a CLIP of transformers, in place of --model")
    add("--train-text", action="store_true", help="train the text tower; default: it is frozen")
    add("--epochs", type=int, default=10, help="passes over the images; default: %(default)s")
    add("--batch-size", type=int, default=64, help="images in a step; default: %(default)s")
    add("--lr", type=float, default=1e-5, help="learning rate; default: %(default)s")
    add("--num-workers", type=int, default=2, help="reading processes; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    torch.manual_seed(0)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
