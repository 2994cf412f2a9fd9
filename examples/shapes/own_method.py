"""Put your own method into the comparison: a loss of your own, and a merge of your own.

``python -m examples.shapes.own_method --out own-quick`` compares them with CLIP, FINE-TUNE and
Open-VCLIP in one cell, in about 2 minutes on 2 cores. With ``--full --only "my loss" "my merge"``
each of them tries its settings on the development classes, like all other methods, and runs in
all cells. Copy this file and change the two functions.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.shapes.trials.command import main
from examples.shapes.trials.registry import Method, Runs, Training, register
from examples.shapes.trials.workshop import State, Trained, Workshop
from openvclip.training.methods import choose_trained


def smoothed(workshop: Workshop, *, lr: float, smoothing: float) -> Trained:
    """Fine-tune with label smoothing and IWR."""
    model, classifier, _ = workshop.start()
    choose_trained(model, "finetune")

    def loss(video: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(classifier(video), label, label_smoothing=smoothing)

    return workshop.fit(model, classifier, lr=lr, loss=loss, iwr={"weight": 0.5})


def trimmed(clip: State, runs: Runs, *, keep: float) -> State:
    """Keep the largest changes of each entry; the others go back to the original CLIP."""
    merged = {}
    for name, tuned in runs["plain"]["last"].items():
        change = tuned - clip[name]
        count = max(1, round(keep * change.numel()))
        smallest = change.abs().flatten().topk(count).values[-1]
        merged[name] = torch.where(change.abs() >= smallest, tuned, clip[name])
    return merged


# At most 4 settings for a training, and 24 points: settings times own numbers times λ.
GRID = tuple({"lr": lr, "smoothing": amount} for lr in (5e-4, 1e-3) for amount in (0.05, 0.1))
register(Training("smoothed", smoothed, GRID, passes=2.0))
register(Method("my loss", ("smoothed",)))
KEEP = tuple({"keep": share} for share in (0.5, 0.3))
register(Method("my merge", ("plain",), trimmed, KEEP, lams=(0.0, 0.3, 0.5)))

if __name__ == "__main__":
    rows = ["CLIP", "FINE-TUNE", "Open-VCLIP", "my loss", "my merge"]
    chosen = [] if {"--only", "--list"} & {*sys.argv} else ["--only", *rows]
    main([*sys.argv[1:], *chosen])
