"""Folders of peft: read as peft reads them, written so that peft reads them, merged with a base."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openvclip
from openvclip import merging
from openvclip.checkpoints import load_adapter, save_adapter
from openvclip.cli import main
from openvclip.errors import (
    CheckpointError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
)
from openvclip.models.loading import fine_tuned
from openvclip.weights import Adapter, LowRank, adapter_of
from tests.helpers import same_bits, snapshot, tiny_clip
from tests.weights.lora_models import BASES, State, base, close, copied, merged, tuned

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about embeddings that are saved as well
        model.save_pretrained(folder)
    return folder


def reopened(kind: str, folder: Path) -> State:
    """The merged weights of the folder, by peft."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return merged(peft.PeftModel.from_pretrained(base(kind), folder))


@pytest.mark.parametrize("kind", BASES)
def test_a_folder_of_peft_is_read_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    live = adapter_of(model)
    loaded = load_adapter(saved(model, tmp_path))
    clip = copied(base(kind))
    close(loaded.merged(clip), merged(model))
    assert loaded.updates.keys() == live.updates.keys()
    for name, update in loaded.updates.items():
        assert same_bits(update.up, live.updates[name].up)
        assert same_bits(update.down, live.updates[name].down)
        assert update.scale == pytest.approx(live.updates[name].scale)


@pytest.mark.parametrize("kind", BASES)
def test_what_is_written_is_read_by_peft(kind: str, tmp_path: Path) -> None:
    """An adapter, and a mean whose layers have different ranks and scales."""
    adapters = [adapter_of(tuned(kind, seed)) for seed in (1, 2)]
    clip = copied(base(kind))
    first = next(iter(adapters[0].updates))
    mean = Adapter.mean(adapters, clip)
    uneven = {**mean.updates, first: mean.updates[first].compressed(1)[0].scaled(3.0)}
    for number, adapter in enumerate(
        (adapters[0], Adapter(uneven, mean.values, mean.layouts, mean.modules_to_save))
    ):
        folder = tmp_path / str(number)
        save_adapter(adapter, folder, metadata={"run": "7"})
        close(load_adapter(folder).merged(clip), adapter.merged(clip))
        close(reopened(kind, folder), adapter.merged(clip))


def test_an_adapter_that_changes_nothing_can_be_written(tmp_path: Path) -> None:
    adapter = adapter_of(tuned("Hugging Face"))
    save_adapter(adapter.interpolated(1.0), tmp_path)
    clip = copied(base("Hugging Face"))
    close(load_adapter(tmp_path).merged(clip), clip)


# --- scales --------------------------------------------------------------------------------------


def written(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / CONFIG).write_text(json.dumps(settings))
    torch.manual_seed(0)
    parts = {
        f"base_model.model.fc.lora_{part}.weight": torch.randn(shape)
        for part, shape in (("A", (2, 4)), ("B", (3, 2)))
    }
    save_file(parts if state is None else state, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 8, "rank_pattern": {"fc": 2}}, 3.0),
        ({"r": 8, "rank_pattern": {"^fc": 2}, "alpha_pattern": {"f.": 5}}, 2.5),
        ({"alpha_pattern": {"c": 5, "other": 7}}, 3.0),
        ({"init_lora_weights": "eva", "use_dora": False, "bias": "none"}, 3.0),
    ],
)
def test_the_scale_follows_the_settings(
    tmp_path: Path, config: dict[str, Any], scale: float
) -> None:
    update = load_adapter(written(tmp_path, **config)).updates["fc.weight"]
    assert update.scale == pytest.approx(scale)


