"""Folders and files that are only a part of a model: the error says how to get one file."""

from __future__ import annotations

import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard

import openvclip
from openvclip.checkpoints import formats
from openvclip.errors import CheckpointError
from tests.checkpoints.test_conversion import clip_state, prefixed, same_entries
from tests.checkpoints.test_conversion_errors import zipped
from tests.helpers import tiny_clip

State = dict[str, Tensor]


def refusal(path: Path) -> str:
    """Return the error of every function that reads a file, which must be the same."""
    out = path.parent / "out.safetensors"
    calls: list[Callable[[], object]] = [
        lambda: openvclip.load_checkpoint(path),
        lambda: openvclip.inspect_checkpoint(path),
        lambda: openvclip.average_files([path], out),
    ]
    texts = set()
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            call()
        texts.add(str(caught.value))
    assert not out.exists()
    (text,) = texts
    return text


# Report 31 (LLM-Workshop#25): a folder of torch.distributed.checkpoint.
@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, lambda s: {"app": s}])
def test_a_distributed_checkpoint_and_its_joined_file(tmp_path: Path, nest: Any) -> None:
    state, folder = clip_state(), tmp_path / "run" / "step_10"
    content = nest(state)
    content = {"app": {"model": state, "optim": {"lr": 0.1}}} if "app" in content else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is not initialised
        dcp.save(content, checkpoint_id=folder)
    parts = [folder, folder.parent, folder / "__0_0.distcp", folder / ".metadata"]
    for path in parts:
        text = refusal(path)
        assert f"format_utils dcp_to_torch {folder} weights.pt`" in text
        assert "only if you trust" in text
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    model = tiny_clip(seed=9)
    openvclip.load_checkpoint(tmp_path / "weights.pt", model)
    same_entries(dict(model.state_dict()), state)


def test_a_folder_of_deepspeed(tmp_path: Path) -> None:
    state, run = clip_state(), tmp_path / "run"
    step = run / "global_step7"
    step.mkdir(parents=True)
    (run / "zero_to_fp32.py").touch()
    file = step / "mp_rank_00_model_states.pt"
    beside = {"ds_version": "0.18", "ds_config": {}, "mp_world_size": 1}
    torch.save({"module": prefixed(state, "module."), **beside}, file)
    same_entries(openvclip.load_checkpoint(file), state)
    empty = {name: torch.empty(0) for name in state}
    for content in (
        {"module": empty, **beside},  # ZeRO stage 3
        {"module": None, **beside},
        {"module": state, **beside, "mp_world_size": 2},
    ):
        torch.save(content, file)
        torch.save({"optimizer_state_dict": {}, **beside}, step / "zero_pp_optim_states.pt")
        for path in (run, step, file, step / "zero_pp_optim_states.pt"):
            assert f"`python {run / 'zero_to_fp32.py'} {run} weights`" in refusal(path)


FOLDERS: dict[str, tuple[list[str], str]] = {
    "accelerate": (
        ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"],
        "Give the file of weights in it (model.safetensors).",
    ),
    "accelerate, bin": (
        ["pytorch_model.bin", "optimizer.bin", "sampler.bin", "custom_checkpoint_0.pkl"],
        "Give the file of weights in it (pytorch_model.bin).",
    ),
    "accelerate, sharded": (
        ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "random_states_0.pkl"],
        "w/pytorch_model_fsdp_0 weights.pt`",
    ),
    "accelerate, whole": (
        ["optimizer_0/.metadata", "pytorch_model_fsdp.bin"],
        "Give the file of weights in it (pytorch_model_fsdp.bin).",
    ),
    "trainer": (["checkpoint-500/model.safetensors"], "in it (checkpoint-500/model.safetensors)."),
    "cache": (["snapshots/1a/model.safetensors"], "in it (snapshots/1a/model.safetensors)."),
    "peft": (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload()"),
    "tensorflow": (["saved_model.pb", "variables/variables.index"], "a SavedModel of TensorFlow"),
    "orbax": (["_CHECKPOINT_METADATA", "d/0"], "a checkpoint of Orbax"),
    "unpacked": (["archive/data.pkl", "archive/data/0"], "zip -0 -r weights.pth archive"),
    "parts": (
        [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)],
        "enable_consolidation=True",
    ),
    "nothing": (["notes.txt"], "it is a folder. Give the file of weights."),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_recognised(tmp_path: Path, case: str) -> None:
    names, expected = FOLDERS[case]
    for name in names:
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).touch()
    assert expected in refusal(tmp_path / "w")


def test_a_file_of_the_parts_of_one_process(tmp_path: Path) -> None:
    names = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    save_file({"w": torch.zeros(1)}, tmp_path / names[0])
    openvclip.load_checkpoint(tmp_path / names[0])
    save_file({"w": torch.zeros(1)}, tmp_path / names[1])
    assert "the parts of one process" in refusal(tmp_path / names[0])


# Report 27: a file of the parts of one process held DTensors, which nothing could use.
def test_parts_of_one_process_are_not_whole_weights(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(2, 2))
        torch.save(model.state_dict(), tmp_path / "w")
        assert "every process calls openvclip.save_checkpoint" in refusal(tmp_path / "w")
        # Report 23 (pytorch#136336): a model under fully_shard takes the weights of a file.
        plain = torch.nn.Linear(2, 2)
        openvclip.save_checkpoint(plain.state_dict(), tmp_path / "plain")
        openvclip.load_checkpoint(tmp_path / "plain", model)
        openvclip.save_checkpoint(model.state_dict(), tmp_path / "again")
    finally:
        distributed.destroy_process_group()
    same_entries(openvclip.load_checkpoint(tmp_path / "again"), dict(plain.state_dict()))


