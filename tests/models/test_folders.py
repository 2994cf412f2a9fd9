"""A folder gives back the model that was saved, bit for bit, also through its own library."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import openvclip
from openvclip.checkpoints import Expansion, read_contract, save_checkpoint
from openvclip.checkpoints.contract_files import CONTRACT_FILE, CONTRACT_KEY
from openvclip.errors import (
    UsageError,
)
from openvclip.models.features import encode_text
from openvclip.models.folders import RUN_CONFIG_FILE, StoredModel, load_stored
from openvclip.models.open_clip_config import build, config_of
from openvclip.models.saving import SaveOptions, describe_folder, save_stored
from openvclip.models.usage import pixels_section
from openvclip.towers import encode_frames, encode_images
from openvclip.video import transforms
from tests.helpers import assert_same_state, randomise, same_bits
from tests.models.stored_models import (
    OPEN_CLIP,
    PLAIN,
    QUICK,
    TRANSFORMERS,
    of_open_clip,
    video_of,
)

TEXTS = ["a photo of archery.", "the HORSE race", ""]
WEIGHTS = "open_clip_model.safetensors"


def features(model: Any, stored: StoredModel) -> tuple[Tensor, Tensor]:
    """Features of images and of texts."""
    with torch.no_grad():
        images = encode_images(model.eval(), video_of(stored)[0])
        return images, encode_text(model, stored.tokenizer(TEXTS))


def assert_same(a: StoredModel, b: StoredModel) -> None:
    """Same weights, contract, tokens, and features of videos, images and texts, bit for bit."""
    assert_same_state(dict(a.model.state_dict()), dict(b.model.state_dict()))
    assert torch.equal(a.tokenizer(TEXTS), b.tokenizer(TEXTS))
    with torch.no_grad():
        frames = [encode_frames(s.model, video_of(a)) for s in (a, b)]
    assert same_bits(*frames)
    assert all(map(same_bits, features(a.model, a), features(b.model, b)))
    assert a.contract.with_(weights=None) == b.contract.with_(weights=None)


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_a_model_of_open_clip_comes_back_and_open_clip_loads_it(kind: str, tmp_path: Path) -> None:
    stored, out = OPEN_CLIP[kind](tmp_path / "text"), tmp_path / "out"
    save_stored(stored, out)
    assert_same(stored, load_stored(out))
    plain, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    assert all(map(same_bits, features(plain, stored), features(stored.model, stored)))
    if kind in ("plain", "hf_text"):
        tokens = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
        assert torch.equal(tokens, stored.tokenizer(TEXTS))
    assert (plain.visual.image_mean, plain.visual.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert "bilinear" in str(preprocess)


@pytest.mark.parametrize(
    ("kind", "name", "short_side"),
    [
        ("CLIPModel", "clip", 40),
        ("CLIPModel", "squash", None),
        ("CLIPModel", "squash_bilinear", None),
        ("SiglipModel", "squash", None),
        ("SiglipModel", "squash_bilinear", None),
    ],
)
def test_transformers_resizes_images_as_the_contract_says(
    kind: str, name: str, short_side: int | None, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    stored = TRANSFORMERS[kind](tmp_path)
    made = transforms.build(name, stored.contract.pixels.size, short_side=short_side)
    contract = stored.contract.with_(pixels=pixels_section(made))
    save_stored(StoredModel(stored.model, stored.tokenizer, contract), tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    image = torch.randint(256, (1, 3, 24, 40), dtype=torch.uint8)
    expected = made(image)
    got = processor(images=[image[0]], return_tensors="pt").pixel_values
    # The processors round the pixels of bilinear resizing in another way.
    level = 1.1 / 255 / made.std[0] if name == "squash_bilinear" else 1e-5
    torch.testing.assert_close(got, expected, rtol=0, atol=level)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_model_of_transformers_comes_back_and_transformers_loads_it(
    kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    stored = TRANSFORMERS[kind](tmp_path)
    save_stored(stored, tmp_path / "out")
    assert_same(stored, load_stored(tmp_path / "out"))
    plain = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    assert all(map(same_bits, features(plain, stored), features(stored.model, stored)))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = stored.contract.pixels
    assert tuple(processor.image_processor.image_mean) == pixels.mean
    assert tuple(processor.image_processor.image_std) == pixels.std
    assert processor.tokenizer("a video").input_ids == [2, 4, 7, 3]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert CONTRACT_KEY in file.metadata()


def test_the_contract_is_beside_the_weights_and_in_their_header(
    model: StoredModel, saved: Path
) -> None:
    assert read_contract(saved) == model.contract.with_(weights=WEIGHTS)
    assert read_contract(saved / WEIGHTS) == model.contract


def test_the_weights_alone_carry_the_contract(model: StoredModel, folder: Path) -> None:
    (folder / CONTRACT_FILE).unlink()
    assert_same(model, load_stored(folder))
    assert_same(model, load_stored(folder / WEIGHTS))


@pytest.mark.parametrize("kind", ["plain", "CLIPModel"])
def test_a_large_model_is_saved_in_shards(kind: str, tmp_path: Path) -> None:
    stored = (OPEN_CLIP | TRANSFORMERS)[kind](tmp_path)
    save_stored(stored, tmp_path / "out")
    save_stored(stored, tmp_path / "out", SaveOptions(max_shard_size=10_000))
    contract = read_contract(tmp_path / "out")
    assert contract is not None
    assert str(contract.weights).endswith(".safetensors.index.json")
    names = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(names) > 1
    assert all("-of-" in name for name in names)  # the file of the first call is gone
    assert_same(stored, load_stored(tmp_path / "out"))
    save_stored(stored, tmp_path / "out")  # the shards are gone
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert_same(stored, load_stored(tmp_path / "out"))
    with pytest.raises(UsageError, match="max_shard_size=0: expected a number of bytes"):
        save_stored(stored, tmp_path / "none", SaveOptions(max_shard_size=0))


def test_dtype_and_device(saved: Path) -> None:
    assert {p.dtype for p in load_stored(saved).model.parameters()} == {torch.float32}
    half = load_stored(saved, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_models_of_two_threads_do_not_disturb_each_other(
    model: StoredModel, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load_stored, [saved] * 3))
        list(pool.map(save_stored, loaded[:2], [tmp_path / "out"] * 2))
    for other in [*loaded, load_stored(tmp_path / "out")]:
        assert_same(model, other)
    assert not list((tmp_path / "out").glob(".*"))
    assert caplog.records == []


# --- other sources -------------------------------------------------------------------------------


def test_the_folder_of_a_training_run_names_its_weights(model: StoredModel, tmp_path: Path) -> None:
    state = model.model.state_dict()
    save_checkpoint(state, tmp_path / "final.safetensors")
    save_checkpoint({n: v + 1 for n, v in state.items()}, tmp_path / "averaged.safetensors")
    describe_folder(model, tmp_path, "final.safetensors")
    assert_same(model, load_stored(tmp_path))
    # open_clip would load averaged.safetensors, so it must not take the folder for its own.
    assert (tmp_path / RUN_CONFIG_FILE).is_file()
    with pytest.raises(FileNotFoundError, match="config file missing"):
        open_clip.create_model(f"local-dir:{tmp_path}")
    save_stored(load_stored(tmp_path), tmp_path / "out")
    assert_same(model, load_stored(tmp_path / "out"))


def test_a_run_with_a_model_that_open_clip_knows_needs_no_configuration(
    tmp_path: Path,
) -> None:
    known = {**PLAIN, "embed_dim": 12}
    model = of_open_clip(known)
    (tmp_path / "known-tiny.json").write_text(json.dumps(known))
    open_clip.add_model_config(tmp_path / "known-tiny.json")
    save_checkpoint(model.model.state_dict(), tmp_path / "final.safetensors")
    contract = model.contract.with_(model="known-tiny", weights="final.safetensors")
    (tmp_path / CONTRACT_FILE).write_text(contract.to_json())
    loaded = load_stored(tmp_path)
    assert_same(StoredModel(model.model, model.tokenizer, contract), loaded)
    assert loaded.model.visual.image_mean == list(contract.pixels.mean)
    named = load_stored("known-tiny", tmp_path / "final.safetensors")
    assert_same(loaded, named)  # the contract of the file counts
    (tmp_path / CONTRACT_FILE).unlink()
    named = load_stored("known-tiny", tmp_path / "final.safetensors")
    assert (named.contract.model, named.contract.expansion) == ("known-tiny", None)


def test_a_folder_of_another_tool_has_the_released_settings(folder: Path, saved: Path) -> None:
    (folder / CONTRACT_FILE).unlink()
    save_checkpoint(load_stored(saved).model.state_dict(), folder / WEIGHTS)
    loaded = load_stored(folder)
    assert loaded.contract.expansion is None
    assert loaded.contract.pixels.name == "released"
    assert loaded.contract.pixels.mean == (0.5, 0.4, 0.3)
    words = pytest.importorskip("tests.tiny_transformers")
    words.save_folder("SiglipModel", folder / "siglip")
    loaded = load_stored(folder / "siglip")
    assert loaded.contract.library == "transformers"
    assert loaded.contract.pixels.mean == (0.5, 0.5, 0.5)


# --- configurations of open_clip -----------------------------------------------------------------


def test_the_configuration_of_a_known_model_is_found() -> None:
    name = "ViT-S-32-alt"
    config = open_clip.get_model_config(name)
    plain = build(config, device="meta")
    del plain.__dict__["_openvclip_config"]
    assert config_of(openvclip.expand_temporal_attention(plain), "mine") == config


def test_a_configuration_that_builds_another_model_is_refused(model: StoredModel) -> None:
    with pytest.raises(UsageError, match=r"another model: GELU is not QuickGELU in visual\."):
        config_of(model.model, given=QUICK)
    wide = {**PLAIN, "vision_cfg": {**PLAIN["vision_cfg"], "width": 32}}
    with pytest.raises(UsageError, match="has the shape"):
        config_of(model.model, given=wide)
    heads = {**PLAIN, "text_cfg": {**PLAIN["text_cfg"], "heads": 4}}
    with pytest.raises(UsageError, match=r"head_dim is 4 and not 1 in transformer.resblocks"):
        config_of(model.model, given=heads)
    with pytest.raises(UsageError, match="can't build"):
        config_of(model.model, given={**PLAIN, "vision_cfg": {"layers": "x"}})
    assert config_of(model.model, given=PLAIN) == PLAIN


def test_a_model_without_a_known_configuration_needs_it(tmp_path: Path) -> None:
    own = of_open_clip({**PLAIN, "embed_dim": 4})
    del own.model.__dict__["_openvclip_config"]
    with pytest.raises(UsageError, match=r"is not known.*Give config= with the dictionary"):
        save_stored(own, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    save_stored(own, tmp_path / "out", SaveOptions(config={**PLAIN, "embed_dim": 4}))
    assert_same(own, load_stored(tmp_path / "out"))


# --- a kill, and other files in the folder --------------------------------------------------------


def test_a_save_that_was_killed_is_finished_by_the_next_reader(
    folder: Path, model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = load_stored(folder)
    randomise(changed.model, 5)
    new = StoredModel(changed.model, changed.tokenizer, changed.contract.with_(lam=0.75))
    moved: list[str] = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).parent == folder:  # the weights were written; now the files are moved
            if moved:
                raise KeyboardInterrupt
            moved.append(Path(target).name)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save_stored(new, folder)
    assert len(moved) == 1
    assert_same(new, load_stored(folder))
    assert not list(folder.glob(".*"))


def test_a_model_of_another_library_replaces_the_old_one(folder: Path, tmp_path: Path) -> None:
    other = TRANSFORMERS["CLIPModel"](tmp_path)
    save_stored(other, folder)
    assert not (folder / WEIGHTS).exists()
    assert_same(other, load_stored(folder))
    back = of_open_clip(PLAIN)
    save_stored(back, folder)
    assert not (folder / "config.json").exists()
    assert_same(back, load_stored(folder))


def test_the_contract_of_a_folder_has_the_attention_of_the_model(tmp_path: Path) -> None:
    stored = of_open_clip(PLAIN)
    openvclip.restore_spatial_attention(stored.model)
    openvclip.expand_temporal_attention(stored.model, window=2, boundary="replicate")
    assert stored.contract.expansion != Expansion(2, "replicate")
    save_stored(stored, tmp_path)
    saved = read_contract(tmp_path)
    assert saved is not None
    assert saved.expansion == Expansion(2, "replicate")
    assert not load_stored(tmp_path).model.training


def test_weights_that_another_program_wrote_are_kept(tmp_path: Path, model: StoredModel) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"not of this library")
    save_stored(model, tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == b"not of this library"
    assert (tmp_path / "model.safetensors").exists()
    assert_same(model, load_stored(tmp_path))


def test_a_card_that_somebody_changed_is_kept(folder: Path, model: StoredModel) -> None:
    card = folder / "README.md"
    assert "| λ" not in card.read_text()
    save_stored(
        StoredModel(model.model, model.tokenizer, model.contract.with_(method="mine")), folder
    )
    assert "| method | mine |" in card.read_text()
    card.write_text(card.read_text() + "My own words.\n")
    save_stored(model, folder)
    assert "My own words." in card.read_text()
    assert "| method | mine |" in card.read_text()
