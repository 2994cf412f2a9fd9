"""Folders that are no model, or not this model, raise errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import openvclip
from openvclip.checkpoints import save_checkpoint
from openvclip.checkpoints.contract_files import CONTRACT_FILE
from openvclip.errors import (
    CheckpointError,
    ContractError,
    ModelNameError,
    StateMismatchError,
    UnsafeCheckpointError,
    UsageError,
)
from openvclip.models.folders import StoredModel, choose_weights, load_stored
from openvclip.models.open_clip_config import build
from openvclip.models.saving import save_stored
from tests.models.stored_models import (
    PLAIN,
    TRANSFORMERS,
    of_open_clip,
    simple_tokenizer,
)

WEIGHTS = "open_clip_model.safetensors"


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