def test_what_unpickling_says_of_sharded_tensors_is_translated() -> None:
    """The text of torch.load if the module of DTensor was not imported."""
    error = pickle.UnpicklingError("``torch.distributed.tensor`` must be imported to load DTensors")
    assert "parts of one process" in str(formats._unsafe_or_damaged(Path("w"), error))


OTHER_FILES = {
    "onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x052.7.0", "an ONNX model"),
    "flax": (b"\x82\xa6params\x81\xa5kernel", "a msgpack file, as Flax writes"),
    "saved model": (b"\x08\x01\x12\xf0\x10\x0a", "a SavedModel of TensorFlow"),
    "lite": (b"\x1c\x00\x00\x00TFL3" + bytes(20), "a TensorFlow Lite model"),
    "gguf": (b"GGUF\x03" + bytes(20), "a GGUF file, whose weights are quantised"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    "annex": (b"/annex/objects/SHA256E-s1", "a git-annex pointer"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "a zstd archive; unpack it first"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_files_of_other_libraries_are_named(tmp_path: Path, case: str) -> None:
    content, expected = OTHER_FILES[case]
    (tmp_path / "w").write_bytes(content)
    assert f"it is {expected}" in refusal(tmp_path / "w")


def test_archives_of_other_things_say_what_to_do(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with tarfile.open(tmp_path / "w", "w") as archive:
        archive.add(tmp_path / "model.safetensors", "model.safetensors")
    assert "a tar archive; unpack it first" in refusal(tmp_path / "w")
    # The first names of what torch.export.save writes.
    (tmp_path / "w.pt2").write_bytes(zipped("w/archive_format", "w/models/model.json"))
    assert "torch.export.load" in refusal(tmp_path / "w.pt2")


def test_the_state_of_an_optimizer_is_named(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(tiny_clip().parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    assert "the state of an optimizer and no weights" in refusal(tmp_path / "optimizer.bin")


# --- sharded models ------------------------------------------------------------------------------


def sharded(folder: Path, state: State, save: Callable[[Any, Path], None], ending: str) -> Path:
    """Write a model as three shards and an index."""
    names, weight_map = list(state), {}
    for k in range(3):
        shard = f"model-{k + 1:05d}-of-00003{ending}"
        save({name: state[name] for name in names[k::3]}, folder / shard)
        weight_map.update(dict.fromkeys(names[k::3], shard))
    index = folder / f"model{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


# Report 29 (diffusers#14811): an index whose shards are PyTorch files.
@pytest.mark.parametrize(
    ("save", "prefix"), [(torch.save, "module."), (legacy, "model."), (save_file, "")]
)
def test_the_index_of_a_sharded_model(tmp_path: Path, save: Any, prefix: str) -> None:
    state = clip_state()
    index = sharded(tmp_path, prefixed(state, prefix), save, ".bin")
    model = tiny_clip(seed=9)
    openvclip.load_checkpoint(index, model)
    same_entries(dict(model.state_dict()), state)
    same_entries(openvclip.load_checkpoint(index), state)
    info = openvclip.inspect_checkpoint(index)
    assert (info.entries, info.vision_layers) == (len(state), 3)
    assert info.format == ("safetensors" if save is save_file else "PyTorch")
    save_file(prefixed(state, prefix), tmp_path / "whole.safetensors")
    out = tmp_path / "out.safetensors"
    openvclip.interpolate_files(index, tmp_path / "whole.safetensors", out, 0.5)
    same_entries(openvclip.load_checkpoint(out), state)
    folder_text = refusal(tmp_path / ".." / tmp_path.name)
    assert "model.bin.index.json" in folder_text
    assert "00001" not in folder_text


def test_an_index_with_shards_of_both_kinds(tmp_path: Path) -> None:
    state = clip_state()
    index = sharded(tmp_path, state, torch.save, ".bin")
    shard = tmp_path / "model-00002-of-00003.bin"
    save_file(torch.load(shard), shard)
    same_entries(openvclip.load_checkpoint(index), state)
    assert openvclip.inspect_checkpoint(index).format == "PyTorch and safetensors"


def test_an_index_of_archives(tmp_path: Path) -> None:
    def save(part: State, path: Path) -> None:
        module = torch.nn.Module()
        for name, value in part.items():
            module.register_buffer(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.script is deprecated
            torch.jit.script(module).save(path)

    state = {name: torch.full((2,), i) for i, name in enumerate("abcd")}
    index = sharded(tmp_path, state, save, ".pt")
    same_entries(openvclip.load_checkpoint(index), state)
    assert openvclip.inspect_checkpoint(index).format == "TorchScript"


def test_an_index_that_lies_about_its_shards(tmp_path: Path) -> None:
    state = clip_state()
    index = sharded(tmp_path, state, torch.save, ".bin")
    shard = tmp_path / "model-00002-of-00003.bin"
    good, part = shard.read_bytes(), torch.load(shard)
    first = next(iter(part))
    torch.save({name: value for name, value in part.items() if name != first}, shard)
    assert f"{shard.name} does not hold {first}" in refusal(index)
    torch.save({**part, "more": torch.zeros(1)}, shard)
    assert f"does not list these entries of {shard.name}: more" in refusal(index)
    shard.write_bytes(good[: len(good) // 2])
    assert shard.name in refusal(index)
    shard.write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "an HDF5 file" in refusal(index)
    shard.unlink()
    assert f"there is no file {shard.name} beside it" in refusal(index)


def test_one_shard_does_not_fit_and_its_index_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path, clip_state(), torch.save, ".bin")
    with pytest.raises(KeyError, match=f"It is one shard of a model; give the index {index}"):
        openvclip.load_checkpoint(tmp_path / "model-00002-of-00003.bin", tiny_clip())
