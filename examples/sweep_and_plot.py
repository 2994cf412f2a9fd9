r"""Evaluate the interpolation of CLIP and a fine-tuned model at many λ, and draw the trade-off.

    python sweep_and_plot.py --checkpoint averaged.safetensors --videos videos/ \
        --closed-set trained_classes.csv --zero-shot other_classes.csv --out tradeoff.png

Each list has lines ``path,class name``; the paths are below ``--videos``. ``--closed-set`` lists
videos of the classes that the model was fine-tuned on, ``--zero-shot`` lists videos of other
classes. Use videos that are not in the training set. If fine-tuning changed the text tower, the
class names are encoded again at each λ; ``--text original`` keeps the text tower of CLIP.

If training wrote how the model is used (a contract), the script uses the model in this way.

λ weighs the original CLIP. The printed table has a row for each λ. The numbers are top-1 accuracies
in %, among the classes of the list. λ = 0 is the fine-tuned model and λ = 1 is CLIP's weights in
the expanded model.

In the picture each point is one λ. The horizontal axis is the closed-set accuracy, and the vertical
axis is the zero-shot accuracy, so points to the upper right are better. Fine-tuning raises the
closed-set accuracy and often lowers the zero-shot accuracy. If the curve bends upwards, some λ is
better on other classes than λ = 0 and λ = 1. The star is ``--star`` (default: 0.5, the paper's λ).
Do not report the best point of such a curve: choose λ on other videos.
"""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import openvclip
from openvclip.cli.options.contract import load_with_contract, use_contract
from openvclip.commands import Parser, command
from openvclip.errors import AnnotationError
from openvclip.evaluation import FIGURE_LAMBDAS, Curve, sweep, tradeoff_figure
from openvclip.models.drawing import require_matplotlib
from openvclip.models.loading import LoadedModel, brings_weights, load_model
from openvclip.models.usage import pooling_of, sampling_of
from openvclip.video import Sampling, VideoDataset, read_annotations


def accuracies(loaded: LoadedModel, annotations: Path, args: Namespace) -> dict[float, float]:
    """Return the accuracy in [0, 1] at each λ on a list of videos. Each video is decoded once."""
    samples, names = read_annotations(annotations, root=args.videos)
    if names is None:
        raise AnnotationError(f"{annotations}: got class numbers, expected lines path,class name.")
    model, tuned, contract = loaded.model, loaded.tuned or {}, args.contract
    sampling = Sampling(args.frames, args.sampling_rate, views=args.views)
    more: dict[str, Any] = {}
    if contract is not None:
        sampling = sampling_of(contract)
        more = {"templates": contract.templates, "pooling": pooling_of(contract)}
    videos = VideoDataset(
        samples, args.videos, transform=loaded.transform, sampling=sampling, details=True
    )
    loader = DataLoader[Any](videos, args.batch_size, num_workers=args.num_workers)
    # The model has the weights of the original CLIP. After the sweep it has them again.
    classifier = openvclip.ZeroShotClassifier(model, loaded.tokenizer, names, **more)
    clip, title = model.state_dict(), annotations.stem
    results = sweep(
        classifier, clip, tuned, loader, lams=args.lam, text=args.text, description=title
    )
    for failure in videos.failures:
        print(f"not read, counts as wrong: {failure.path}: {failure.reason}")
    return {lam: result.top1 for lam, result in results.items()}


def run(args: Namespace) -> None:
    """Evaluate both lists, print the table and draw the picture."""
    require_matplotlib()
    use_contract(args)
    if args.contract is not None:
        loaded = load_with_contract(args, args.contract, torch.device(args.device))
    else:
        weights = None if brings_weights(args.model) else args.pretrained
        loaded = load_model(args.model, weights, checkpoint=args.checkpoint, device=args.device)
    closed, zero = (accuracies(loaded, path, args) for path in (args.closed_set, args.zero_shot))
    print("λ     closed set  zero-shot")
    for lam in args.lam:
        print(f"{lam:<5g} {100 * closed[lam]:<11.1f} {100 * zero[lam]:.1f}")
    x, y = (np.array([[column[lam] for lam in args.lam]]) for column in (closed, zero))
    star = args.lam.index(args.star) if args.star in args.lam else None
    curve = Curve(args.checkpoint.stem, args.lam, x, y, star, highlighted=True)
    tradeoff_figure([curve], args.out, title="Numbers are λ, the weight of the original CLIP")
    print(f"wrote {args.out}")


@command
def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="the fine-tuned weights, not interpolated")
    add("--closed-set", type=Path, required=True, help="CSV file of videos of trained classes")
    add("--zero-shot", type=Path, required=True, help="CSV file of videos of other classes")
    add("--videos", type=Path, required=True, help="folder of the videos")
    add("--out", type=Path, default=Path("tradeoff.png"), help="picture; default: %(default)s")
    lams = [*FIGURE_LAMBDAS, 1.0]
    add("--lam", type=float, nargs="+", default=lams, help="default: %(default)s")
    add("--star", type=float, default=0.5, help="λ with a star; default: %(default)s")
    add("--model", default="ViT-B-16-quickgelu", help="default: %(default)s")
    add("--pretrained", default="openai", help="tag or file of CLIP's weights; default: openai")
    text = "weights that encode the class names; default: %(default)s, those at each λ"
    add("--text", choices=("own", "original"), default="own", help=text)
    add("--frames", type=int, default=8, help="frames of a clip; default: %(default)s")
    add("--sampling-rate", type=int, default=16, help="use every N-th frame at 30 fps; default: 16")
    add("--views", type=int, default=3, help="clips of a video; default: %(default)s")
    add(
        "--override",
        action="store_true",
        help="use flags that contradict the checkpoint's contract",
    )
    add("--batch-size", type=int, default=8, help="videos at a time; default: %(default)s")
    add("--num-workers", type=int, default=2, help="decoding processes; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args(arguments)
    if "star" in args.given and args.star not in args.lam:
        parser.error(f"--star {args.star:g}: expected one of the values of --lam")
    run(args)


if __name__ == "__main__":
    main()
