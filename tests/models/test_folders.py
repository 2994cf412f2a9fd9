"""A folder gives back the model that was saved, bit for bit, also through its own library."""

from __future__ import annotations

import json
import os
import shutil
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
    CheckpointError,
    ContractError,
    ModelNameError,
    StateMismatchError,
    UnsafeCheckpointError,
    UsageError,
)
from openvclip.models.features import encode_text
from openvclip.models.folders import RUN_CONFIG_FILE, StoredModel, choose_weights, load_stored
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
    simple_tokenizer,
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


# --- bad input -----------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*mode \(did you mean .*model\?\)"):
        load_stored(saved.parent / "mode")
    with pytest.raises(CheckpointError, match="There is no folder"):
        load_stored(f"local-dir:{saved}x")
    with pytest.raises(UsageError, match=r"weights of its own\. Leave pretrained out"):
        load_stored(saved, "openai")
    with pytest.raises(ModelNameError, match=r"'VitB16' \(did you mean ViT-B-16"):
        load_stored("VitB16", "openai")
    with pytest.raises(ModelNameError, match="hf-hub:user/name"):
        load_stored("user/name")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no file {WEIGHTS}, which its openvclip.json names"):
        load_stored(folder)
    (folder / CONTRACT_FILE).unlink()
    with pytest.raises(CheckpointError, match="model holds no weights; expected the folder of"):
        load_stored(folder)
    (folder / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"no weights.*is an adapter of peft"):
        load_stored(folder)


def test_a_folder_with_two_files_of_weights(folder: Path) -> None:
    (folder / CONTRACT_FILE).unlink()
    (folder / WEIGHTS).rename(folder / "last.safetensors")
    shutil.copy(folder / "last.safetensors", folder / "final.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"2 files of weights \(final.safetensors, last.safetensors\).*Give the path of one",
    ):
        load_stored(folder)
    load_stored(folder / "final.safetensors")


def test_the_usual_weights_are_those_of_the_library(model: StoredModel) -> None:
    names = ["model.safetensors", WEIGHTS, "other.safetensors"]
    unnamed = model.contract.with_(weights=None)
    assert choose_weights(names, unnamed, "here") == WEIGHTS
    of_transformers = unnamed.with_(library="transformers")
    assert choose_weights(names, of_transformers, "here") == "model.safetensors"


