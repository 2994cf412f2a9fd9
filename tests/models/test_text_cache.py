"""The cache of text features: bitwise equal, keyed by all that matters, and safe."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from openvclip import cli
from openvclip.models import text_cache as module
from openvclip.models.classifier import class_features
from openvclip.models.text_cache import cache_folder, text_cache
from tests.helpers import same_bits, tiny_clip, tiny_tokenizer
from tests.world import World

NAMES, TEMPLATES = ["run", "jump"], ["a {}.", "{}!"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each batch of texts that a tiny CLIP encodes."""
    calls: list[int] = []
    real = type(tiny_clip()).encode_text

    def counted(self: nn.Module, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        calls.append(len(text))
        return real(self, text, normalize)

    monkeypatch.setattr(type(tiny_clip()), "encode_text", counted)
    return calls


def features(model: nn.Module, names: list[str] = NAMES, forms: list[str] = TEMPLATES) -> Any:
    return class_features(model, tiny_tokenizer, names, forms)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "text-features").glob("*"))


def test_a_second_call_reads_the_same_bits(tmp_path: Path, encoded: list[int]) -> None:
    """Report 49: 40 labels x 28 templates took 110 s in each call of the command."""
    expected = features(tiny_clip())
    with text_cache(tmp_path):
        first, second = features(tiny_clip()), features(tiny_clip())
    assert len(encoded) == 2, "the third call read the file"
    assert same_bits(first, expected)
    assert same_bits(second, expected)
    assert len(files(tmp_path)) == 1
    features(tiny_clip())
    assert len(encoded) == 3, "outside of the block nothing is cached"
    with text_cache(None):
        features(tiny_clip())
    assert len(encoded) == 4


def renamed(model: Any) -> Any:
    model.transformer.resblocks[0].mlp.gelu = nn.ReLU()
    return model


def more_heads(model: Any) -> Any:
    model.transformer.resblocks[0].attn.num_heads = 4
    model.transformer.resblocks[0].attn.head_dim = 4
    return model


def one_bit(model: Any) -> Any:
    with torch.no_grad():
        model.token_embedding.weight.view(torch.int32)[3, 3] ^= 1
    return model