# --- with the file of the base -------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, list[Path], State, list[State]]:
    """The file of a tiny CLIP, folders of two fine-tunes, and their weights."""
    folders, states = [], []
    for seed in (1, 2):
        model = tuned("open_clip", seed, modules_to_save=["ln_final"])
        folders.append(saved(model, tmp_path / f"lora-{seed}"))
        states.append(merged(model))
    openvclip.save_checkpoint(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors", folders, copied(base("open_clip")), states


def test_load_checkpoint_merges_an_adapter_with_its_base(
    files: tuple[Path, list[Path], State, list[State]],
) -> None:
    clip, folders, _, states = files
    close(openvclip.load_checkpoint(folders[0], base=clip), states[0])
    close(openvclip.load_checkpoint(folders[0] / WEIGHTS, base=clip), states[0])
    model = tiny_clip(5)
    openvclip.load_checkpoint(folders[0], model, base=clip)
    close(snapshot(model), states[0])
    close(fine_tuned(tiny_clip(), folders[1]), states[1])
    with pytest.raises(UsageError, match="which is no adapter of peft"):
        openvclip.load_checkpoint(clip, base=clip)
    with pytest.raises(StateMismatchError, match="The adapter does not fit the base model"):
        openvclip.load_checkpoint(written(folders[0].parent / "other"), base=clip)


def test_files_are_merged_with_adapters(
    files: tuple[Path, list[Path], State, list[State]],
) -> None:
    clip_file, folders, clip, states = files
    out = clip_file.with_name("out.safetensors")
    openvclip.interpolate_files(clip_file, folders[0], out, 0.25)
    close(load_file(out), openvclip.interpolate(clip, states[0], 0.25))
    openvclip.merge_files([clip_file, *folders], out, lambda s: merging.ties(s[0], s[1:]))
    close(load_file(out), merging.ties(clip, states))
    openvclip.merge_files([clip_file, *folders], out, lambda s: merging.average(s[1:]))
    close(load_file(out), merging.average(states))
    assert main(["interpolate", str(clip_file), str(folders[1]), "--lam", "0", "-o", str(out),
                 "--overwrite"]) == 0  # fmt: skip
    close(load_file(out), states[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_of_a_large_entry_are_merged(tmp_path: Path, dtype: torch.dtype) -> None:
    """Parts of an entry begin and end inside of its rows."""
    torch.manual_seed(0)
    update = LowRank(torch.randn(1001, 2), torch.randn(2, 997), 0.5)
    clip = {"fc.weight": torch.randn(1001, 997).to(dtype), "fc.bias": torch.randn(3).to(dtype)}
    openvclip.save_checkpoint(clip, tmp_path / "clip.safetensors")
    save_adapter(Adapter({"fc.weight": update}), tmp_path / "lora")
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(tmp_path / "clip.safetensors", tmp_path / "lora", out, 0.0)
    expected = update.merged(clip["fc.weight"])
    difference = (load_file(out)["fc.weight"].double() - expected.double()).abs().max()
    assert difference <= (1e-2 if dtype == torch.float16 else 1e-5)
    assert same_bits(load_file(out)["fc.bias"], clip["fc.bias"])


# --- bad input -----------------------------------------------------------------------------------


def test_an_adapter_without_its_base_is_refused(
    files: tuple[Path, list[Path], State, list[State]],
) -> None:
    _, folders, _, _ = files
    out = folders[0].parent / "out.safetensors"
    calls: list[Callable[[], Any]] = [
        lambda: openvclip.load_checkpoint(folders[0]),
        lambda: openvclip.load_checkpoint(folders[0] / WEIGHTS),
        lambda: openvclip.load_checkpoint(folders[0], tiny_clip()),
        lambda: openvclip.convert_checkpoint(folders[0], out),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match=r"Give the file of its base model too: .*base="):
            call()
    for merge in (
        lambda: openvclip.average_files(folders, out),
        lambda: openvclip.interpolate_files(*folders, out, 0.5),
    ):
        with pytest.raises(CheckpointError, match="base model as the first file"):
            merge()
    assert not out.exists()
    assert len(openvclip.load_checkpoint(folders[0] / WEIGHTS, names="original")) > 0


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "LOHA"}, "an adapter of the kind LOHA, not LoRA"),
        ({"peft_type": "IA3"}, r"not LoRA\. Merge the adapter .*merge_and_unload\(\)"),
        ({"use_dora": True}, "LoRA with DoRA, which is not a product"),
        ({"target_parameters": ["a.b"]}, "LoRA with target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights of the base model"),
        ({"init_lora_weights": "CorDA"}, "Save it as plain LoRA"),
    ],
)
def test_other_adapters_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], text: str
) -> None:
    with pytest.raises(WeightTypeError, match=text):
        load_adapter(written(tmp_path, **config))


A, B = "base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ({A: (2, 4)}, StateMismatchError, r"fc lacks a factor.*\n.*lora_B"),
        ({A: (3, 4), B: (3, 3)}, StateMismatchError, "rank 3, but adapter_config.json says 2"),
        ({A: (2, 4), B: (3, 5)}, StateMismatchError, r"factors \[3, 5\] and \[2, 4\]"),
        (
            {A: (2, 4), B: (3, 2), "base_model.model.fc.lora_magnitude_vector": (3,)},
            WeightTypeError,
            r"not those of plain LoRA \(fc\.lora_magnitude_vector\)",
        ),
        ({"base_model.model.fc.hada_w1_a": (2, 2)}, WeightTypeError, "hada_w1_a"),
    ],
)
def test_damaged_adapters(
    tmp_path: Path, state: dict[str, tuple[int, ...]], error: type[Exception], text: str
) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in state.items()}
    with pytest.raises(error, match=f"(?s){text}"):
        load_adapter(written(tmp_path, tensors))


def test_attention_of_later_versions_of_peft_is_refused(tmp_path: Path) -> None:
    folder = saved(tuned("open_clip"), tmp_path / "lora")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "peft_version": "0.22.0.dev0"}))
    with pytest.raises(WeightTypeError, match=r"peft 0\.22\.0\.dev0 wrote it"):
        load_adapter(folder)
    assert load_adapter(written(tmp_path / "linear", peft_version="1.0")).rank == 2


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no folder .*expected a folder of peft"):
        load_adapter(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing"):
        load_adapter(tmp_path)
    folder = written(tmp_path / "lora")
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="is not the settings of an adapter: it is not JSON"):
        load_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match=f"There is no file .*{re.escape(CONFIG)}"):
        load_adapter(folder)
    alone = Adapter({"fc.bias": LowRank(torch.ones(3, 1), torch.ones(1, 1), 1.0, (3,))})
    with pytest.raises(WeightTypeError, match=r"changes fc\.bias by factors"):
        save_adapter(alone, tmp_path / "bias")
