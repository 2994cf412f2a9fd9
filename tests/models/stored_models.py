"""Tiny models of each kind that can be handed over, with their tokenizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer

import openvclip
from openvclip.models.folders import StoredModel
from openvclip.models.open_clip_config import build
from openvclip.models.preprocess import transform_for
from openvclip.models.saving import save_stored
from openvclip.models.tokenizers import as_tokenizer
from openvclip.models.usage import contract_of
from openvclip.video.sampling import Sampling
from tests.helpers import randomise

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1}
PLAIN: dict[str, Any] = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
QUICK = {**PLAIN, "quick_gelu": True}
CUSTOM_TEXT = {**PLAIN, "custom_text": True, "init_logit_bias": -10}
TIMM: dict[str, Any] = {
    "embed_dim": 8,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "linear",
        "image_size": 32,
    },
    "text_cfg": TEXT,
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}


def stored(model: Any, tokenizer: Any, name: str = "tiny", **expansion: Any) -> StoredModel:
    """Return a model with random weights and settings that no default has."""
    randomise(model, 1, 0.05).eval()
    openvclip.expand_temporal_attention(
        model, **({"window": 2, "boundary": "mask", "layers": [1]} | expansion)
    )
    contract = contract_of(
        model,
        name,
        transform_for(model).with_(name="clip"),
        sampling=Sampling(num_frames=4, sampling_rate=2, views=1, target_fps=12.5),
        templates=["a video of {}.", "{}"],
        method="open-vclip",
        lam=0.25,
    )
    return StoredModel(model, tokenizer, contract)


@cache
def simple_tokenizer() -> Any:
    return open_clip.SimpleTokenizer(context_length=TEXT["context_length"])


def of_open_clip(config: dict[str, Any]) -> StoredModel:
    return stored(build(config, PREPROCESS), simple_tokenizer())


def with_hf_text(folder: Path) -> StoredModel:
    """Return an open_clip model whose text tower and tokenizer are of transformers."""
    words = pytest.importorskip("tests.tiny_transformers")
    transformers = words.transformers
    text = transformers.RobertaConfig(
        **{**words.TEXT, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0}
    )
    text.save_pretrained(folder)
    words.make_tokenizer().save_pretrained(folder)
    config = {
        "embed_dim": 8,
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": str(folder),
            "hf_tokenizer_name": str(folder),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "mlp",
            "context_length": 12,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    }
    tokenizer = HFTokenizer(str(folder), context_length=12, clean="canonicalize")
    if not hasattr(tokenizer.tokenizer, "batch_encode_plus") and old_open_clip():
        pytest.skip("the HFTokenizer of open_clip 3.1 needs transformers 4")
    return stored(build(config, PREPROCESS), tokenizer)


def old_open_clip() -> bool:
    return "batch_encode_plus" in HFTokenizer.__call__.__code__.co_names


def of_transformers(name: str) -> StoredModel:
    words = pytest.importorskip("tests.tiny_transformers")
    model = words.make(name)
    return stored(model, as_tokenizer(words.make_tokenizer(), model), name)


OPEN_CLIP: dict[str, Callable[[Path], StoredModel]] = {
    "plain": lambda folder: of_open_clip(PLAIN),
    "quick_gelu": lambda folder: of_open_clip(QUICK),
    "custom_text": lambda folder: of_open_clip(CUSTOM_TEXT),
    "timm": lambda folder: of_open_clip(TIMM),
    "hf_text": with_hf_text,
}
TRANSFORMERS: dict[str, Callable[[Path], StoredModel]] = {
    "CLIPModel": lambda folder: of_transformers("CLIPModel"),
    "SiglipModel": lambda folder: of_transformers("SiglipModel"),
}


def video_of(model: StoredModel, frames: int = 3) -> torch.Tensor:
    size = model.contract.pixels.size
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model() -> StoredModel:
    return of_open_clip(PLAIN)


@pytest.fixture(scope="module")
def saved(model: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_stored(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved folder, to damage."""
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"
