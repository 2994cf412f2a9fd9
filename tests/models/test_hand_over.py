"""VideoCLIP is saved, loaded and uploaded with everything that its use on videos needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import openvclip
from openvclip.checkpoints import read_contract
from openvclip.errors import ContractError, HubError, UsageError
from openvclip.video import VideoFrames
from tests.helpers import same_bits
from tests.models.fake_hub import TOKEN, fake_hub
from tests.models.stored_models import PLAIN, TRANSFORMERS, of_open_clip

LABELS = ["archery", "horse race"]


def clip_of(kind: str, folder: Path) -> openvclip.VideoCLIP:
    stored = of_open_clip(PLAIN) if kind == "plain" else TRANSFORMERS[kind](folder)
    return openvclip.VideoCLIP(stored.model, stored.tokenizer, contract=stored.contract)


def video(seed: int = 0) -> VideoFrames:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (9, 12, 10, 3), generator=generator, dtype=torch.uint8)
    return VideoFrames(frames, fps=25.0)


@pytest.mark.parametrize("kind", ["plain", "CLIPModel", "SiglipModel"])
def test_a_loaded_model_predicts_the_same(kind: str, tmp_path: Path) -> None:
    before = clip_of(kind, tmp_path)
    before.save_pretrained(tmp_path / "out", licence="mit", results={"seen": 0.5})
    after = openvclip.VideoCLIP.from_pretrained(tmp_path / "out")
    assert repr(after) == repr(before)
    predictions = [clip.classify(video(), LABELS) for clip in (before, after)]
    assert same_bits(predictions[0].probabilities, predictions[1].probabilities)
    assert same_bits(before.encode_video(video()), after.encode_video(video()))
    assert same_bits(before.encode_text(LABELS), after.encode_text(LABELS))
    assert (after.contract.licence, after.contract.results) == ("mit", {"seen": 0.5})
    assert (before.contract.licence, before.contract.results) == (None, {})


def test_settings_that_were_changed_travel(tmp_path: Path) -> None:
    stored = of_open_clip(PLAIN)
    clip = openvclip.VideoCLIP(stored.model, stored.tokenizer, templates=["{}!"], pooling="frames")
    clip.save_pretrained(tmp_path)
    loaded = openvclip.VideoCLIP.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert (loaded.templates, loaded.pooling) == (("{}!",), "frames")
    assert loaded.expansion == clip.expansion
    assert next(loaded.model.parameters()).dtype == torch.float64


def test_the_hub_and_the_code_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = clip_of("plain", tmp_path)
    clip.save_pretrained(tmp_path / "out", title="My model")
    with fake_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        address = clip.push_to_hub(
            "user/name", token=TOKEN, licence="mit", title="My model", max_shard_size=10**9
        )
        assert address.startswith(hub.address)
        loaded = openvclip.VideoCLIP.from_pretrained("hf-hub:user/name", revision="main")
        assert loaded.contract.licence == "mit"
        cards = [(tmp_path / "out" / "README.md").read_text()]
        cards.append(hub.files["user/name"]["README.md"].decode())
        assert all("# My model" in card for card in cards)
        local, remote = (re.findall(r"```python\n(.*?)```", card, re.DOTALL) for card in cards)
        monkeypatch.chdir(tmp_path / "out")
        monkeypatch.setattr(openvclip.VideoCLIP, "classify", lambda self, *args: "archery")
        for block in [*local, remote[0]]:
            exec(block, {})
    assert capsys.readouterr().out == "archery\n" * 2


def test_facts_that_can_not_be_stored(tmp_path: Path) -> None:
    clip = clip_of("plain", tmp_path)
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"license": "mit"}, UsageError, r"has no license \(did you mean licence\?\)"),
        ({"expansion": None}, UsageError, "has no expansion"),
        ({"results": [0.5]}, ContractError, r"results is \[0.5\]"),
    )
    for facts, error, text in cases:
        with pytest.raises(error, match=text):
            clip.save_pretrained(tmp_path / "out", **facts)
        with pytest.raises(error, match=text):
            clip.push_to_hub("user/name", token=TOKEN, **facts)
    assert not (tmp_path / "out").exists()
    with pytest.raises(HubError, match="not the name of a repository"):
        clip.push_to_hub("one/two/three")
    clip.templates = (str.upper,)
    with pytest.raises(openvclip.errors.ClassNamesError, match="a function, which can't be stored"):
        clip.save_pretrained(tmp_path / "out")


def test_the_name_of_a_known_model_is_found(tmp_path: Path) -> None:
    (tmp_path / "tiny-known-by-name.json").write_text(json.dumps({**PLAIN, "embed_dim": 6}))
    open_clip.add_model_config(tmp_path / "tiny-known-by-name.json")
    model = open_clip.create_model("tiny-known-by-name")
    openvclip.VideoCLIP(model).save_pretrained(tmp_path / "out")
    contract = read_contract(tmp_path / "out")
    assert contract is not None
    assert contract.model == "tiny-known-by-name"
