"""Recognise folders that training code writes in the place of one file of weights.

A folder is never read as weights. The functions here say what the folder is, and which command or
file gives its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from openvclip.checkpoints.sharding import is_index, shard_names_in
from openvclip.errors import listed

_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# Files that training code writes beside the weights, by the beginning of their names.
_NOT_WEIGHTS = (
    "optimizer",
    "scheduler",
    "scaler",
    "sampler",
    "random_states",
    "rng_state",
    "training_args",
    "custom_checkpoint",
)


def advice_for_folder(folder: Path) -> str:
    """Return what a folder is and which file or command gives its weights.

    The text is one or more sentences. It is empty if the folder is not recognised and has no files
    of weights.

    Raises:
        OSError: the folder can't be read.
    """
    for advice in _advice_in_order(folder):
        if advice:
            return advice
    return ""


def _advice_in_order(folder: Path) -> Iterator[str]:
    """Yield the advice for each kind of folder, best first. Most of it is empty."""
    for recognise in _KINDS:
        yield recognise(folder)
    yield _give(whole_files(folder, sorted(folder.iterdir())))
    for subfolder in _subfolders(folder):
        for recognise in _KINDS:
            yield recognise(subfolder)
    yield _give(whole_files(folder, sorted(folder.glob("*/*"))))
    yield _give(whole_files(folder, sorted(folder.glob("snapshots/*/*"))))  # Hugging Face's cache


def advice_for_part(file: Path) -> str:
    """Return the advice for a file whose name shows that it is a part of a checkpoint, or ``""``.

    Raises:
        OSError: the folder can't be read.
    """
    if file.suffix == ".distcp" or file.name == ".metadata":
        return _distributed(file.parent)
    if file.name.startswith("shard-"):
        return _parts_of_processes(file.parent)
    return ""


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(_NOT_WEIGHTS)
    )


# --- kinds of folders ----------------------------------------------------------------------------


def _distributed(folder: Path) -> str:
    if not (folder / ".metadata").is_file():
        return ""
    return (
        f"{folder} is a checkpoint of torch.distributed.checkpoint (DCP), which stores weights in "
        "parts. Join the parts: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{folder} weights.pt`, and give weights.pt. The command unpickles {folder / '.metadata'}, "
        "so run it only if you trust the source of the folder."
    )


def deepspeed_advice(folder: Path) -> str:
    """Return the advice for a folder of DeepSpeed, or ``""`` for another folder.

    Files in such a folder can be whole, so their names show nothing.

    Raises:
        OSError: the folder can't be read.
    """
    script = folder / "zero_to_fp32.py"
    above = folder.parent / "zero_to_fp32.py"
    states = any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))
    if not (script.is_file() or states):
        return ""
    root = folder.parent if above.is_file() and not script.is_file() else folder
    return (
        f"{root} is a checkpoint of DeepSpeed, which stores weights in parts. Join the parts: "
        f"`python {root / 'zero_to_fp32.py'} {root} weights`, and give the file of weights in the "
        "new folder. DeepSpeed writes the script zero_to_fp32.py beside its checkpoints."
    )


ADAPTER_CONFIG = "adapter_config.json"
"""The settings in a folder of peft."""


def _adapter(folder: Path) -> str:
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return (
        f"{folder} is an adapter of peft, which is a change of a base model. Give the file of its "
        "base model too: openvclip.load_checkpoint(folder, base='clip.safetensors') for LoRA, or "
        "the base model as the first file of a merge. Or merge it with peft: "
        "peft.PeftModel.from_pretrained(base_model, folder).merge_and_unload(), and save the "
        "model: openvclip.save_checkpoint(model.state_dict(), 'merged.safetensors')."
    )


def _saved_model(folder: Path) -> str:
    if not (folder / "saved_model.pb").is_file():
        return ""
    return (
        f"{folder} is a SavedModel of TensorFlow. Convert its weights to PyTorch, for example with "
        "from_pretrained(..., from_tf=True) of transformers, and save them with "
        "openvclip.save_checkpoint."
    )


def _orbax(folder: Path) -> str:
    if not ((folder / "_CHECKPOINT_METADATA").is_file() or (folder / "_METADATA").is_file()):
        return ""
    return (
        f"{folder} is a checkpoint of Orbax (JAX, Flax). Convert its arrays to tensors under "
        "PyTorch's names, and save them with openvclip.save_checkpoint."
    )


def _unpacked(folder: Path) -> str:
    if not ((folder / "data.pkl").is_file() and (folder / "data").is_dir()):
        return ""
    return (
        f"{folder} is an unpacked PyTorch file: some programs unpack it during the download. Pack "
        f"it again: `cd {folder.parent} && zip -0 -r weights.pth {folder.name}`, and give "
        "weights.pth."
    )


def _parts_of_processes(folder: Path) -> str:
    shards = {path.name.partition("-model-")[0] for path in folder.glob("shard-*-model-*")}
    if len(shards) < 2:
        return ""
    return (
        f"{folder} is a checkpoint of torch.distributed.checkpoint in which each file holds the "
        "parts of one process. Save it with HuggingFaceStorageWriter(..., "
        "enable_consolidation=True), or join the parts with "
        "torch.distributed.checkpoint._consolidate_hf_safetensors.consolidate_safetensors_files."
    )


_KINDS = (
    _distributed,
    _parts_of_processes,
    deepspeed_advice,
    _adapter,
    _saved_model,
    _orbax,
    _unpacked,
)


# --- files of weights ----------------------------------------------------------------------------


def _give(names: list[str]) -> str:
    return f"Give the file of weights in it ({listed(names)})." if names else ""


def whole_files(folder: Path, paths: list[Path]) -> list[str]:
    """Return the files that can hold whole weights, indexes first, relative to the folder."""
    files = [path for path in paths if path.is_file()]
    indexes = [path for path in files if path.name.endswith(".index.json") and is_index(path)]
    shards = {index.with_name(name) for index in indexes for name in shard_names_in(index)}
    whole = [
        path
        for path in files
        if path.suffix in _ENDINGS and path not in shards and not path.name.startswith(_NOT_WEIGHTS)
    ]
    return [path.relative_to(folder).as_posix() for path in (*indexes, *whole)]
