"""A VideoCLIP in a process that was started anew, and the models that people wrap."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from openvclip import VideoCLIP
from openvclip.errors import CheckpointError, UsageError
from openvclip.video import VideoFrames
from tests.models.stored_models import PLAIN, StoredModel, of_open_clip, of_transformers

LABELS = ["archery", "surfing"]
PIXELS = np.random.default_rng(0).integers(0, 255, (8, 12, 16, 3), dtype=np.uint8)
VIDEO = VideoFrames(PIXELS, 30)


def use(stored: StoredModel) -> VideoCLIP:
    return VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)


@pytest.mark.parametrize("name", ["plain", "CLIPModel", "SiglipModel"])
def test_a_pickled_model_predicts_the_same(name: str) -> None:
    """A process that is spawned, and a worker of Ray or Spark, gets a pickled model."""
    clip = use(of_open_clip(PLAIN) if name == "plain" else of_transformers(name))
    want = clip.classify(VIDEO, LABELS).probabilities
    other = pickle.loads(pickle.dumps(clip))
    assert torch.equal(other.classify(VIDEO, LABELS).probabilities, want)
    assert other.contract == clip.contract


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("name", ["plain", "CLIPModel", "SiglipModel"])
def test_a_model_with_lora_layers_is_the_merged_model(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stored = of_open_clip(PLAIN) if name == "plain" else of_transformers(name)
    target = "c_fc" if name == "plain" else "q_proj"
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    wrapped = peft.get_peft_model(stored.model, config).eval()
    clip = VideoCLIP(wrapped, stored.tokenizer, contract=stored.contract)
    row = clip.classify(VIDEO, LABELS).probabilities
    segments = clip.timeline(VIDEO, LABELS).probabilities
    confidence = clip.calibrate([VIDEO] * 19, LABELS)
    with pytest.raises(UsageError, match=r"has adapters .*merge_and_unload"):
        clip.save_pretrained(tmp_path)
    merged = VideoCLIP(wrapped.merge_and_unload(), stored.tokenizer, contract=stored.contract)
    torch.testing.assert_close(merged.classify(VIDEO, LABELS).probabilities, row)
    torch.testing.assert_close(merged.timeline(VIDEO, LABELS).probabilities, segments)
    found = merged.calibrate([VIDEO] * 19, LABELS)
    assert found.threshold == pytest.approx(confidence.threshold, abs=1e-5)


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    clip = use(of_open_clip(PLAIN))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "model", Path("/proc/model")):
        with pytest.raises(CheckpointError, match=r"file|/proc"):
            clip.save_pretrained(folder)
