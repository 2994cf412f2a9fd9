"""The card of a run: the front matter that the Hub reads, and the code that loads the run."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard as HubCard

from openvclip.checkpoints import Contract, Pixels
from openvclip.training import ModelCard
from openvclip.video.transforms import CLIP_MEAN, CLIP_STD

FACTS = {
    "name": "ViT-B-16",
    "lam": 0.5,
    "settings": {"method": "open-vclip"},
    "data": {"videos": 10},
    "results": {"top-1 | seen": 0.5},
    "files": {"`final.safetensors`": "the weights to use"},
}


def test_the_card_of_a_run_with_a_contract(tmp_path: Path) -> None:
    contract = Contract(
        "open_clip",
        "ViT-B-16",
        Pixels("released", 224, CLIP_MEAN, CLIP_STD),
        ("{}",),
        licence="mit",
        results={"top-1": 0.5},
    )
    ModelCard(**FACTS, contract=contract, commands={"accuracy": "run"}).write(tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    data = HubCard(text).data
    assert (data.library_name, data.license) == ("open_clip", "mit")
    assert data.eval_results[0].metric_value == 0.5
    assert 'VideoCLIP.from_pretrained(".")' in text
    assert text.index("VideoCLIP") < text.index("```bash\nrun\n```") < text.index("## Files")
    assert "| top-1 \\| seen | 50.0 % |" in text


def test_the_card_of_a_run_without_a_contract_has_no_front_matter() -> None:
    text = ModelCard(**FACTS).text()
    assert text.startswith("# ViT-B-16, fine-tuned on videos\n\n")
    assert "## Use" not in text
