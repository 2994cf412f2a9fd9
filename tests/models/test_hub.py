"""Models are uploaded to the Hub and loaded from it. Without a connection, errors come at once."""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants

from openvclip.checkpoints import Base
from openvclip.checkpoints.contract_files import CONTRACT_FILE
from openvclip.errors import CheckpointError, HubError
from openvclip.models.folders import StoredModel, load_stored
from openvclip.models.loading import load_model
from openvclip.models.preprocess import image_processor_of
from openvclip.models.saving import SaveOptions, push_stored, save_stored
from tests.helpers import same_bits
from tests.models.fake_hub import TOKEN, FakeHub, fake_hub
from tests.models.stored_models import OPEN_CLIP, PLAIN, TRANSFORMERS, of_open_clip
from tests.models.test_folders import TEXTS, assert_same, features


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture(scope="module")
def model() -> StoredModel:
    return of_open_clip(PLAIN)


def test_open_clip_loads_an_uploaded_model_with_its_own_text_tower(
    hub: FakeHub, tmp_path: Path
) -> None:
    stored = OPEN_CLIP["hf_text"](tmp_path / "text")
    address = push_stored(stored, "user/name", token=TOKEN)
    assert address.startswith(f"{hub.address}/user/name/commit/")
    for file in (tmp_path / "text").iterdir():
        file.unlink()  # everything comes from the repository
    assert_same(stored, load_stored("hf-hub:user/name"))
    plain = open_clip.create_model("hf-hub:user/name")
    assert all(map(same_bits, features(plain, stored), features(stored.model, stored)))
    tokens = open_clip.get_tokenizer("hf-hub:user/name")(TEXTS)
    assert torch.equal(tokens, stored.tokenizer(TEXTS))


