"""The Hub reads the front matter of a card, the code of a card runs, and changes are noticed."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard

from openvclip.checkpoints import Base, Contract, Expansion, Pixels
from openvclip.models.model_card import card_of, is_unchanged
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD

PIXELS = Pixels("released", 224, CLIP_MEAN, CLIP_STD)


def contract(**changes: Any) -> Contract:
    fields = {
        "library": "open_clip",
        "model": "ViT-B-16-quickgelu",
        "pixels": PIXELS,
        "templates": ("a video of {}.",),
        "expansion": Expansion(),
        "method": "open-vclip",
        "lam": 0.5,
        "base": Base("ViT-B-16-quickgelu", "openai"),
        "data": {"dataset": "K400", "clips": 240_000},
        "results": {"UCF-101 | top-1": 0.834, "note": "three views"},
        "licence": "MIT",
    }
    return Contract(**{**fields, **changes})


def test_the_hub_reads_the_front_matter() -> None:
    data = ModelCard(card_of(contract(), "my-model", "hf-hub:me/my-model")).data
    assert data.library_name == "open_clip"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert {"openvclip", "video-classification"} <= set(data.tags)
    assert data.base_model == "timm/vit_base_patch16_clip_224.openai"
    assert data.base_model_relation == "finetune"
    assert data.license == "mit"
    assert data.datasets == ["K400"]
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value) == ("UCF-101 | top-1", 0.834)
    assert (result.dataset_name, result.dataset_type) == ("K400", "k400")
    (widget,) = data.widget
    assert widget["candidate_labels"]


def test_what_is_not_known_is_left_out() -> None:
    plain = contract(base=None, method=None, lam=None, data={}, results={}, licence=None)
    card = card_of(plain, "my-model", ".")
    data = ModelCard(card).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "datasets", "model-index"} & set(
        data
    )
    assert "| λ" not in card
    assert "None" not in card
    data = ModelCard(card_of(contract(licence="My own terms"), "m", ".")).data
    assert (data.license, data["license_name"]) == ("other", "my-own-terms")
    data = ModelCard(
        card_of(contract(base=Base("/home/me/clip"), library="transformers"), "m", ".")
    )
    assert data.data.base_model is None


def test_the_text_says_how_the_model_is_used() -> None:
    card = card_of(contract(), "my-model", "hf-hub:me/my-model")
    assert "# my-model" in card
    assert "each frame also attends to one frame before and after" in card
    assert r"| UCF-101 \| top-1 | 83.4 % |" in card
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    compile(code, "card", "exec")
    assert 'from_pretrained("hf-hub:me/my-model")' in code
    assert 'open_clip.get_tokenizer("hf-hub:me/my-model")' in code
    hugging_face = contract(library="transformers", base=Base("openai/clip-vit-base-patch16"))
    card = card_of(hugging_face, "my-model", "hf-hub:me/my-model")
    assert 'AutoProcessor.from_pretrained("me/my-model")' in card
    assert ModelCard(card).data.base_model == "openai/clip-vit-base-patch16"


def test_a_changed_card_is_recognised() -> None:
    card = card_of(contract(), "my-model", ".")
    assert is_unchanged(card)
    for changed in (card + "More.", "More.\n" + card, card.replace("K400", "K600"), "", "# Mine"):
        assert not is_unchanged(changed)