def test_a_folder_that_says_nothing_about_its_model(tmp_path: Path, model: StoredModel) -> None:
    save_checkpoint(model.model.state_dict(), tmp_path / "final.safetensors")
    with pytest.raises(CheckpointError, match="says nothing about its model"):
        load_stored(tmp_path)
    contract = model.contract.with_(model="no-such-model").to_json()
    (tmp_path / CONTRACT_FILE).write_text(contract)
    with pytest.raises(ModelNameError, match=r"no open_clip_config.json.*'no-such-model'"):
        load_stored(tmp_path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_contracts_that_can_not_be_used(folder: Path) -> None:
    path = folder / CONTRACT_FILE
    before = path.read_text()
    for changes, text in (
        ({"version": 2}, "has version 2; this openvclip reads version 1"),
        ({"library": "transformers"}, r"has library = 'transformers', but the header .*open_clip"),
        ({"pooling": "frames"}, r"pooling = 'frames', but the header.*'unit_frames'.*don't edit"),
        ({"templates": []}, "templates"),
    ):
        edit(path, **changes)
        with pytest.raises(ContractError, match=text):
            load_stored(folder)
        path.write_text(before)
    edit(path, results={"seen": 0.5})  # a fact, not a setting
    assert load_stored(folder).contract.results == {"seen": 0.5}
    save_checkpoint(load_stored(folder).model.state_dict(), folder / WEIGHTS)
    edit(path, library="transformers")
    with pytest.raises(
        ContractError, match=r"model of transformers, but the folder holds no config\.json"
    ):
        load_stored(folder)


def test_weights_of_another_backbone(folder: Path, tmp_path: Path) -> None:
    text = {**PLAIN["text_cfg"], "layers": 2}
    other = build({**PLAIN, "text_cfg": text})
    save_checkpoint(other.state_dict(), folder / WEIGHTS)
    with pytest.raises(StateMismatchError, match="does not fit the model"):
        load_stored(folder)
    words = pytest.importorskip("tests.tiny_transformers")
    words.save_folder("CLIPModel", tmp_path / "hf")
    deep = words.make("CLIPModel", num_hidden_layers=3)
    save_checkpoint(
        deep.state_dict(), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(StateMismatchError, match=r"fit the CLIPModel of .*config.json") as error:
        load_stored(tmp_path / "hf")
    assert len(error.value.unexpected) == 16
    wide = words.make("CLIPModel", intermediate_size=8)
    save_checkpoint(
        wide.state_dict(), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(StateMismatchError, match="do not fit the model"):
        load_stored(tmp_path / "hf")


def test_weights_that_are_damaged_or_not_finite(folder: Path, tmp_path: Path) -> None:
    words = pytest.importorskip("tests.tiny_transformers")
    words.save_folder("CLIPModel", tmp_path / "hf")
    for weights in (folder / WEIGHTS, tmp_path / "hf" / "model.safetensors"):
        whole = weights.read_bytes()
        state = openvclip.load_checkpoint(weights, names="original")
        weights.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            load_stored(weights.parent)
        name = next(n for n in state if n.endswith("bias"))
        broken = {n: v * float("nan") if n == name else v for n, v in state.items()}
        save_checkpoint(broken, weights, metadata={"format": "pt"})
        with pytest.raises(openvclip.errors.NonFiniteWeightsError, match="NaN or infinity"):
            load_stored(weights.parent)
        weights.unlink()
        torch.save({"weight": Path("code")}, weights.with_name("pytorch_model.bin"))
        (weights.parent / CONTRACT_FILE).unlink(missing_ok=True)
        with pytest.raises(UnsafeCheckpointError, match="could run arbitrary code"):
            load_stored(weights.parent)


def test_configurations_that_are_damaged(folder: Path, tmp_path: Path) -> None:
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text()[:-10])
    with pytest.raises(ModelNameError, match="is not JSON"):
        load_stored(folder)
    config.write_text("{}")
    with pytest.raises(ModelNameError, match="expected the entries embed_dim, vision_cfg"):
        load_stored(folder)
    config.write_text(json.dumps({**PLAIN, "vision_cfg": {"layers": "x"}}))
    with pytest.raises(ModelNameError, match="open_clip can't build the model"):
        load_stored(folder)
    words = pytest.importorskip("tests.tiny_transformers")
    words.save_folder("CLIPModel", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelNameError, match=r"transformers can't load .*no-such-type"):
        load_stored(tmp_path / "hf")


def test_models_that_can_not_be_saved(model: StoredModel, tmp_path: Path) -> None:
    def saving(changed: Any, tokenizer: Any = None) -> None:
        save_stored(
            StoredModel(changed, tokenizer or simple_tokenizer(), model.contract), tmp_path / "out"
        )

    with pytest.raises(UsageError, match="tokenizer is a function, which can't be saved"):
        saving(model.model, lambda texts: torch.zeros(len(texts), 8, dtype=torch.long))
    with pytest.raises(UsageError, match="SimpleTokenizer, which can't be saved"):
        saving(model.model, open_clip.SimpleTokenizer(context_length=6))
    prompted = of_open_clip(PLAIN).model
    prompted.openvclip_prompts = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"Save the prompts alone with openvclip.prompting.save"):
        saving(prompted)
    adapted = of_open_clip(PLAIN).model
    adapted.visual.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"merge_and_unload\(\)"):
        saving(adapted)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; expected the path of a folder"):
        save_stored(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="Could not write"):
        save_stored(model, tmp_path / "file" / "below")
    hf = TRANSFORMERS["CLIPModel"](tmp_path)
    with pytest.raises(UsageError, match="expected a tokenizer of transformers"):
        saving(hf.model)
    words = pytest.importorskip("tests.tiny_transformers")
    changed = words.make_tokenizer()
    changed.save_pretrained = words.make_tokenizer(model_max_length=5).save_pretrained
    with pytest.raises(UsageError, match="for a CLIPModel: transformers loads another tokenizer"):
        saving(hf.model, changed)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_a_dtype_that_is_not_floating_is_refused(saved: Path, dtype: Any) -> None:
    with pytest.raises(UsageError, match=r"dtype=.*; expected a floating-point dtype"):
        openvclip.VideoCLIP.from_pretrained(saved, dtype=dtype)
