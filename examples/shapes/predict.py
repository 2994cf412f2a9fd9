"""Predict the class of a clip: ``python -m examples.shapes.predict WEIGHTS CLIP``."""

from __future__ import annotations

from pathlib import Path

import torch

import openvclip
from examples.shapes.experiment import FRAMES, make_classifier
from examples.shapes.model import MEAN, STD, create_model
from examples.shapes.raster import IMAGE_SIZE
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import command
from openvclip.models.modes import evaluation_mode
from openvclip.video import read_clip, transforms


def predict(weights: Path, clip: Path, top: int = 5) -> list[tuple[str, float]]:
    """Return the most probable of all 192 classes with their probabilities.

    Args:
        weights: a file of weights that ``python -m examples.shapes`` wrote.
        clip: a video file.
        top: number of classes to return.

    Raises:
        openvclip.OpenVCLIPError: a file cannot be read.
    """
    model, tokenizer = create_model(weights)
    openvclip.expand_temporal_attention(model)
    classifier = make_classifier(model, tokenizer, "all")
    to_input = transforms.build("released", IMAGE_SIZE, mean=MEAN, std=STD)
    video = to_input(read_clip(clip, num_frames=FRAMES, sampler="uniform"))
    with evaluation_mode(model), torch.no_grad():
        probabilities = classifier(video).softmax(dim=-1)[0]
    values, indices = probabilities.topk(top)
    names = [classifier.class_names[index] for index in indices.tolist()]
    return list(zip(names, values.tolist(), strict=True))


@command
def main(arguments: list[str] | None = None) -> None:
    """Print the prediction."""
    parser = Parser(prog="python -m examples.shapes.predict", description=__doc__)
    parser.add_argument(
        "weights",
        type=Path,
        help="file of weights, such as shapes-out/openvclip-shapes.safetensors",
    )
    parser.add_argument("clip", type=Path, help="a video file")
    parser.add_argument(
        "--top", type=int, default=5, help="number of classes to print (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        predictions = predict(args.weights, args.clip, args.top)
    except (openvclip.OpenVCLIPError, OSError) as error:
        raise SystemExit(str(error)) from error
    for name, probability in predictions:
        print(f"{probability:6.1%}  {name}")


if __name__ == "__main__":
    main()