CHANGES: dict[str, Any] = {
    "a bit of the text weights": lambda: features(one_bit(tiny_clip())),
    "the dtype": lambda: features(tiny_clip().to(torch.bfloat16)),
    "the activation": lambda: features(renamed(tiny_clip())),
    "the heads": lambda: features(more_heads(tiny_clip())),
    "the order of the names": lambda: features(tiny_clip(), NAMES[::-1]),
    "the templates": lambda: features(tiny_clip(), NAMES, ["a {}.", "{}?"]),
    "the number of templates": lambda: features(tiny_clip(), NAMES, TEMPLATES[:1]),
    "the tokenizer": lambda: class_features(
        tiny_clip(), lambda texts: tiny_tokenizer([t + " " for t in texts]), NAMES, TEMPLATES
    ),
    "the batches": lambda: class_features(
        tiny_clip(), tiny_tokenizer, NAMES, TEMPLATES, batch_size=3
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changes_the_features_changes_the_key(change: str, tmp_path: Path) -> None:
    expected = CHANGES[change]()
    with text_cache(tmp_path):
        features(tiny_clip())
        found = CHANGES[change]()
    assert len(files(tmp_path)) == 2, f"{change} is not in the key"
    assert same_bits(found, expected)


def test_autocast_is_in_the_key(tmp_path: Path) -> None:
    with text_cache(tmp_path):
        plain = features(tiny_clip())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = features(tiny_clip())
    assert not torch.equal(plain, rounded)
    assert len(files(tmp_path)) == 2


def test_the_image_tower_is_not_in_the_key(tmp_path: Path, encoded: list[int]) -> None:
    with text_cache(tmp_path):
        features(tiny_clip())
        other = tiny_clip()
        with torch.no_grad():
            other.visual.proj.add_(1)
            other.logit_scale.add_(1)
        features(other.train())
    assert len(encoded) == 1
    assert other.training


def test_unknown_code_is_not_cached(tmp_path: Path, encoded: list[int]) -> None:
    model: Any = tiny_clip()
    model.transformer.register_forward_hook(lambda *args: None)
    with text_cache(tmp_path):
        features(model)
        features(model)
        other: Any = tiny_clip()
        other.ln_final.setting = object()
        features(other)
    assert len(encoded) == 3
    assert not (tmp_path / "text-features").exists()


DAMAGES: dict[str, Any] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "a value differs": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "text": lambda data: b"text",
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_files_are_replaced(damage: str, tmp_path: Path, encoded: list[int]) -> None:
    with text_cache(tmp_path):
        expected = features(tiny_clip())
        (file,) = files(tmp_path)
        whole = file.read_bytes()
        file.write_bytes(DAMAGES[damage](whole))
        assert same_bits(features(tiny_clip()), expected)
        assert len(encoded) == 2
        assert file.read_bytes() == whole
        features(tiny_clip())
    assert len(encoded) == 2


def test_foreign_files_are_replaced(tmp_path: Path, encoded: list[int]) -> None:
    with text_cache(tmp_path):
        expected = features(tiny_clip())
        (file,) = files(tmp_path)
        save_file({"text_features": torch.zeros(2, 8)}, file)
        assert same_bits(features(tiny_clip()), expected)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({"text_features": torch.zeros(2, 8)}, file, {**metadata, "openvclip": "other"})
        assert same_bits(features(tiny_clip()), expected)
    assert len(encoded) == 3


def test_a_folder_that_cant_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with text_cache(tmp_path / "file"):
        features(tiny_clip())
    with text_cache(tmp_path):
        features(tiny_clip())
        (file,) = files(tmp_path)
        file.unlink()
        file.mkdir()
        features(tiny_clip())


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with text_cache(tmp_path):
        features(tiny_clip(), ["a"])
        (oldest,) = files(tmp_path)
        features(tiny_clip(), ["b"])
        (used,) = set(files(tmp_path)) - {oldest}
        os.utime(oldest, (1, 1))
        os.utime(used, (2, 2))
        features(tiny_clip(), ["b"])  # a read makes the file the newest
        assert used.stat().st_mtime > 2
        abandoned = oldest.with_name(".x.safetensors.1.tmp")
        abandoned.touch()
        os.utime(abandoned, (1, 1))
        monkeypatch.setattr(module, "LIMIT", 2 * oldest.stat().st_size)
        features(tiny_clip(), ["c"])
    left = files(tmp_path)
    assert len(left) == 2
    assert used in left
    assert oldest not in left


def test_several_threads_at_once(tmp_path: Path) -> None:
    expected, results = features(tiny_clip()), []

    def run(model: nn.Module) -> None:
        with text_cache(tmp_path):
            results.append(features(model))

    threads = [threading.Thread(target=run, args=(tiny_clip(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(same_bits(result, expected) for result in results)
    assert [file.suffix for file in files(tmp_path)] == [".safetensors"]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENVCLIP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_folder() == tmp_path / place / "openvclip"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "openvclip" / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "openvclip"
    monkeypatch.setenv("OPENVCLIP_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("OPENVCLIP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "openvclip"


def test_predict_keeps_text_features_unless_told_otherwise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENVCLIP_CACHE", str(tmp_path))
    video = str(world.folder / world.samples[0][0])
    call = ["predict", video, "--labels", "a", "b", "--views", "1", "--json", *world.model_flags]
    printed = []
    for flags in (["--no-cache"], [], []):
        assert cli.main([*call, *flags]) == 0
        printed.append(capsys.readouterr().out)
        assert (tmp_path / "text-features").exists() == (flags == [])
    assert printed[0] == printed[1] == printed[2]
    assert len(files(tmp_path)) == 1
