"""Loading models of kinds that only a later version of open_clip has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from openvclip.errors import ModelNameError, UnsupportedModelError
from openvclip.models import loading
from openvclip.models.loading import load_model
from tests.helpers import TEXT, VISION

END = 49407  # of open_clip's own tokenizer, which the configuration must agree with
MODERN = {
    "text_arch": "modern",
    "pool_type": "eos",
    "eos_id": END,
    "pad_id": 0,
    "vocab_size": 49408,
}


def files(folder: Path, name: str, **text: Any) -> tuple[str, Path]:
    """A configuration of a tiny model, and random weights for the model."""
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {**TEXT, **text}}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    kind = open_clip.CustomTextCLIP if text else open_clip.CLIP
    torch.save(kind(**config).state_dict(), folder / "weights.pt")
    return str(path), folder / "weights.pt"


@pytest.mark.parametrize(
    "error", [ImportError("Please install tiktoken."), ValueError("no pad id"), OSError("offline")]
)
def test_a_tokenizer_that_can_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Report 51: the tokenizers of new models need packages that openvclip does not install."""

    def fail(name: str) -> None:
        raise error

    name, weights = files(tmp_path, "no-tokenizer")
    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    text = f"The tokenizer of no-tokenizer can't be made: {str(error).rstrip('.')}. Install"
    with pytest.raises(ModelNameError, match=text):
        load_model(name, weights)


def test_a_modern_text_tower(tmp_path: Path) -> None:
    if not hasattr(open_clip, "ModernTextTransformer"):
        pytest.skip("this version of open_clip has one kind of text towers")
    loaded = load_model(*files(tmp_path, "modern", **MODERN), expand=True)
    assert type(loaded.model.text).__name__ == "ModernTextTransformer"
    assert loaded.model.encode_image(torch.zeros(1, 2, 3, 8, 8)).shape == (1, 2, 8)


def test_a_model_for_audio_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(open_clip, "CLAP"):
        pytest.skip("this version of open_clip has no models for audio")
    audio = {"model_type": "naflexvit", "patch_freq": 64, "patch_time": 4}
    sizes = {"naflexvit_cfg": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
    model = open_clip.CLAP(embed_dim=8, audio_cfg={**audio, **sizes}, text_cfg=dict(TEXT))
    monkeypatch.setattr(loading, "_build", lambda name, pretrained: model)
    for expand in (False, True):
        with pytest.raises(UnsupportedModelError, match="CLAP is a model for audio"):
            load_model("ViT-B-32", "weights", expand=expand)
