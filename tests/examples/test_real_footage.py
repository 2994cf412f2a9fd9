"""Real video files go through reading, transform, the expanded ViT-B/32 and the classifier."""

from __future__ import annotations

import csv

import open_clip
import torch
from torch.utils.data import DataLoader

import openvclip
from openvclip.evaluation import evaluate
from openvclip.video import Sampling, VideoDataset, transforms
from tests.helpers import CLIPS, needs_clips


@needs_clips
def test_all_clips_run_through_an_expanded_vit_b_32() -> None:
    with (CLIPS / "labels.csv").open(newline="") as file:
        listed = [(row["path"], row["label"]) for row in csv.DictReader(file)]
    assert len(listed) == 73
    names = sorted({label for _, label in listed})
    samples = [(path, names.index(label)) for path, label in listed]
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 2  # of its 12, to save time
    model = open_clip.CLIP(**config)
    openvclip.expand_temporal_attention(model)
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    classifier = openvclip.ZeroShotClassifier(model, tokenizer, names, ["a video of {}."])
    # Three frames, so that there are frames with one and with two neighbours.
    dataset = VideoDataset(
        samples,
        CLIPS,
        transform=transforms.build("released"),
        sampling=Sampling(num_frames=3),
        details=True,
    )
    result = evaluate(classifier, DataLoader(dataset, batch_size=4), progress=False)
    assert dataset.failures == []
    assert result.n_clips == 73
    assert result.targets.tolist() == [label for _, label in samples]
    assert -1 not in result.predictions.tolist()  # every clip gave finite logits
    assert len(set(result.predictions.tolist())) > 1  # and not all clips the same