def test_transformers_loads_an_uploaded_model(hub: FakeHub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    stored = TRANSFORMERS["CLIPModel"](tmp_path)
    push_stored(stored, "user/name", SaveOptions(max_shard_size=20_000), token=TOKEN)
    hub.files["user/name"]["training/optimizer.pt"] = b"large"
    hub.files["user/name"]["pytorch_model.bin"] = b"large"
    assert_same(stored, load_stored("hf-hub:user/name"))
    assert_same(stored, load_stored("transformers:user/name", revision="main"))
    asked = [request for request in hub.requests if request.startswith("GET")]
    assert not [request for request in asked if "optimizer" in request or ".bin" in request]
    plain = transformers.CLIPModel.from_pretrained("user/name")
    assert all(map(same_bits, features(plain, stored), features(stored.model, stored)))


def test_a_model_without_a_contract_is_the_base_of_what_is_trained(
    hub: FakeHub, tmp_path: Path
) -> None:
    words = pytest.importorskip("tests.tiny_transformers")
    words.save_folder("CLIPModel", tmp_path / "plain")
    hub.files["user/plain"] = {p.name: p.read_bytes() for p in (tmp_path / "plain").iterdir()}
    loaded = load_stored("hf-hub:user/plain")
    assert loaded.contract.base == Base("user/plain")
    assert load_stored(tmp_path / "plain").contract.base is None  # a folder is no name


def test_one_question_is_enough_to_know_that_the_hub_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5")
    save_stored(TRANSFORMERS["SiglipModel"](tmp_path), tmp_path)
    asked: list[str] = []
    for module in ("hugging_face", "preprocess", "tokenizers"):
        importlib.import_module(f"openvclip.models.{module}")
        monkeypatch.setattr(
            f"openvclip.models.{module}.is_offline", lambda n: bool(asked.append(n))
        )
    load_model(str(tmp_path))
    assert asked == [str(tmp_path)]


def test_a_processor_that_was_not_found_is_looked_for_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5")
    push_stored(TRANSFORMERS["SiglipModel"](tmp_path), "user/two", token=TOKEN)
    address = hub.address
    refuse_connections(monkeypatch)
    assert image_processor_of("user/two") is None
    monkeypatch.setattr(constants, "ENDPOINT", address)
    found = image_processor_of("user/two")
    assert found is not None
    asked = len(hub.requests)
    assert image_processor_of("user/two") is found
    assert len(hub.requests) == asked


def test_downloaded_files_are_used_without_a_connection(
    hub: FakeHub, model: StoredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_stored(model, "user/name", token=TOKEN)
    loaded = load_stored("hf-hub:user/name", cache_dir=tmp_path / "elsewhere")
    assert_same(model, loaded)
    before = len(hub.requests)
    again = load_stored("hf-hub:user/name", cache_dir=tmp_path / "elsewhere", local_files_only=True)
    assert_same(model, again)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(model, load_stored("hf-hub:user/name", cache_dir=tmp_path / "elsewhere"))
    assert len(hub.requests) == before
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; and the whole model was not down"):
        load_stored("hf-hub:user/name")
    with pytest.raises(HubError, match="local_files_only=True; and the whole model was not"):
        load_stored("hf-hub:user/name", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refuse_connections(monkeypatch)
    assert_same(model, load_stored("hf-hub:user/name", cache_dir=tmp_path / "elsewhere"))


def refuse_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_without_a_connection_the_error_comes_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: StoredModel
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuse_connections(monkeypatch)
    start = time.monotonic()
    with pytest.raises(HubError, match=r"hf-hub:user/name can't be downloaded: http://127.0.0.1:9"):
        load_stored("hf-hub:user/name")
    with pytest.raises(HubError, match=r"^transformers:user/name can't be downloaded"):
        load_stored("transformers:user/name")
    with pytest.raises(HubError, match=r"hf-hub:user/name can't be downloaded"):
        load_model("hf-hub:user/name")
    with pytest.raises(HubError, match=r"hf-hub:laion/CLIP-ViT-B-32.* can't be downloaded"):
        load_stored("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(HubError, match=r"user/name can't be written: http://127.*try again"):
        push_stored(model, "user/name", token=TOKEN)
    assert time.monotonic() - start < 5  # huggingface_hub would try again for 20 seconds
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
        start = time.monotonic()
        with pytest.raises(HubError, match="can't be reached"):
            load_stored("hf-hub:user/name")
        assert time.monotonic() - start < 5


def test_names_and_revisions_that_do_not_exist(hub: FakeHub, model: StoredModel) -> None:
    hub.files["user/name"] = {"README.md": b"nothing"}
    with pytest.raises(HubError, match=r"hf-hub:user/nme .*: the Hub has no such repository"):
        load_stored("hf-hub:user/nme")
    with pytest.raises(HubError, match=r"hf-hub:user/name \(v2\).*: there is no such revision"):
        load_stored("hf-hub:user/name", revision="v2")
    with pytest.raises(CheckpointError, match=r"no file of weights.* Its files are README.md"):
        load_stored("hf-hub:user/name")
    with pytest.raises(HubError, match="'a/b/c' is not the name of a repository"):
        load_stored("hf-hub:a/b/c")
    with pytest.raises(HubError, match="'user name' is not the name of a repository"):
        push_stored(model, "user name")


def test_uploads_that_are_refused(
    hub: FakeHub, model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match=r"no token .*`hf auth login`, set HF_TOKEN, or give token="):
        push_stored(model, "user/name")
    assert hub.requests == []
    with pytest.raises(HubError, match=r"user/name can't be written: the Hub .*401"):
        push_stored(model, "user/name", token="hf_another")


def test_a_card_on_the_hub_that_somebody_wrote_is_kept(hub: FakeHub, model: StoredModel) -> None:
    push_stored(model, "user/name", token=TOKEN, private=True)
    own = hub.files["user/name"]["README.md"]
    assert b'from_pretrained("hf-hub:user/name")' in own
    changed = StoredModel(model.model, model.tokenizer, model.contract.with_(method="mine"))
    push_stored(changed, "user/name", token=TOKEN)
    assert b"| method | mine |" in hub.files["user/name"]["README.md"]
    hub.files["user/name"]["README.md"] = b"My own words."
    push_stored(model, "user/name", token=TOKEN)
    assert hub.files["user/name"]["README.md"] == b"My own words."
    assert b"mine" not in hub.files["user/name"][CONTRACT_FILE]
